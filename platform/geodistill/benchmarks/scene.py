"""Memory and rate of jobs/predict.py on a scene of SIDE x SIDE pixels: `python jobs/benchmark.py scene`."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin
from rasterio.windows import Window

from geodistill.benchmarks.data import Watch
from geodistill.config import Config
from geodistill.data.synthetic import make_scene
from geodistill.evaluate.tables import Table
from geodistill.predict import predict

SIDE, TILE, BLOCK = 10_000, 512, 256


def write_scene(path: Path, side: int) -> None:
    """A GeoTIFF of `side` x `side` pixels: scenes of the generator, four times enlarged, block by block."""
    options = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_400_000, 0.5, 0.5), "compress": "jpeg", "tiled": True,
               "blockxsize": BLOCK, "blockysize": BLOCK, "photometric": "ycbcr"}  # fmt: skip
    blocks = [
        np.asarray(make_scene(0, "scene", i)[1].resize((BLOCK, BLOCK)).convert("RGB")).transpose(2, 0, 1) for i in range(64)
    ]
    with rasterio.open(path, "w", driver="GTiff", width=side, height=side, count=3, dtype="uint8", **options) as out:
        for number, (y, x) in enumerate((y, x) for y in range(0, side, BLOCK) for x in range(0, side, BLOCK)):
            width, height = min(BLOCK, side - x), min(BLOCK, side - y)
            out.write(blocks[number * 7 % 64][:, :height, :width], window=Window(x, y, width, height))


def measure_scene(config: Config) -> dict:
    """{"side", "tiles", "objects", "seconds", "before", "peak": MiB of this process and all of Ray}, with the run's student."""
    folder = Path(config.run) / "benchmark/scene"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scene.tif"
    write_scene(path, SIDE)
    options = replace(config.predict, scenes=str(path), out=str(folder / f"out-{time.time():.0f}"), tile=TILE)
    before = Watch()
    with before:
        time.sleep(2)
    start = time.time()
    with Watch() as watch:
        found = predict(replace(config, predict=options))
    (row,) = found["scenes"].values()
    return {
        "side": SIDE,
        "tiles": row["tiles"],
        "objects": row["objects"],
        "seconds": time.time() - start,
        "before": before.peak / 2**20,
        "peak": watch.peak / 2**20,
    }


def scene_table(found: dict) -> str:
    """What it took."""
    rows = [
        ["tiles", str(found["tiles"])],
        ["objects", str(found["objects"])],
        ["seconds", f"{found['seconds']:.0f}"],
        ["tiles/s", f"{found['tiles'] / found['seconds']:.1f}"],
        ["memory of the job and all of Ray before, MiB", f"{found['before']:.0f}"],
        ["and at most while it ran, MiB", f"{found['peak']:.0f}"],
    ]
    return Table(f"A scene of {found['side']} x {found['side']} pixels in tiles of {TILE}", [("", "")], rows, "", "").text()
