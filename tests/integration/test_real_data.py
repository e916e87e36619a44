"""Real images in their published form: prepared, looked at, answered by the shipped teacher, scored and reported."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from geodistill.config import load
from geodistill.data.prepare import prepare
from geodistill.evaluate.benchmarks import evaluate
from geodistill.evaluate.report import report_of_run

SHARED = os.environ.get("GEODISTILL_SHARED")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not SHARED, reason="GEODISTILL_SHARED is not set: the folder with aid150/, aerial_cars/, dota_sample/"),
]
ROOT = Path(__file__).parents[2]
BOXES = {"grounding", "region_captioning", "detection"}
SETS = {
    "scenes": (
        ["source=class_folders", "root={}/aid150", "annotations={}/textrs_aid.json", "test_fraction=0.1"],
        {"scene_classification", "vqa", "captioning"},
    ),
    "oriented boxes, tiles": (["source=dota", "root={}/dota_sample", "tile=600", "test_fraction=0.99", "val_fraction=0"], BOXES),
    "oriented boxes made horizontal": (
        ["source=dota", "root={}/dota_sample", "tile=600", "horizontal=true", "test_fraction=0.99", "val_fraction=0"],
        BOXES,
    ),
    "horizontal boxes, tiles": (["source=yolo", "root={}/aerial_cars", "horizontal=true", "tile=512"], BOXES),
    "horizontal boxes, whole images, another sensor": (
        ["source=yolo", "root={}/aerial_cars", "sensor=infrared", "test_fraction=0.5"],
        BOXES,
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_prepare_evaluate_and_report(ray_cluster, tmp_path, name):
    settings, tasks = SETS[name]
    data = [f"data.{setting.format(SHARED)}" for setting in settings]
    teacher = f"evaluate.models={{teacher: {ROOT / 'configs/demo-teacher'}}}"
    config = load(str(ROOT / "configs/demo.yaml"), [f"run={tmp_path}", *data, teacher, "evaluate.blind=[]"])
    manifest = prepare(config, parallel=True)
    images = sum(part["images"] for part in manifest["splits"].values())
    rejected = pq.read_table(tmp_path / "data" / "rejected.parquet").to_pylist()
    assert images >= 2 and all(bad["reason"] and bad["field"] for bad in rejected)
    assert all("too small for a tile" in bad["reason"] for bad in rejected)  # nothing else is wrong with these sets
    page = (tmp_path / "data" / "preview.html").read_text()
    assert page.count('class="card sample"') == min(50, images) and ("grounding" not in tasks or page.count("<polygon") > 10)
    scores = evaluate(config)["teacher"]
    assert tasks <= scores.keys() and all(0 <= value <= 100 for value in scores["summary"].values())
    metrics = json.loads((tmp_path / "metrics.json").read_text())["teacher"]
    assert list(metrics["benchmarks"]) == [Path(config.data.root).name]
    html = Path(report_of_run(config, {"teacher": scores})).read_text()
    assert "The paper" in html and "How sure" in html
