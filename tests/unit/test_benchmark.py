"""What `jobs/benchmark.py` compares is the same work; its waiting is that of the metrics; an unknown measurement is refused."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geodistill.benchmark import data_wait, plain_loop
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
