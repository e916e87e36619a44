"""Whole scenes: tiles, boxes across tiles, coordinates."""

import io
import itertools
import json
import subprocess
import sys

import numpy as np
import pyogrio
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_origin
from shapely import box as rectangle
from shapely import union_all

from geodistill.data.imagery import displayable
from geodistill.data.record import BadRecord
from geodistill.data.scenes import Found, Tile, found_in, merged, open_scene, tiles, write_geojson


def scene_file(path, width=300, height=200, dtype="uint8", count=3, crs="EPSG:32632", nodata=None, seed=0):
    data = np.random.default_rng(seed).integers(1, 200, (count, height, width)).astype(dtype)
    options = {"crs": crs, "transform": from_origin(500_000, 5_400_000, 0.5, 0.5)} if crs else {}
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=count, dtype=dtype, nodata=nodata, **options
    ) as out:
        out.write(data)
    return data


@pytest.mark.parametrize(("width", "height", "side", "overlap"), [(300, 200, 64, 16), (64, 64, 64, 16), (50, 40, 64, 16),
                                                                  (65, 1000, 64, 0), (130, 120, 100, 99)])  # fmt: skip
def test_tiles_cover_the_scene_and_overlap(width, height, side, overlap):
    found = tiles(width, height, side, overlap)
    shapes = [rectangle(t.x, t.y, t.x + t.width, t.y + t.height) for t in found]
    assert union_all(shapes).equals(rectangle(0, 0, width, height))
    assert all(t.width == min(side, width) and t.height == min(side, height) for t in found)
    columns = sorted({t.x for t in found})
    assert all(b - a <= side - overlap for a, b in itertools.pairwise(columns))
    assert len(found) == len(set(found))
    with pytest.raises(ValueError, match="overlap"):
        tiles(width, height, side, side)


def test_a_tile_is_the_window_of_the_scene(tmp_path):
    data = scene_file(tmp_path / "a.tif")
    with open_scene(str(tmp_path / "a.tif")) as scene:
        image = scene.read(Tile(10, 20, 64, 32))
        assert image is not None and np.array_equal(np.asarray(image), data[:, 20:52, 10:74].transpose(1, 2, 0))


def test_deep_bands_are_shown_alike_in_every_tile(tmp_path):
    data = scene_file(tmp_path / "deep.tif", dtype="uint16", count=4, nodata=0)
    data[:, :, :150] *= 20  # a bright half
    data[:, :100, :64] = 0  # and a part without data
    with rasterio.open(tmp_path / "deep.tif", "r+") as out:
        out.write(data)
    with open_scene(str(tmp_path / "deep.tif"), [4, 3, 2]) as scene:
        assert scene.read(Tile(0, 0, 64, 64)) is None
        bright, dark = (np.asarray(scene.read(Tile(x, 110, 64, 64))).mean() for x in (70, 200))
        low, high = scene.limits[0]
    values = data[3][data[3] > 0]
    assert bright > 100 > 20 > dark
    assert low == pytest.approx(np.percentile(values, 2)) and high == pytest.approx(np.percentile(values, 98))
    with pytest.raises(BadRecord, match="asks for 9"), open_scene(str(tmp_path / "deep.tif"), [9]):
        pass
    (tmp_path / "broken.tif").write_bytes((tmp_path / "deep.tif").read_bytes()[:500])
    with pytest.raises(BadRecord, match="cannot be read"), open_scene(str(tmp_path / "broken.tif")) as scene:
        scene.read(Tile(0, 0, 64, 64))


def thing(label, x1, y1, x2, y2, score=0.5, edge=1e9):
    return Found(label, ((x1, y1), (x2, y1), (x2, y2), (x1, y2)), 0, score, edge)


def test_an_object_seen_by_several_tiles_is_one():
    whole = thing("ship", 100, 100, 140, 120)
    again = thing("ship", 101, 100, 141, 121, score=0.9)
    cut = thing("ship", 100, 100, 120, 120, score=0.99, edge=-1)
    plane = thing("plane", 100, 100, 140, 120)
    apart = thing("ship", 135, 115, 175, 135)
    assert merged([cut, whole, again, plane, apart], 0.3) == [again, plane, apart]
    assert merged([cut, whole], 0.3) == [whole]  # a part of it, whatever their IoU
    assert merged([], 0.3) == []
    assert merged([thing("line", 0, 0, 10, 0)], 0.3) == []


def test_how_many_a_tile_shows_makes_no_other_kind(tmp_path):
    scene_file(tmp_path / "a.tif")
    with open_scene(str(tmp_path / "a.tif")) as scene:
        tile = Tile(0, 0, 64, 64)
        phrases = ("1 ship", "2 ships", "the Ships at the left", "a plane")
        found = [found_in(tile, scene, "where?", f"<p>{phrase}</p> {{<25><50><75><100>|<0>}}", 0.7)[0] for phrase in phrases]
    assert [one.label for one in merged(found, 0.3)] == ["ship", "plane"]


def test_boxes_of_an_answer_lie_in_the_scene(tmp_path):
    scene_file(tmp_path / "a.tif")
    with open_scene(str(tmp_path / "a.tif")) as scene:
        tile = Tile(100, 50, 64, 64)
        answer = "<p>2 ships</p> {<25><50><75><100>|<0>}<delim>{<0><0><50><25>|<90>} <p>x</p> {<150><150><170><170>|<0>}"
        first, second = found_in(tile, scene, "where?", answer, 0.7)
        assert first.corners == ((116, 82), (148, 82), (148, 114), (116, 114))
        assert (first.label, first.phrase, first.score, first.edge) == ("ship", "2 ships", 0.7, 0)
        assert second.edge < 0 and second.angle == 90
        corner = found_in(Tile(0, 0, 64, 64), scene, "where are <p>cars</p>?", "{<0><0><50><50>|<0>}", 1.0)[0]
        assert corner.label == "car" and corner.edge == 32


def test_the_first_file_that_a_process_opens_is_read(tmp_path):
    scene_file(tmp_path / "a.tif")
    code = "import sys; from geodistill.data.imagery import DRIVERS; from geodistill.data.scenes import open_scene\n"
    code += "with open_scene(sys.argv[1], drivers=DRIVERS) as scene: print(scene.width)"
    said = subprocess.run(
        [sys.executable, "-c", code, f"{tmp_path}/a.tif"], capture_output=True, text=True, timeout=60, check=False
    )
    assert said.stdout.strip() == "300", said.stderr


def test_a_drawing_of_its_own_has_no_longitude(tmp_path):
    """A mosaic in local coordinates: there is nothing that leads to longitude and latitude."""
    scene_file(tmp_path / "mosaic.tif", crs='LOCAL_CS["site",UNIT["metre",1]]')
    with open_scene(str(tmp_path / "mosaic.tif")) as scene:
        assert scene.crs is not None and not scene.placed
        assert [f.name for f in write_geojson(scene, [thing("ship", 10, 20, 50, 30)], tmp_path / "m")] == ["m.scene.geojson"]
        with pytest.raises(ValueError, match=r"mosaic.tif has no coordinate system that leads to longitude"):
            scene.geojson([], True)


def test_complex_numbers_are_seen_as_amplitudes(tmp_path):
    """SAR before detection."""
    values = np.random.default_rng(0).normal(size=(2, 64, 64))
    with rasterio.open(tmp_path / "slc.tif", "w", "GTiff", 64, 64, 1, dtype="complex64") as out:
        out.write((values[0] + 1j * values[1]).astype(np.complex64), 1)
    with open_scene(str(tmp_path / "slc.tif")) as scene:
        seen = np.asarray(scene.read(Tile(0, 0, 64, 64)))[..., 0]
    strong = np.abs(values[0] + 1j * values[1])
    assert np.corrcoef(seen.ravel(), strong.ravel())[0, 1] > 0.99
    shown, width, height = displayable((tmp_path / "slc.tif").read_bytes(), "slc", [])
    assert (width, height) == (64, 64) and (np.asarray(Image.open(io.BytesIO(shown))) == seen).all()


@pytest.mark.parametrize("crs", ["EPSG:32632", "EPSG:4326", None])
def test_gdal_reads_what_is_written(tmp_path, crs):
    scene_file(tmp_path / "harbour.tif", crs=crs)
    if crs == "EPSG:4326":
        with rasterio.open(tmp_path / "harbour.tif", "r+") as out:
            out.transform = from_origin(9, 48, 1e-5, 1e-5)
    found = [thing("a ship", 10, 20, 50, 30), thing("a ship", 200, 150, 240, 190)]
    with open_scene(str(tmp_path / "harbour.tif")) as scene:
        files = write_geojson(scene, found, tmp_path / "out/harbour", model="m")
        transform = scene.raster.transform
    assert [f.name for f in files] == (["harbour.geojson"] if crs else []) + ["harbour.scene.geojson"]
    own = pyogrio.raw.read(files[-1])
    assert own[0]["geometry_type"] == "Polygon" and list(own[0]["fields"][:3]) == ["label", "phrase", "score"]
    if crs is None:
        return
    assert own[0]["crs"] == crs
    x, y = transform.c + 10 * transform.a, transform.f + 30 * transform.e
    bounds = pyogrio.read_bounds(files[-1])[1]
    assert bounds[:2, 0] == pytest.approx([x, y], abs=1e-3 if crs == "EPSG:32632" else 1e-7)
    meta, _, _, _ = pyogrio.raw.read(files[0])
    assert meta["crs"] in ("EPSG:4326", "OGC:CRS84")
    west, south, east, north = pyogrio.read_info(files[0], force_total_bounds=True)["total_bounds"]
    assert 8.9 < west < east < 9.1 and 47 < south < north < 49
    for file in files:
        for feature in json.loads(file.read_text())["features"]:
            ring = feature["geometry"]["coordinates"][0]
            assert ring[0] == ring[-1] and len(ring) == 5
            area = sum(a[0] * b[1] - b[0] * a[1] for a, b in itertools.pairwise(ring))
            assert area > 0 and feature["properties"]["model"] == "m"
