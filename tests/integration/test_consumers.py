"""The data plane with consumers that sleep: every image once, and what is told of their waiting."""

import pytest

from geodistill.benchmarks import consumers as data
from geodistill.config import load

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(300)]


def test_eight_consumers_see_every_image_once(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PHOTOS", 450)
    monkeypatch.setattr(data, "CONSUMERS", (8,))
    monkeypatch.setattr(data, "DEMAND", 40.0)
    monkeypatch.setattr(data, "SIZE", 64)
    monkeypatch.setattr(data, "PROCESSES", 2)
    found = data.measure_consumers(load(None, [f"run={tmp_path}", "data.images_per_shard=32"]))
    one = found["8"]
    assert one["once"] and one["images"] >= 400 and one["step_s"] == pytest.approx(8 * 4 / 40)
    assert 0 <= one["wait_mean"] <= one["wait_worst"] < 1 and 0 < one["delivered_per_s"] <= 42
    assert one["cpu_s"]["data tasks"] > 0 and one["cpu_s"]["streams in the consumers' processes"] > 0
    text = data.consumers_table(found)
    assert "every image once" in text and "yes" in text
