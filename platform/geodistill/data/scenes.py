"""Whole scenes: large georeferenced images, read tile by tile, and what was found in them as GeoJSON. No ray, no torch.

Places are pixels of the scene (x to the right, y down) until they are written.
"""

import json
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from PIL import Image
from rasterio.errors import RasterioError
from rasterio.transform import xy
from rasterio.warp import transform as to_crs
from rasterio.windows import Window
from shapely import Polygon, STRtree

from geodistill.data.files import open_folder
from geodistill.data.imagery import PERCENTILES, strength, stretch
from geodistill.data.record import BadRecord
from geodistill.language import box_corners, kind_in, labelled_boxes

os.environ.setdefault("GDAL_CACHEMAX", "128")  # MB of blocks that GDAL keeps; its own choice is a twentieth of the memory
OVERVIEW = 1024  # pixels of a side of the reading that decides how deep images are shown
CONTAINED = 0.7  # of the smaller of two boxes of one label in the other: they are one object, cut by the edge of a tile
INSIDE = 1e9  # pixels to an edge that is none
GEOGRAPHIC = "OGC:CRS84"  # longitude, latitude: GeoJSON's own


@dataclass(frozen=True)
class Tile:
    """A window of a scene, in pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Found:
    """Something in a scene. label: what it is; phrase: as the model put it, "2 ships"; corners: four, in pixels; score: 0-1, how
    sure the model was of the words; edge: pixels from the box to the nearest edge of its tile that is not one of the scene
    (negative: beyond it)."""

    label: str
    corners: tuple[tuple[float, float], ...]
    angle: float
    score: float
    edge: float
    question: str = ""
    phrase: str = ""

    @property
    def polygon(self) -> Polygon:
        return Polygon(self.corners)


def tiles(width: int, height: int, side: int, overlap: int) -> list[Tile]:
    """Windows of `side` pixels, `overlap` of them shared with the neighbours, that cover a scene; the last ones of a row or
    column end with it. Raises ValueError."""
    if not 0 <= overlap < side:
        raise ValueError(f"an overlap of {overlap} pixels does not fit tiles of {side}; it must be smaller")

    def starts(length: int) -> list[int]:
        if length <= side:
            return [0]
        count = math.ceil((length - side) / (side - overlap)) + 1
        return [min(i * (side - overlap), length - side) for i in range(count)]

    return [Tile(x, y, min(side, width), min(side, height)) for y in starts(height) for x in starts(width)]


class Scene:
    """An open scene. bands: their numbers from 1; none: the first three, or the first."""

    def __init__(self, raster: rasterio.DatasetReader, name: str, bands: Sequence[int] = ()):
        self.raster, self.name = raster, name
        self.width, self.height, self.crs = raster.width, raster.height, raster.crs
        self.bands = [*bands] or ([1, 2, 3] if raster.count >= 3 else [1])
        if max(self.bands) > raster.count:
            raise BadRecord(name, "bands", f"has {raster.count} bands, but data.bands asks for {max(self.bands)}")
        self._limits: list[tuple[float, float]] | None = None
        self.lock = threading.Lock()  # GDAL's data sets are not to be read, or closed, by two threads at once

    def close(self) -> None:
        """Close the file, when it is not being read."""
        with self.lock:
            self.raster.close()

    @property
    def placed(self) -> bool:
        """Has it coordinates that lead to longitude and latitude? A drawing's own, of a mosaic without a place, do not."""
        return self.crs is not None and (self.crs.is_geographic or self.crs.is_projected)

    @property
    def limits(self) -> list[tuple[float, float]] | None:
        """The values shown as 0 and 255 of each band, the same in every tile; None where bands have 8 bits."""
        if all(self.raster.dtypes[band - 1] == "uint8" for band in self.bands):
            return None
        if self._limits is None:
            shrink = max(1.0, max(self.width, self.height) / OVERVIEW)
            shape = (len(self.bands), math.ceil(self.height / shrink), math.ceil(self.width / shrink))
            read = strength(self.raster.read(self.bands, out_shape=shape, masked=True))
            self._limits = []
            for band in read:
                values = band.compressed()
                values = values[np.isfinite(values)]
                low, high = np.percentile(values, PERCENTILES) if values.size else (0, 1)
                self._limits.append((float(low), float(high)))
        return self._limits

    def read(self, tile: Tile) -> Image.Image | None:
        """A tile as a model sees it, RGB; None where the scene has no data."""
        with self.lock:
            limits: Sequence[tuple[float, float] | None] = self.limits or [None] * len(self.bands)
            read = strength(self.raster.read(self.bands, window=Window(tile.x, tile.y, tile.width, tile.height), masked=True))
        valid = ~np.ma.getmaskarray(read) & np.isfinite(read.data)
        if not valid.any():
            return None
        shown = [
            np.where(mask, band, 0).astype(np.uint8) if limit is None else stretch(band, mask, limit)
            for band, mask, limit in zip(read.data, valid, limits, strict=True)
        ]
        return Image.fromarray(np.stack((shown * 3)[:3], -1))

    def geojson(self, found: Sequence[Found], geographic: bool, **properties: Any) -> dict:
        """What was found as a FeatureCollection: in longitude and latitude, or in the scene's own coordinates (pixels where it
        has none). Raises ValueError for a scene that is not `placed` and is asked for geographic ones."""
        if geographic and not self.placed:
            raise ValueError(f"{Path(self.name).name} has no coordinate system that leads to longitude and latitude")
        xs, ys = ([corner[i] for one in found for corner in one.corners] for i in (0, 1))
        if self.crs and found:
            xs, ys = xy(self.raster.transform, ys, xs, offset="ul")
        if geographic and found:
            xs, ys = to_crs(self.crs, GEOGRAPHIC, xs, ys)
        digits = 8 if geographic or (self.crs and self.crs.is_geographic) else 3
        places = [[round(float(x), digits), round(float(y), digits)] for x, y in zip(xs, ys, strict=True)]
        features = []
        for i, one in enumerate(found):
            ring = places[4 * i : 4 * i + 4]
            if Polygon(ring).exterior.is_ccw is False:  # outer rings run counter-clockwise (RFC 7946)
                ring = ring[::-1]
            pixels = [[round(x, 1), round(y, 1)] for x, y in one.corners]
            told = {
                "label": one.label,
                "phrase": one.phrase,
                "score": round(one.score, 4),
                "angle": one.angle,
                "question": one.question,
                "pixels": pixels,
            }
            geometry = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
            features.append({"type": "Feature", "properties": told | properties, "geometry": geometry})
        collection: dict[str, Any] = {"type": "FeatureCollection", "name": Path(self.name).stem, "features": features}
        if self.crs and not geographic:
            code = self.crs.to_epsg()
            name = f"urn:ogc:def:crs:EPSG::{code}" if code else self.crs.to_wkt()
            collection["crs"] = {"type": "name", "properties": {"name": name}}
        return collection


def found_in(tile: Tile, scene: Scene, question: str, answer: str, score: float, counter_clockwise: bool = True) -> list[Found]:
    """What an answer on a tile says is where in the scene; not what has its centre outside the tile."""
    found = []
    for label, box in labelled_boxes(answer, question):
        corners = box_corners(box, tile.width, tile.height, counter_clockwise)
        x, y = (sum(corner[i] for corner in corners) / 4 for i in (0, 1))
        if not (0 <= x <= tile.width and 0 <= y <= tile.height):
            continue
        xs, ys = zip(*corners, strict=True)
        room = [INSIDE]
        room += [min(xs)] if tile.x > 0 else []
        room += [min(ys)] if tile.y > 0 else []
        room += [tile.width - max(xs)] if tile.x + tile.width < scene.width else []
        room += [tile.height - max(ys)] if tile.y + tile.height < scene.height else []
        places = tuple((tile.x + x, tile.y + y) for x, y in corners)
        found.append(Found(kind_in(label), places, box.theta, score, min(room), question, label))
    return found


@contextmanager
def open_scene(path: str, bands: Sequence[int] = (), drivers: Sequence[str] | None = None) -> Iterator[Scene]:
    """A scene in a file, local or s3://; drivers: those of GDAL that may read it. Raises BadRecord where it cannot be read."""
    folder, _, name = path.rpartition("/")
    try:
        source: Any = open_folder(folder).open_input_file(name) if "://" in path else path
        # rasterio.open takes one driver, what it opens several
        with rasterio.Env():  # or GDAL knows no driver yet where this is the first file that a process opens
            raster = rasterio.DatasetReader(path, driver=[*drivers]) if drivers else rasterio.open(source)
        with closing(Scene(raster, path, bands)) as scene:
            yield scene
    except (RasterioError, OSError) as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord(path, "scene", f"cannot be read ({error})") from error


def merged(found: Sequence[Found], iou: float) -> list[Found]:
    """Of boxes of one label that overlap by `iou` or more, or lie in one another: the one that its tile does not cut, else the
    largest, else the surest."""
    polygons = [one.polygon for one in found]
    tree = STRtree(polygons)
    dropped = [not (polygon.is_valid and polygon.area > 0) for polygon in polygons]
    kept = []
    for i in sorted(range(len(found)), key=lambda i: (-min(found[i].edge, 0), -polygons[i].area, -found[i].score)):
        if dropped[i]:
            continue
        kept.append(i)
        for j in tree.query(polygons[i], predicate="intersects").tolist():
            if j == i or dropped[j] or found[j].label != found[i].label:
                continue
            common = polygons[i].intersection(polygons[j]).area
            union = polygons[i].area + polygons[j].area - common
            if common >= iou * union or common >= CONTAINED * min(polygons[i].area, polygons[j].area):
                dropped[j] = True
    return [found[i] for i in sorted(kept)]


def write_geojson(scene: Scene, found: Sequence[Found], stem: Path, **properties: Any) -> list[Path]:
    """Write STEM.geojson in geographic coordinates, and STEM.scene.geojson in the scene's own; return them."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, geographic in ((".geojson", True), (".scene.geojson", False)):
        if geographic and not scene.placed:
            continue
        file = stem.with_name(stem.name + suffix)
        part = stem.with_name(stem.name + suffix + ".tmp")
        part.write_text(json.dumps(scene.geojson(found, geographic, **properties)))
        part.rename(file)
        written.append(file)
    return written
