"""Whole scenes, tile by tile, by Ray Data actors: every question about every tile, and the boxes of the answers as GeoJSON.

What a part of a scene (PART tiles) gave is written as it comes: a job that was interrupted goes on there with the same command.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass

import numpy as np
import ray.data
import torch
from tqdm import tqdm

from geodistill.cluster import need_one, quiet_data
from geodistill.config import Config
from geodistill.data.files import open_folder, read_text, write_json, write_text, written
from geodistill.data.record import BadRecord, Conversation
from geodistill.data.scenes import Found, Tile, found_in, merged, open_scene, tiles, write_geojson
from geodistill.data.stream import square
from geodistill.distill.decode import decode
from geodistill.models import assemble
from geodistill.models.reader import Reader

PART = 64  # tiles
SUFFIXES = (".tif", ".tiff", ".jp2", ".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Part:
    """Some tiles of a scene. file: where what they gave is written, below out/parts."""

    scene: str
    file: str
    tiles: list[Tile]


class Predictor:
    """One model, loaded once in its actor."""

    def __init__(self, config: Config):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.cluster.workers))
        self.config = config
        device, dtype = ("cuda", torch.bfloat16) if config.cluster.use_gpu else ("cpu", torch.float32)
        options = config.predict
        self.reader = Reader(options.model, device, dtype, len(options.questions), image_size=config.image_size)

    def __call__(self, row: dict) -> dict:
        """{"part": JSON} -> {"part": its file, "tiles": how many, "found": JSON, "error": why the scene cannot be read}."""
        part = json.loads(row["part"])
        wanted = [Tile(**tile) for tile in part["tiles"]]
        found: list[dict] = []
        error = ""
        try:
            with open_scene(part["scene"], self.config.data.bands) as scene:
                size = self.config.predict.tiles_per_batch
                for at in range(0, len(wanted), size):
                    seen = [(tile, image) for tile in wanted[at : at + size] if (image := scene.read(tile)) is not None]
                    if seen:
                        pixels = np.stack([square(image, self.reader.size) for _, image in seen])
                        for tile, answers in zip([tile for tile, _ in seen], self.answer(pixels), strict=True):
                            for question, (text, score) in zip(self.config.predict.questions, answers, strict=True):
                                ccw = self.config.evaluate.angle_counter_clockwise
                                found += [asdict(one) for one in found_in(tile, scene, question, text, score, ccw)]
        except BadRecord as bad:
            error = bad.reason
        return {"part": part["file"], "tiles": len(wanted), "found": json.dumps(found), "error": error}

    @torch.inference_mode()
    def answer(self, pixels_BHWC: np.ndarray) -> list[list[tuple[str, float]]]:
        """For every image the answer to every question and its score, the geometric mean of its tokens' probabilities."""
        reader, asked = self.reader, self.config.predict.questions
        prompts = reader.packer.questions("tile", [Conversation("detection", [(question, None)]) for question in asked])
        rows = reader.packer.pack([prompts] * len(pixels_BHWC)).to(reader.device)
        z = reader.model.project(reader.model.see(reader.model.prepare(torch.from_numpy(pixels_BHWC).to(reader.device))))
        limit = self.config.predict.max_response
        out = decode([reader.model], [1.0], rows, [z], limit, reader.forbidden, reader.end, greedy=True)
        alive = rows.alive_Rn
        order = rows.question_Rn[alive].argsort()
        length_Q = out.length_Rn[alive]
        branch = torch.repeat_interleave(torch.arange(len(length_Q), device=reader.device), length_Q)
        total = torch.zeros(len(length_Q), device=reader.device).index_add_(0, branch, out.mixture_M)
        scores = (total / length_Q).exp()[order].tolist()
        tokens = zip(out.tokens_RnT[alive][order].tolist(), length_Q[order].tolist(), strict=True)
        flat = [(reader.text(ids[:length]), score) for (ids, length), score in zip(tokens, scores, strict=True)]
        return [flat[i : i + len(asked)] for i in range(0, len(flat), len(asked))]


def scenes_of(path: str) -> list[str]:
    """The scene `path`, or those of that folder (local or s3://), by name. Raises ValueError where there are none."""
    if path.lower().endswith(SUFFIXES):
        return [path]
    names = [info.path for info in open_folder(path).get_file_info(_everything()) if info.is_file]
    found = sorted(name for name in names if name.lower().endswith(SUFFIXES))
    if not found:
        raise ValueError(f"predict.scenes={path} holds no scene ({', '.join(SUFFIXES)})")
    return [f"{path.rstrip('/')}/{name}" for name in found]


def stems_of(path: str) -> dict[str, str]:
    """Of each scene the name of its results, as it lies in the folder. Raises ValueError where two would have the same."""
    found = scenes_of(path)
    root = path.rstrip("/") + "/" if found != [path] else path.rpartition("/")[0] + "/"
    stems = {scene: scene.removeprefix(root).rpartition(".")[0] for scene in found}
    for scene, stem in stems.items():
        other = next((one for one, name in stems.items() if name == stem and one != scene), "")
        if other:
            raise ValueError(f"{scene} and {other} differ in their suffix alone: the results would have one name; move one away")
    return stems


def _everything():
    from pyarrow.fs import FileSelector

    return FileSelector("", recursive=True, allow_not_found=True)


def parts_of(config: Config, scene: str, side: int, digest: str) -> list[Part]:
    """The parts of a scene. Raises BadRecord for one that cannot be read."""
    options = config.predict
    tile = options.tile or side
    with open_scene(scene, config.data.bands) as found:
        cut = tiles(found.width, found.height, tile, tile // 4 if options.overlap < 0 else options.overlap)
        about = [found.width, found.height, str(found.crs), list(found.raster.transform)]
    folder, _, name = scene.rpartition("/")
    info = open_folder(folder or ".").get_file_info(name)
    key = hashlib.sha256(json.dumps([digest, scene, *about, info.size, info.mtime_ns]).encode()).hexdigest()[:16]
    return [Part(scene, f"{key}/{at:06d}.json", cut[at : at + PART]) for at in range(0, len(cut), PART)]


def predict(config: Config) -> dict:
    """Look for what predict.questions ask for in every scene; write out/NAME.geojson, NAME.scene.geojson and out/predict.json.

    Returns what the latter holds: scenes with their counts, those set aside with the reason, seconds. Raises ValueError.
    """
    options = config.predict
    if not options.scenes:
        raise ValueError("predict.scenes is empty: name a scene or a folder of scenes")
    side = options.tile or assemble.image_side(assemble.config_of(options.model), config.image_size)
    asked = [options.questions, options.tile, options.overlap, options.max_response, config.data.bands, config.image_size]
    asked.append(config.evaluate.angle_counter_clockwise)
    digest = json.dumps([assemble.weights_digest(options.model), *asked])
    out, start = open_folder(options.out, create=True), time.time()
    names: dict[str, list[Part]] = {}
    aside: dict[str, str] = {}
    stems = stems_of(options.scenes)
    for scene in stems:
        try:
            names[scene] = parts_of(config, scene, side, digest)
        except BadRecord as bad:
            aside[scene] = bad.reason
    done = {f"parts/{found.path}" for found in open_folder(f"{options.out}/parts").get_file_info(_everything()) if found.is_file}
    todo = [part for parts in names.values() for part in parts if f"parts/{part.file}" not in done]
    total = sum(len(part.tiles) for parts in names.values() for part in parts)
    left = sum(len(part.tiles) for part in todo)
    if left < total:
        print(f"[predict] {total - left} of {total} tiles were done before", flush=True)
    with tqdm(total=total, initial=total - left, unit="tile", mininterval=2, desc="[predict]") as bar:
        for row in _answers(config, todo):
            if row["error"]:
                scene = next(part.scene for part in todo if part.file == row["part"])
                aside[scene] = row["error"]
            else:
                out.create_dir(f"parts/{row['part'].rpartition('/')[0]}", recursive=True)
                write_text(out, f"parts/{row['part']}", row["found"])
            bar.update(row["tiles"])
    counts = {}
    for scene, parts in names.items():
        if scene in aside:
            continue
        rows = [one for part in parts for one in json.loads(read_text(out, f"parts/{part.file}"))]
        found = [Found(**{**one, "corners": tuple(map(tuple, one["corners"]))}) for one in rows]
        kept = merged(found, options.iou)
        with open_scene(scene, config.data.bands) as opened, written(options.out) as here:
            made = [str(file.relative_to(here)) for file in write_geojson(opened, kept, here / stems[scene])]
        tiles_of_scene = sum(len(part.tiles) for part in parts)
        counts[scene] = {
            "tiles": tiles_of_scene,
            "boxes": len(found),
            "objects": len(kept),
            "files": [f"{options.out}/{name}" for name in made],
        }
    result = {"scenes": counts, "set_aside": aside, "tiles": total, "seconds": time.time() - start}
    write_json(out, "predict.json", result)
    return result


def _answers(config: Config, todo: list[Part]):
    """What `Predictor` returns for every part, as it comes."""
    if not todo:
        return
    items = [{"part": json.dumps(asdict(part))} for part in todo]
    need_one("predict", config.cluster)
    quiet_data()
    yield from (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map(
            Predictor,  # type: ignore[arg-type]
            fn_constructor_args=(config,),
            compute=ray.data.ActorPoolStrategy(size=min(config.cluster.workers, len(items))),
            num_cpus=0.5,
            num_gpus=1 if config.cluster.use_gpu else 0,
        )
        .iter_rows()
    )


def predict_table(found: dict) -> str:
    """What was found in each scene."""
    lines = [f"{'scene':40} {'tiles':>7} {'boxes':>7} {'objects':>8}"]
    for scene, row in found["scenes"].items():
        lines.append(f"{scene.rpartition('/')[2][:40]:40} {row['tiles']:7} {row['boxes']:7} {row['objects']:8}")
    lines += [f"set aside: {scene}: {reason}" for scene, reason in found["set_aside"].items()]
    return "\n".join(lines)
