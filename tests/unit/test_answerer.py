"""The shipped teacher answers alike whatever is decoded together: batches of 1 and of 16 images, rows of 1 and of 8 questions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from geodistill.config import load
from geodistill.data.prepare import prepare
from geodistill.data.shards import groups
from geodistill.evaluate.benchmarks import Answerer, benchmark_of

TEACHER = Path(__file__).parents[2] / "configs" / "demo-teacher"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    made = load(None, [f"run={folder}", "data.train=8", "data.val=8", "data.test=8", f"teacher.model.init={TEACHER}"])
    prepare(made, parallel=False)
    return made


def answers(config, manifest_groups, **options) -> list[dict]:
    actor = Answerer(replace(config, evaluate=replace(config.evaluate, **options)), str(TEACHER), blind=False)
    row = actor({"groups": json.dumps([vars(g) for g in manifest_groups])})
    assert json.loads(row["set_aside"]) == []
    return json.loads(row["predictions"])


@pytest.mark.timeout(300)
def test_the_batch_size_does_not_change_answers(config):
    """Token for token: a prediction is the text of its tokens, and the texts of 8 images' questions are equal."""
    found = groups(json.loads((Path(config.data.shards) / "manifest.json").read_text()), "test")
    one = answers(config, found, images_per_batch=1, questions_per_row=1)
    assert len(one) > 50 and len({p["prediction"] for p in one}) > 15 and len({p["id"] for p in one}) == 8
    for images, questions in ((16, 1), (16, 8)):
        assert answers(config, found, images_per_batch=images, questions_per_row=questions) == one


def test_the_benchmark_of_an_image():
    data = {"source": "synthetic", "root": "", "name": ""}
    assert benchmark_of(data, "test-000001") == "synthetic"
    folders = data | {"source": "class_folders", "root": "s3://bucket/UCMerced_LandUse/"}
    assert benchmark_of(folders, "beach/1.tif") == "UCMerced_LandUse" and benchmark_of(folders, "x", "UCM") == "UCM"
    assert benchmark_of(data | {"source": "geochat_bench", "root": "/bench"}, "lrben/12.tif") == "lrben"
    assert benchmark_of(data | {"source": "rsvqa", "root": "/r"}, "USGS_split_test_phili/3") == "USGS_split_test_phili"
