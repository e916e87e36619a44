"""`prepare`: raw data -> shards, tokenizer and manifest; one Ray Data task a shard; goes on where a killed run stopped."""

import hashlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from geodistill.config import Config, DataConfig
from geodistill.data.duplicates import SCHEMA as DUPLICATES
from geodistill.data.duplicates import Copy, Fingerprint, find_copies, summary
from geodistill.data.files import absolute_path, exists, open_folder, read_json, sha256_of, write_json, writing, written
from geodistill.data.preview import write_preview
from geodistill.data.record import SCHEMA_VERSION
from geodistill.data.shards import (
    MANIFEST,
    ShardInfo,
    batched,
    groups,
    leave_out,
    load_manifest,
    more_images,
    read_group,
    write_shard,
)
from geodistill.data.sources import Item, open_source
from geodistill.data.synthetic import SPLITS
from geodistill.rules import need_source

REJECTED = pa.schema([(name, pa.string()) for name in ("file", "record", "field", "reason")])
_NOT_COMPARED = ("shards", "max_rejected")  # settings that leave the records as they are
_NOT_IN_A_SHARD = (*_NOT_COMPARED, "duplicates", "duplicate_bits", "name")  # settings that leave a shard as it is first made


def prepare(config: Config, parallel: bool) -> dict:
    """Raw data -> shards, tokenizer and manifest in data.shards; returns the manifest. Goes on where a killed run stopped.

    parallel: one Ray Data task a shard, in a Ray that is already initialised; otherwise in this process.
    Raises ValueError when there is nothing to read, too much is bad, or the folder holds shards of other settings.
    """
    need_source(config)
    data = replace(config.data, root=absolute_path(config.data.root))
    settings = asdict(data) | {"system": config.system}
    files = open_folder(data.shards, create=True)
    if exists(files, MANIFEST):
        manifest = load_manifest(data.shards)
        _same_settings(manifest["settings"], settings, data.shards)
        shards = [shard for part in manifest["splits"].values() for shard in part["shards"]]
        infos = files.get_file_info([shard["file"] for shard in shards])
        if [info.size for info in infos] == [shard["bytes"] for shard in shards]:
            print(f"shards are there already: {data.shards}", flush=True)
            if not exists(files, "tokenizer/tokenizer.json"):
                _save_tokenizer(config, manifest)
            return manifest
        files.delete_file(MANIFEST)  # a shard is gone or cut short: the data set is not whole until all of it is there again
    items = open_source(data).items()
    unread = next((item for item in items if item.ref.get("field") == "file"), None)
    if unread and data.max_rejected < 1:
        raise ValueError(f"{unread.ref['reason']}; or set data.max_rejected=1 to go on without that file")
    _need_images(Counter(item.split for item in items), data)
    infos = _make_all(_plans(items, data), data, parallel)
    rejected = [bad for info in infos for bad in info["rejected"]]
    with writing(files, "rejected.parquet") as stream:
        pq.write_table(pa.Table.from_pylist(rejected, REJECTED), stream)
    lost, total = sum(info["lost"] for info in infos), sum(item.records for item in items)
    infos, copies, left_out = _duplicates(infos, data)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "source": data.source,
        "settings": settings,
        "splits": {split: _total(split, infos) for split in SPLITS if any(item.split == split for item in items)},
        "rejected": len(rejected),
        "duplicates": summary(copies),
        "left_out": left_out,
    }
    _print_summary(manifest, rejected)
    if lost > data.max_rejected * total:
        worst = Counter(f"field {_general(bad['field'])}: {_general(bad['reason'])}" for bad in rejected).most_common(1)[0][0]
        raise ValueError(
            f"{lost} of {total} records were set aside, over data.max_rejected={data.max_rejected}; most often {worst}. "
            f"See {data.shards}/rejected.parquet; mend the data or raise data.max_rejected, then run again"
        )
    _need_images(Counter({split: part["images"] for split, part in manifest["splits"].items()}), data)
    _save_tokenizer(config, manifest)
    print(f"a look at it: {write_preview(data.shards, manifest, rejected, copies, data.angle_counter_clockwise)}", flush=True)
    write_json(files, MANIFEST, manifest)
    return manifest


def _same_settings(old: dict, new: dict, folder: str) -> None:
    for key in new:
        if key not in _NOT_COMPARED and old.get(key) != new[key]:
            name = key if key == "system" else f"data.{key}"
            raise ValueError(
                f"{folder} holds shards made with {name}={old.get(key)!r}, but now {name}={new[key]!r}: "
                "choose another run= or data.shards=, or delete that folder"
            )


def _need_images(images: Counter[str], data: DataConfig) -> None:
    """ValueError for a split without an image that the settings ask for, or where no image is left of published splits."""
    if data.source in ("synthetic", "class_folders", "llava"):
        for split in SPLITS:
            asked = getattr(data, split) if data.source == "synthetic" else getattr(data, f"{split}_fraction", 1)
            if (asked or split == "train") and not images[split]:
                raise ValueError(f"no image is left in split {split!r}: {more_images(split, data.source)}")
    elif not images.total():
        raise ValueError(f"no image of data.root={data.root} can be used: see rejected.parquet in {data.shards}")


def _plans(items: list[Item], data: DataConfig) -> list[dict]:
    """What each shard is made of: {"file", "items"}. A split is shuffled once, so that a row group is a random mix."""
    plans = []
    for split in SPLITS:
        mixed = [vars(item) for item in items if item.split == split]
        random.Random(f"{data.seed}/{split}").shuffle(mixed)
        for k, part in enumerate(batched(mixed, data.images_per_shard)):
            plans.append({"file": f"{split}-{k:05d}.parquet", "items": part})
    return plans


def _digest(plan: dict, data: DataConfig) -> str:
    """Of everything that decides a shard's content: the items, the settings, and size and time of the files."""
    root = open_folder(data.root) if data.root else None
    paths = [item["ref"][key] for item in plan["items"] for key in ("file", "labels") if key in item["ref"]]
    infos = root.get_file_info(paths) if root else []
    stamps = [(info.size, info.mtime_ns) for info in infos]
    made_by = {k: v for k, v in asdict(data).items() if k not in _NOT_IN_A_SHARD}
    return hashlib.sha256(json.dumps([SCHEMA_VERSION, made_by, plan["items"], stamps]).encode()).hexdigest()


def _make_all(plans: list[dict], data: DataConfig, parallel: bool) -> list[ShardInfo]:
    """The info of every shard, in the order of `plans`, with a line of progress each."""
    infos: dict[str, Any] = {}
    start, fresh, planned = time.monotonic(), 0, sum(len(plan["items"]) for plan in plans)
    left = planned
    sizes = {plan["file"]: len(plan["items"]) for plan in plans}
    for info in _in_ray(plans, data) if parallel else (_make(plan, data) for plan in plans):
        infos[info["file"]] = info
        left -= sizes[info["file"]]
        fresh += 0 if info["reused"] else sizes[info["file"]]
        rate = fresh / (time.monotonic() - start)
        pace = (
            "kept from an earlier run"
            if info["reused"]
            else f"{rate:.{0 if rate > 9 else 1}f} images/s, about {left / rate:.0f} s left"
        )
        print(f"{info['file']}: {info['images']} images, shard {len(infos)} of {len(plans)}, {pace}", flush=True)
    return [infos[plan["file"]] for plan in plans]


def _in_ray(plans: list[dict], data: DataConfig) -> Iterator[dict]:
    """`_make` as one Ray Data task a shard, as they finish. JSON, because Arrow would give every item the keys of all."""
    import ray.data

    from geodistill.cluster import quiet_data

    quiet_data()
    data = replace(data, shards=absolute_path(data.shards))  # a worker has another working directory
    rows = [{"plan": json.dumps(plan)} for plan in plans]
    shards = ray.data.from_items(rows, override_num_blocks=len(rows))
    made = shards.map(lambda row: {"info": json.dumps(_make(json.loads(row["plan"]), data))}, num_cpus=0.5)
    return (json.loads(row["info"]) for row in made.iter_rows())


def _make(plan: dict, data: DataConfig) -> dict:
    """The shard of a plan: kept when an earlier run made it from the same items, written otherwise."""
    files, note = open_folder(data.shards, create=True), Path(plan["file"]).with_suffix(".json").name
    digest = _digest(plan, data)
    if exists(files, note) and exists(files, plan["file"]):
        info = read_json(files, note)
        if info["digest"] == digest and info["sha256"] == sha256_of(files, plan["file"]):
            return info | {"reused": True}
    items = [Item(**item) for item in plan["items"]]
    shard = write_shard(open_source(data), items, data.shards, plan["file"], data.images_per_group)
    write_json(files, note, {**shard, "digest": digest})
    return {**shard, "reused": False}


def _duplicates(infos: list[ShardInfo], data: DataConfig) -> tuple[list[ShardInfo], list[Copy], int]:
    """(infos, images that are there twice, how many were left out): with data.duplicates=remove none leaks any more."""
    images = [Fingerprint(_split(info), name, sha, int(phash, 16)) for info in infos for name, sha, phash in info["fingerprints"]]
    copies = find_copies(images, data.duplicate_bits)
    files = open_folder(data.shards)
    with writing(files, "duplicates.parquet") as stream:
        pq.write_table(pa.Table.from_pylist([asdict(copy) for copy in copies], DUPLICATES), stream)
    if data.duplicates != "remove":
        return infos, copies, 0
    leaks = {(copy.split, copy.id) for copy in copies if copy.leaks}
    kept = []
    for info in infos:
        ids = {name for name, *_ in info["fingerprints"] if (_split(info), name) in leaks}
        kept.append(leave_out(data.shards, info, ids, data.images_per_group) if ids else info)
    return kept, copies, len(leaks)


def _split(info: ShardInfo) -> str:
    return info["file"].rpartition("-")[0]


def _total(split: str, infos: list[ShardInfo]) -> dict:
    """A split's part of the manifest."""
    shards = [info for info in infos if info["file"].startswith(f"{split}-")]
    tasks = sum((Counter(shard["tasks"]) for shard in shards), Counter())
    left_out = ("rejected", "lost", "fingerprints")
    return {
        "images": sum(shard["images"] for shard in shards),
        "conversations": sum(shard["conversations"] for shard in shards),
        "tasks": dict(sorted(tasks.items())),
        "shards": [{k: v for k, v in shard.items() if k in ShardInfo.__annotations__ and k not in left_out} for shard in shards],
    }


def _general(text: str) -> str:
    """A reason or field without what is particular to one record, so that reasons can be counted."""
    return re.sub(r"\{.*\}|'[^']*'|\([^()]*\)|-?\d+", "*", text)


def _print_summary(manifest: dict, rejected: list[dict]) -> None:
    for split, part in manifest["splits"].items():
        tasks = ", ".join(f"{task} {count}" for task, count in part["tasks"].items())
        print(f"{split}: {part['images']} images, {part['conversations']} conversations ({tasks})")
    reasons = Counter((_general(bad["field"]), _general(bad["reason"])) for bad in rejected)
    for what, count in manifest["duplicates"].items():
        print(f"duplicates, {what}: {count}")
    if manifest["left_out"]:
        print(f"left out of training and validation: {manifest['left_out']} images that are held out as well")
    print(f"set aside: {len(rejected)}")
    for (field, reason), count in reasons.most_common(20):
        print(f"  {count} x {field}: {reason}", flush=True)


def _save_tokenizer(config: Config, manifest: dict) -> None:
    """Learn the tokenizer of the run's small models from the training texts, questions and known answers.

    There is nothing to learn where the run starts from a teacher that brings one, or from a data set for tests alone.
    """
    if config.teacher.model.init or not any(manifest["splits"].get(split, {}).get("images") for split in ("train", "unlabelled")):
        return
    from geodistill.models.assemble import new_tokenizer

    texts = (
        text
        for split in ("train", "unlabelled")
        for group in groups(manifest, split)
        for record in read_group(config.data.shards, group, ["conversations"])
        for conversation in record.conversations
        for turn in conversation.turns
        for text in turn
        if text is not None
    )
    tokenizer = new_tokenizer(texts, config.data.vocabulary, config.system)
    print(f"tokenizer: {len(tokenizer)} tokens", flush=True)
    with written(f"{config.data.shards}/tokenizer") as folder:
        tokenizer.save_pretrained(folder)
