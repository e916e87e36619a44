"""Parquet shards of ImageRecords and their manifest: written by `prepare`, read by everything else.

<shards>/train-00000.parquet   images_per_shard images at most, in row groups of images_per_group: a random mix of the split
         train-00000.json      what is in it, and a digest of what it was made from: an interrupted `prepare` goes on here
         rejected.parquet      records that were set aside: file, record, field, reason
         duplicates.parquet    images that are there twice, within a split or across
         preview.html          a look at it
         tokenizer/            learned from the training text, where teacher.model.init does not bring one
         manifest.json         written last: its presence means that the data set is whole
"""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from geodistill.data.duplicates import fingerprint
from geodistill.data.files import exists, open_folder, read_json, retried, sha256_of, writing
from geodistill.data.record import SCHEMA, SCHEMA_VERSION, BadRecord, ImageRecord, NothingToAsk, validate
from geodistill.data.sources import Item, Source

MANIFEST = "manifest.json"


class ShardInfo(TypedDict):
    """What a shard holds. groups: images per row group; lost: raw records that the rejected ones stand for.

    fingerprints: [id, sha256 of the image, perceptual hash as hexadecimal text] of each image.
    """

    file: str
    bytes: int
    images: int
    conversations: int
    tasks: dict[str, int]
    groups: list[int]
    sha256: str
    rejected: list[dict[str, str]]
    lost: int
    fingerprints: list[list[str]]


@dataclass(frozen=True)
class Group:
    """Row group number `index` of a shard, the unit of reading. file: relative to the shards' folder."""

    file: str
    index: int
    images: int


def write_shard(source: Source, items: Iterable[Item], folder: str | Path, name: str, images_per_group: int) -> ShardInfo:
    """Make, check and write the records of `items` to the Parquet file folder/name; set bad ones aside, whatever is wrong."""
    files = open_folder(folder, create=True)
    tasks: Counter[str] = Counter()
    counts: list[int] = []
    rejected: list[dict[str, str]] = []
    lost = 0
    background: set[str] = set()
    fingerprints: list[list[str]] = []

    def good_rows() -> Iterator[pa.Table]:
        nonlocal lost
        for item in items:
            made = 0
            for row in rows_of(item):
                made += 1
                yield row
            lost += 0 if made or item.id in background else item.records

    def rows_of(item: Item) -> Iterator[pa.Table]:
        try:
            for found in source.make(item):
                try:
                    if isinstance(found, BadRecord):
                        raise found
                    row = pa.Table.from_pylist([validate(found).to_row()], SCHEMA)
                except BadRecord as bad:  # one part of an image, such as a tile or an object
                    set_aside(item, bad)
                else:
                    tasks.update(conversation.task for conversation in found.conversations)
                    fingerprints.append(fingerprint(found))
                    yield row
        except Exception as error:  # one image must never stop the others, and image readers raise nearly anything
            unforeseen = BadRecord(item.id, "record", f"cannot be made ({type(error).__name__}: {error})")
            set_aside(item, error if isinstance(error, BadRecord) else unforeseen)

    def set_aside(item: Item, bad: BadRecord) -> None:
        if isinstance(bad, NothingToAsk):
            background.add(item.id)
        file = str(item.ref.get("file", ""))
        rejected.append({"file": file, "record": bad.record, "field": bad.field, "reason": bad.reason})

    with _writer(files, name) as writer:
        for rows in batched(good_rows(), images_per_group):
            writer.write_table(pa.concat_tables(rows).combine_chunks(), row_group_size=images_per_group)
            counts.append(len(rows))
    return {
        "file": name,
        "bytes": files.get_file_info(name).size,
        "images": sum(counts),
        "conversations": tasks.total(),
        "tasks": dict(sorted(tasks.items())),
        "groups": counts,
        "sha256": sha256_of(files, name),
        "rejected": rejected,
        "lost": lost,
        "fingerprints": fingerprints,
    }


@contextmanager
def _writer(files: fs.FileSystem, name: str) -> Iterator[pq.ParquetWriter]:
    """A Parquet file of records, which appears whole or not at all."""
    with (
        writing(files, name) as stream,
        pq.ParquetWriter(stream, SCHEMA, compression="zstd", use_dictionary=False, write_statistics=False) as writer,
    ):
        yield writer


def leave_out(folder: str | Path, info: ShardInfo, ids: set[str], images_per_group: int) -> ShardInfo:
    """Write a shard again without the images `ids`; returns what it holds then."""
    files = open_folder(folder)
    with files.open_input_file(info["file"]) as stream:
        table = pq.read_table(stream)
    table = table.filter(pa.array([name not in ids for name in table["id"].to_pylist()]))
    with _writer(files, info["file"]) as writer:
        writer.write_table(table.combine_chunks(), row_group_size=images_per_group)
    tasks = Counter(conversation["task"] for row in table["conversations"].to_pylist() for conversation in row)
    return {
        **info,
        "bytes": files.get_file_info(info["file"]).size,
        "images": len(table),
        "conversations": tasks.total(),
        "tasks": dict(sorted(tasks.items())),
        "groups": [min(images_per_group, len(table) - at) for at in range(0, len(table), images_per_group)],
        "sha256": sha256_of(files, info["file"]),
        "fingerprints": [found for found in info["fingerprints"] if found[0] not in ids],
    }


def batched(rows: Iterable, size: int) -> Iterator[list]:
    rows = iter(rows)
    return iter(lambda: list(islice(rows, size)), [])


def more_images(split: str, source: str) -> str:
    if source == "synthetic":
        return f"raise data.{split}"
    if split == "train":
        return "add images or lower data.val_fraction, data.test_fraction or data.unlabelled_fraction"
    if split == "unlabelled":
        return "raise data.unlabelled_fraction, or set distill.train.splits=[train]"
    if source in ("class_folders", "llava"):
        return f"add images or raise data.{split}_fraction"
    return (
        f"its published splits have none; choose another with evaluate.split, or raise data.{split}_fraction where there are none"
    )


def load_manifest(folder: str | Path, need: Iterable[str] = ()) -> dict:
    """The manifest of a finished data set. Raises ValueError, with the remedy, when it or a split of `need` is missing."""
    files = open_folder(folder)
    if not exists(files, MANIFEST):
        raise ValueError(f"{folder}/{MANIFEST} does not exist: run jobs/prepare.py with the same --config and overrides first")
    manifest = read_json(files, MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{folder}/{MANIFEST} has schema version {manifest.get('schema_version')}, this program reads "
            f"{SCHEMA_VERSION}: run jobs/prepare.py again with another run= or data.shards="
        )
    for split in need:
        if not manifest["splits"].get(split, {}).get("images"):
            raise ValueError(
                f"the shards in {folder} hold no image in split {split!r} (they have {', '.join(manifest['splits'])}): "
                f"{more_images(split, manifest['source'])}, and run jobs/prepare.py with another run= or data.shards="
            )
    return manifest


def groups(manifest: dict, split: str) -> list[Group]:
    """The row groups of a split, in the order of the files."""
    shards = manifest["splits"].get(split, {"shards": []})["shards"]
    return [Group(shard["file"], i, images) for shard in shards for i, images in enumerate(shard["groups"])]


@functools.lru_cache(maxsize=256)
def _footer(folder: str, name: str, size: int, written: int) -> pq.FileMetaData:
    """The footer of a shard, parsed once in a process; size and time of writing tell a new file of the same name."""
    with open_folder(folder).open_input_file(name) as stream:
        return pq.read_metadata(stream)


def read_group(folder: str | Path, group: Group, columns: list[str] | None = None) -> list[ImageRecord]:
    """The records of a row group, in the order of the file. `columns`: read no others (the rest is empty)."""
    empty = {"id": "", "image": b"", "width": 0, "height": 0, "sensor": "", "conversations": []}
    files = open_folder(folder)

    def read() -> list[dict]:
        info = files.get_file_info(group.file)
        with files.open_input_file(group.file) as stream:
            footer = _footer(str(folder), group.file, info.size, info.mtime_ns)
            table = pq.ParquetFile(stream, metadata=footer).read_row_group(group.index, columns, use_threads=False)
        return table.to_pylist()

    return [ImageRecord.from_row(empty | row) for row in retried(read)]
