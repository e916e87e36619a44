"""What `jobs/benchmark.py` compares is the same work; its waiting is that of the metrics; an unknown measurement is refused."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geodistill.benchmarks import compare, loss
from geodistill.benchmarks.data import data_wait, plain_loop
from geodistill.benchmarks.operators import measure_operators, operators_table
from geodistill.cli import JobFailed
from geodistill.config import load
from geodistill.data.record import ImageRecord, open_image
from geodistill.data.stream import square

JOB = Path(__file__).parents[2] / "jobs" / "benchmark.py"


@pytest.mark.parametrize("mode, kind", [("RGB", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG")])
def test_the_plain_loop_makes_the_pixels_of_the_stream_to_two_grey_levels(mode, kind):
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    record = ImageRecord("a", buffer.getvalue(), 70, 50, [])
    (plain,) = plain_loop([record], 64)
    difference = np.abs(np.asarray(plain).astype(int) - square(open_image(record.image, "a"), 64))
    assert difference.max() <= 2 and (difference > 0).mean() < 0.02


def test_waiting_is_weighted_by_the_time_of_the_steps(tmp_path):
    rows = [
        {"step": 10, "images_per_second": 1.0, "data_wait": 0.5},  # 10 steps of a second each: 5 s waited
        {"step": 20, "images_per_second": 10.0, "data_wait": 0.1},  # 10 steps of 0.1 s: 0.1 s waited
        {"step": 20, "validation_loss": 1.0},
        {"step": 40, "images_per_second": 10.0, "data_wait": 0.0},
    ]
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = data_wait(tmp_path)["baseline"]
    assert found["all"] == pytest.approx(5.1 / 13) and found["after_first"] == pytest.approx(0.1 / 3)
    assert data_wait(tmp_path / "nowhere") == {}


def test_an_unknown_measurement_is_refused():
    for arguments in ([], ["dta", "--config", "x"]):
        done = subprocess.run([sys.executable, JOB, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2 and "the first argument is one of: data" in done.stderr


def test_ratios_that_have_fallen_are_told(tmp_path, monkeypatch):
    folder = tmp_path / "run/benchmark"
    folder.mkdir(parents=True)
    config = load(None, [f"run={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match="holds no ratios yet"):
        compare.measure_compare(config)
    cases = [
        {"rival": "trl", "image_tokens": 256, "questions": 8, "ratio": 4.0},
        {"rival": "trl", "image_tokens": 64, "questions": 1, "ratio": None},  # not measured
    ]
    (folder / "distill.json").write_text(json.dumps({"cases": cases}))
    (folder / "loss.json").write_text(json.dumps({"ratios": {"loss: dense / ours, 2048 tokens": 1.2}}))
    baseline = tmp_path / "benchmarks.json"
    monkeypatch.setattr(compare, "BASELINE", baseline)
    name = "distill: trl / ours, 256 image tokens, n=8"
    baseline.write_text(json.dumps({name: 4.5, "loss: dense / ours, 2048 tokens": 1.3, "not run": 2.0}))
    found = compare.measure_compare(config)
    assert compare.fallen(found) == [] and "4.50  4.00" in compare.compare_table(found)
    baseline.write_text(json.dumps({name: 6.0}))
    with pytest.raises(JobFailed, match=f"1 of 2 ratios have fallen: {name}"):
        compare.compare_table(compare.measure_compare(config))


def test_the_committed_ratios_are_those_of_the_readme():
    text = (JOB.parents[1] / "README.md").read_text()
    committed = json.loads(compare.BASELINE.read_text())
    assert committed and [name for name, value in committed.items() if f"{value:.2f}" not in text] == []


def test_the_heaviest_operators_are_told(tmp_path):
    sizes = [f"{role}.model.{key}=32" for role in ("teacher", "student") for key in ("hidden", "intermediate", "vision.hidden")]
    found = measure_operators(
        load(None, [f"run={tmp_path}", "plan.response_tokens=3", "distill.train.images_per_micro_batch=8", *sizes])
    )
    for part in ("rollout", "update"):
        assert len(found[part]) == 11 and "aten::mm" in [one["name"] for one in found[part]]
        assert 0.5 < sum(one["share"] for one in found[part]) <= 1.0001
    assert "no operator" in operators_table(found)


def test_the_losses_are_measured_beside_a_dense_one(tmp_path, monkeypatch):
    """Both find the same value; a pass of ours takes its memory; the table names the targets."""
    monkeypatch.setattr(loss, "VOCABULARY", 500)
    runs = {who: loss.passes(who, 300, "cpu") for who in ("ours", "dense")}
    assert runs["ours"][0][2] == pytest.approx(runs["dense"][0][2], rel=1e-5)
    assert all(seconds > 0 and extra >= 0 for seconds, extra, _ in runs["ours"])
    one = {"seconds": 1.5, "extra_mb": 321.0, "value": 1.0}
    found = {"device": "cpu", "vocabulary": 500, "widths": (256, 512), "ratios": {}}
    table = loss.loss_table(found | {"who": {who: {"2048": one, "8192": one} for who in ("ours", "dense")}})
    assert "321" in table and "ours <= 500 MB" in table and "trl is not installed" in table
