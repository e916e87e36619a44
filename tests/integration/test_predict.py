"""jobs/predict.py's library on a real local Ray: scenes in, GeoJSON out, and nothing is looked at twice."""

import json
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
from rasterio.transform import from_origin

from geodistill import predict as module
from geodistill.config import load
from geodistill.data.record import open_image

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]


def mosaic(path: Path, records, columns: int) -> None:
    """Scenes of the generator side by side."""
    pictures = [np.asarray(open_image(record.image, record.id)) for record in records]
    lines = [np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)]
    data = np.concatenate(lines).transpose(2, 0, 1)
    where = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_400_000, 1, 1)}
    with rasterio.open(
        path, "w", driver="GTiff", count=3, dtype="uint8", height=data.shape[1], width=data.shape[2], **where
    ) as out:
        out.write(data)


def test_scenes_become_geojson_and_a_job_goes_on(ray_cluster, records, tmp_path, monkeypatch):
    (tmp_path / "scenes/more").mkdir(parents=True)
    mosaic(tmp_path / "scenes/a.tif", records[:16], 4)
    mosaic(tmp_path / "scenes/more/b.tif", records[16:20], 2)
    (tmp_path / "scenes/broken.tif").write_bytes(b"II*\0 nothing more")
    monkeypatch.setattr(module, "PART", 8)
    config = load(None, [f"run={tmp_path}/run", f"predict.scenes={tmp_path}/scenes", f"predict.model={ROOT}/configs/demo-teacher",
                         "predict.questions=['[refer] where is <p>building</p>?', '[grounding] describe the image in detail.']",
                         "predict.overlap=0"])  # fmt: skip
    found = module.predict(config)
    out = tmp_path / "run/predict"
    assert {Path(scene).name: row["tiles"] for scene, row in found["scenes"].items()} == {"a.tif": 16, "b.tif": 4}
    assert [Path(scene).name for scene in found["set_aside"]] == ["broken.tif"]
    assert all(0 < row["objects"] <= row["boxes"] for row in found["scenes"].values())
    info = pyogrio.read_info(out / "a.scene.geojson", force_total_bounds=True, force_feature_count=True)
    assert info["crs"] == "EPSG:32632" and info["features"] == found["scenes"][f"{tmp_path}/scenes/a.tif"]["objects"]
    west, south, east, north = info["total_bounds"]
    assert 499_900 < west < east < 500_400 and 5_399_600 < south < north < 5_400_100
    labels = {f["properties"]["label"] for f in json.loads((out / "a.geojson").read_text())["features"]}
    assert "building" in labels and len(labels) > 1

    # as if it had been killed before the last part: that one alone is looked at again
    parts = sorted((out / "parts").rglob("*.json"))
    assert len(parts) == 3
    before = {part: part.stat().st_mtime_ns for part in parts}
    text = (out / "a.geojson").read_text()
    parts[-1].unlink()
    (out / "a.geojson").unlink()
    again = module.predict(config)
    assert again["scenes"] == found["scenes"] and (out / "a.geojson").read_text() == text
    assert {part for part in parts if part.stat().st_mtime_ns != before[part]} == {parts[-1]}
    with pytest.raises(ValueError, match="holds no scene"):
        module.predict(
            load(None, [f"run={tmp_path}/run", f"predict.scenes={tmp_path}/run", f"predict.model={ROOT}/configs/demo-teacher"])
        )
