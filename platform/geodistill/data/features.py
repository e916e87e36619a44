"""Stored features: what a frozen vision tower gives for every image of the shards, computed once by Ray Data actors.

Stages read them in place of images: no JPEG is decoded and no tower runs, however many epochs and models there are.

<features>/train-00000.arrow   of train-00000.parquet, with a record batch for each of its row groups; in its schema's metadata
                               what it was made from: an interrupted job goes on after the finished files
           manifest.json       the same of all files, with sizes and times; written last

Shapes: B images, N image tokens, H features of one, S pixels a side. bf16 is stored, and goes through NumPy, as uint16.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pyarrow import fs
from torch import Tensor, nn

from geodistill.config import Config
from geodistill.data.files import exists, open_folder, read_json, write_json, writing
from geodistill.data.record import BadRecord, open_image
from geodistill.data.shards import MANIFEST, Group, load_manifest, read_group

READ = 32  # row groups that are read back for the time of that


class Stored(NamedTuple):
    """The features of a row group, in its order. reasons: why there are none of an image (its features are zeros), or "".

    features_BNH: float32, or uint16 that stands for bf16.
    """

    ids: list[str]
    reasons: list[str]
    features_BNH: np.ndarray

    def need(self, place: int, record: str) -> None:
        """Raise BadRecord where there are no features of that record, which must stand in that place."""
        assert self.ids[place] == record, "features are checked against their shards when a stage starts"
        if self.reasons[place]:
            raise BadRecord(record, "image", self.reasons[place])


def to_array(features: Tensor) -> np.ndarray:
    """Features as NumPy knows them."""
    features = features.contiguous().cpu()
    return (features.view(torch.uint16) if features.dtype == torch.bfloat16 else features).numpy()


def to_tensor(features: np.ndarray) -> Tensor:
    """The inverse of `to_array`, over the same memory where that can be written to."""
    found = torch.from_numpy(features if features.flags.writeable else features.copy())  # torch knows no read-only memory
    return found.view(torch.bfloat16) if found.dtype == torch.uint16 else found


def read_features(folder: str, group: Group) -> Stored:
    """The stored features of a row group of the shards. Raises ValueError where there are none."""
    files, name = open_folder(folder), _name(group.file)
    if not exists(files, name):
        raise ValueError(f"{folder}/{name} does not exist: run jobs/features.py with the same --config and overrides first")
    with files.open_input_file(name) as stream:
        batch = pa.ipc.open_file(stream).get_batch(group.index)
    return Stored(batch["id"].to_pylist(), batch["reason"].to_pylist(), batch["features"].to_numpy_ndarray())


def load_features(folder: str) -> dict[str, Any]:
    """The manifest of finished features. Raises ValueError where there is none."""
    files = open_folder(folder)
    if not exists(files, MANIFEST):
        raise ValueError(
            f"{folder}/{MANIFEST} does not exist: run jobs/features.py with the same --config and overrides first, or set "
            "features= (images)"
        )
    return read_json(files, MANIFEST)


def _name(shard: str) -> str:
    return shard.removesuffix(".parquet") + ".arrow"


def _shards(manifest: dict) -> list[dict]:
    """The shards that stages read: all but the test's, whose images alone are read."""
    return [shard for split, part in manifest["splits"].items() if split != "test" for shard in part["shards"]]


# What features are made with


def fingerprint(tower: nn.Module, layer: int, dtype: torch.dtype) -> str:
    """sha256 of a tower: its weights in `dtype`, the hidden state that is read, and settings that weights do not tell."""
    names = ("vit_layers", "conv_stages", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
    digest = hashlib.sha256(json.dumps([layer, *(getattr(tower.config, name, None) for name in names)]).encode())
    for name, weight in sorted(tower.state_dict().items()):
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(weight.to("cpu", dtype).reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.cluster.precision == "bf16" else torch.float32


def check_features(config: Config, models: dict[str, Any], side: int) -> None:
    """Raise ValueError, with the reason and the remedy, where a stage cannot read `config.features`.

    models: "student" (and "teacher", where there is one) -> a transformers model; side: S of the images that it would be shown.
    """
    from geodistill.models.row_model import is_llava

    for role, model in models.items():
        if not is_llava(model.config):
            raise ValueError(
                f"features={config.features}: the {role}'s tower is not apart, as LLaVA's is; set features= (images)"
            )
    found, dtype = load_features(config.features), _dtype(config)
    now: dict[str, Any] = {"image_size": side, "precision": config.cluster.precision}
    for role, model in models.items():
        tower = fingerprint(model.model.vision_tower, model.config.vision_feature_layer, dtype)
        _need_same(config.features, found["made_from"], now | {"tower": tower}, role)
    shards = {shard["file"]: shard["sha256"] for shard in _shards(load_manifest(config.data.shards))}
    odd = [file for file, sha256 in shards.items() if found["shards"].get(file) != sha256]
    if odd:
        raise ValueError(
            f"features={config.features} are not those of data.shards={config.data.shards} ({odd[0]} differs); run "
            "jobs/features.py for these shards with features=ANOTHER FOLDER, or set features= (images)"
        )


def _need_same(folder: str, old: dict, new: dict, role: str) -> None:
    words = {
        "precision": f"cluster.precision {old['precision']} is not {new['precision']}",
        "image_size": f"image_size {old['image_size']} is not {new['image_size']}",
        "tower": f"the vision tower, or the layer of it that is read, is not the {role}'s",
    }
    for key, reason in words.items():  # the tower last: its fingerprint depends on the precision
        if old[key] != new[key]:
            raise ValueError(
                f"features={folder} were made with something else: {reason}; run jobs/features.py with these settings and "
                "features=ANOTHER FOLDER, or set features= (images)"
            )


class Tower:
    """The frozen tower that the student's stages would run, with what RowModel does around it.

    Raises ValueError where there is none.
    """

    def __init__(self, config: Config, device: str):
        from geodistill.models.assemble import config_of
        from geodistill.models.row_model import is_llava
        from geodistill.models.vision import load_tower

        sizes = config.student.model
        if sizes.init and not is_llava(config_of(sizes.init)):
            raise ValueError(f"student.model.init={sizes.init} is of a family whose tower is not apart; it goes without features")
        tower, layer = load_tower(sizes.init or sizes.tower)
        self.layer, self.device, self.dtype = sizes.vision.feature_layer if layer is None else layer, device, _dtype(config)
        self.tower = tower.to(device, self.dtype).eval()
        self.side = config.image_size or tower.config.image_size
        self.precision = config.cluster.precision

    @property
    def made_from(self) -> dict[str, Any]:
        """What the features depend on, beside the images."""
        tower = fingerprint(self.tower, self.layer, self.dtype)
        return {"tower": tower, "image_size": self.side, "precision": self.precision}

    @torch.inference_mode()
    def __call__(self, images_BSSC: np.ndarray) -> np.ndarray:
        """uint8 images -> features [B, N, H], as `RowModel.see(RowModel.prepare(images))` gives them."""
        from geodistill.models.vision import normalize

        pixels = normalize(torch.from_numpy(images_BSSC).to(self.device)).to(self.dtype)
        return to_array(self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[self.layer][:, 1:])


# The job


def store_features(config: Config) -> dict[str, Any]:
    """Write the features of all shards but the test's to `config.features`, one Ray Data row a shard; returns their manifest.

    Goes on where a killed run stopped; does nothing where all is there. Raises ValueError for features of another tower, image
    size or precision in that folder, and where the disk is too small.
    """
    found = load_manifest(config.data.shards, ["train"])
    tower = Tower(config, "cpu")
    made_from, files = tower.made_from, open_folder(config.features, create=True)
    old = read_json(files, MANIFEST) if exists(files, MANIFEST) else None
    if old:
        _need_same(config.features, old["made_from"], made_from, "student")
    shards = _shards(found)
    todo = [shard for shard in shards if _made_from(files, _name(shard["file"])) != made_from | {"shard": shard["sha256"]}]
    if old and not todo and old["shards"] == {shard["file"]: shard["sha256"] for shard in shards}:
        print(f"features are there already: {config.features}", flush=True)
        return old
    if old:
        files.delete_file(MANIFEST)  # not whole until the rest is there too
    sample = tower(np.zeros((1, tower.side, tower.side, 3), np.uint8))
    images = sum(shard["images"] for shard in shards)
    left = sum(shard["images"] for shard in todo)
    N, H = sample.shape[1:]
    print(
        f"features: {N} x {H} in {tower.precision}, {sample.nbytes / 1e6:.3g} MB an image, {images * sample.nbytes / 1e9:.3g} GB "
        f"in all; {images - left} of {images} images are there already",
        flush=True,
    )
    free = shutil.disk_usage(config.features).free if "://" not in config.features else float("inf")
    if left * sample.nbytes > free:
        raise ValueError(
            f"features={config.features} needs {left * sample.nbytes / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free there; name "
            "a folder on a larger disk or s3://, set cluster.precision=bf16, or go without features"
        )
    del tower
    infos = list(_write_all(config, made_from, todo))
    manifest = {
        "made_from": made_from,
        "shards": {shard["file"]: shard["sha256"] for shard in shards},
        "shape": [N, H],
        "images": images,
        "image_bytes": sample.nbytes,
        "bytes": sum(files.get_file_info(_name(shard["file"])).size for shard in shards),
        "milliseconds": _milliseconds(config, shards, infos),
    }
    for reason in [reason for info in infos for reason in info["rejected"]][:20]:
        print(f"set aside, as every stage would: {reason}", flush=True)
    write_json(files, MANIFEST, manifest)
    return manifest


def _milliseconds(config: Config, shards: list[dict], infos: list[dict]) -> dict[str, float]:
    """Of an image: "decoding" (reading included), "tower" and "writing" as the actors measured them, "reading" back in this
    process, from the files that were written first; {} where nothing was written.

    A file that was just written may still lie in memory: reading can be slower in training.
    """
    images = sum(info["images"] for info in infos)
    if not images:
        return {}
    found = {part: 1000 * sum(info["seconds"][part] for info in infos) / images for part in infos[0]["seconds"]}
    groups = [Group(shard["file"], i, images) for shard in shards for i, images in enumerate(shard["groups"])][:READ]
    began = time.perf_counter()
    read = sum(len(read_features(config.features, group).ids) for group in groups)
    return found | {"reading": 1000 * (time.perf_counter() - began) / read}


def break_even(milliseconds: dict[str, float]) -> float:
    """After how many uses of each image stored features pay: what it takes to make them over what each use saves; or infinity.

    A use: one tower over one image, in one step; models that share a tower make one use of it together. The times of the device
    and of the CPU are added up, though in training the images are decoded, or features read, while the device is at work.
    """
    cost = milliseconds["decoding"] + milliseconds["tower"] + milliseconds["writing"]
    saved = milliseconds["decoding"] + milliseconds["tower"] - milliseconds["reading"]
    return cost / saved if saved > 0 else float("inf")


def _made_from(files: fs.FileSystem, name: str) -> dict | None:
    """What a file of features was made from; None where there is none that can be read."""
    if not exists(files, name):
        return None
    try:
        with files.open_input_file(name) as stream:
            return json.loads(pa.ipc.open_file(stream).schema.metadata[b"made_from"])
    except pa.ArrowInvalid:
        return None


def _write_all(config: Config, made_from: dict, todo: list[dict]) -> Iterator[dict]:
    """What `Writer` says of each shard, as they finish, with a line of progress each."""
    import ray.data

    from geodistill.cluster import need_one, quiet_data

    if not todo:
        return
    need_one("features", config.cluster)
    quiet_data()
    written = ray.data.from_items([{"shard": json.dumps(shard)} for shard in todo], override_num_blocks=len(todo)).map(
        Writer,  # type: ignore[arg-type]
        fn_constructor_args=(config, made_from),
        compute=ray.data.ActorPoolStrategy(size=min(config.cluster.workers, len(todo))),
        num_cpus=0.5,
        num_gpus=1 if config.cluster.use_gpu else 0,
    )
    began, done, planned = time.monotonic(), 0, sum(shard["images"] for shard in todo)
    for number, row in enumerate(written.iter_rows(), start=1):
        info = json.loads(row["info"])
        done += info["images"]
        rate = done / (time.monotonic() - began)
        pace = f"{rate:.{0 if rate > 9 else 1}f} images/s, about {(planned - done) / rate:.0f} s left"
        print(f"{info['file']}: {info['images']} images, file {number} of {len(todo)}, {pace}", flush=True)
        yield info


class Writer:
    """Writes the features of one shard after another; the tower is loaded once in its actor."""

    def __init__(self, config: Config, made_from: dict):
        torch.set_num_threads(config.cluster.threads_per_worker or max(1, (os.cpu_count() or 1) // config.cluster.workers))
        self.config, self.made_from = config, made_from
        self.tower = Tower(config, "cuda" if config.cluster.use_gpu else "cpu")
        self.sample = self.tower(np.zeros((1, self.tower.side, self.tower.side, 3), np.uint8))  # and the device is warm

    def __call__(self, row: dict) -> dict:
        """{"shard": JSON of its part of the manifest} -> {"info": JSON of what was written, and the seconds of each part}."""
        shard = json.loads(row["shard"])
        files, name, rejected = open_folder(self.config.features), _name(shard["file"]), []
        kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(self.sample.dtype), self.sample.shape[1:])
        mark = {"made_from": json.dumps(self.made_from | {"shard": shard["sha256"]})}
        schema = pa.schema([("id", pa.string()), ("reason", pa.string()), ("features", kind)], metadata=mark)
        began, decoding, tower = time.perf_counter(), 0.0, 0.0
        with writing(files, name) as stream, pa.ipc.new_file(stream, schema) as out:
            for index, images in enumerate(shard["groups"]):
                start = time.perf_counter()
                ids, reasons, pixels = self.decode(Group(shard["file"], index, images))
                read = time.perf_counter()
                features = self.tower(pixels)
                seen = time.perf_counter()
                tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(features)
                out.write_batch(pa.record_batch([pa.array(ids), pa.array(reasons), tensor], schema=schema))
                rejected += [f"record {id}: {reason}" for id, reason in zip(ids, reasons, strict=True) if reason]
                decoding, tower = decoding + read - start, tower + seen - read
        seconds = {"decoding": decoding, "tower": tower, "writing": time.perf_counter() - began - decoding - tower}
        info = {"file": name, "images": shard["images"], "rejected": rejected, "seconds": seconds}
        return {"info": json.dumps(info)}

    def decode(self, group: Group) -> tuple[list[str], list[str], np.ndarray]:
        """(ids, reasons, images uint8 [B, S, S, 3]) of a row group."""
        from geodistill.data.stream import square  # which reads what is written here

        records = read_group(self.config.data.shards, group, ["id", "image"])
        pixels, reasons = np.zeros((len(records), self.tower.side, self.tower.side, 3), np.uint8), []
        for i, record in enumerate(records):
            try:
                pixels[i], reason = square(open_image(record.image, record.id), self.tower.side), ""
            except BadRecord as bad:
                reason = bad.reason
            reasons.append(reason)
        return [record.id for record in records], reasons, pixels
