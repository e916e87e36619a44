"""What the sources share: the raw data's folder, local or s3://, the item, the split by hash, images and annotation files."""

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pyarrow import fs

from geodistill.config import DataConfig
from geodistill.data.files import exists, open_folder, read_json
from geodistill.data.imagery import displayable
from geodistill.data.record import BadRecord, Conversation, ImageRecord
from geodistill.language import SENSOR_TAGS

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
_SPLIT_FOLDER = re.compile(r"(train|val|test)(id|idation)?(\d{4})?")


@dataclass(frozen=True)
class Item:
    """One image file still to be read. `ref`: JSON-able, all that `make` needs; "file" is relative to data.root.

    An item whose ref has a "reason" was found bad while listing: `make` yields it, so that it is counted like any other.
    """

    split: str
    id: str
    ref: dict[str, Any]
    records: int = 1  # how many records of the raw data set it stands for


class Source(Protocol):
    """A raw data set. `items` lists it without decoding (ValueError: nothing to read); `make` may run in another process.

    `make` yields the records of one image file (several where it is cut into tiles), and a BadRecord for each part of it
    that cannot be used; it may also raise BadRecord where nothing of it can.
    """

    def __init__(self, data: DataConfig): ...

    def items(self) -> list[Item]: ...

    def make(self, item: Item) -> Iterator[ImageRecord | BadRecord]: ...


class Root:
    """The folder data.root. Paths are relative to it, with slashes; every access to raw data goes through here."""

    def __init__(self, data: DataConfig):
        """Raises ValueError where data.root is no folder."""
        self.uri, self.files = data.root, open_folder(data.root)
        try:
            there = self.files.get_file_info("").type == fs.FileType.Directory
        except OSError as error:
            raise ValueError(f"data.root={data.root} cannot be read ({error}); correct data.root or its credentials") from error
        if not there:
            raise ValueError(f"data.root={data.root} is not a folder; set data.root to the folder of the raw data set")

    def list(self, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> list[str]:
        """Every file with one of the suffixes (lower case), in order of path; hidden ones are left out."""
        wanted = tuple(suffixes)
        if "://" in self.uri:
            selector = fs.FileSelector("", allow_not_found=True, recursive=True)
            paths = [info.path for info in self.files.get_file_info(selector) if info.type != fs.FileType.Directory]
        else:  # pyarrow leaves out links that lead nowhere; they are to be set aside, with their reason
            top = Path(self.uri)
            found = os.walk(top, followlinks=True)
            paths = [Path(here, name).relative_to(top).as_posix() for here, _, names in found for name in names]
        return sorted(p for p in paths if p.lower().endswith(wanted) and not any(part.startswith(".") for part in p.split("/")))

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises OSError."""
        with self.files.open_input_stream(path) as stream:
            return stream.read()

    def text(self, path: str) -> str:
        """The text of a file, UTF-8 with or without a mark. Raises OSError, ValueError."""
        return self.read(path).decode("utf-8-sig")

    def json(self, path: str) -> Any:
        """The JSON of a file. Raises ValueError, with the remedy, where it is missing or broken."""
        try:
            return json.loads(self.text(path))
        except OSError as error:
            raise ValueError(f"{self.uri}/{path} does not exist; set data.root to the folder that holds it") from error
        except ValueError as error:
            raise ValueError(f"{self.uri}/{path} is not JSON ({error}); get the file again") from error


class ImageIndex:
    """Every image file below a root, found by its path or else by the stem of its name: published lists name images with
    other extensions or folders than the archives hold.

    names: all that will be looked for; an image that one of them names by its path is not taken for that of another folder.
    """

    def __init__(self, paths: Iterable[str], names: Iterable[str] = ()):
        self.paths = set(paths)
        self.named = {posixpath.normpath(name) for name in names} & self.paths
        self.stems: dict[str, list[str]] = {}
        for path in sorted(self.paths):
            self.stems.setdefault(Path(path).stem, []).append(path)

    def within(self, folders: Iterable[str]) -> "ImageIndex":
        """The images in a folder of one of these names (lower case), at any depth; all of them where there is none."""
        inside = [path for path in self.paths if not {part.lower() for part in path.split("/")[:-1]}.isdisjoint(folders)]
        return ImageIndex(inside) if inside else self

    def find(self, name: str) -> str:
        """The path below the root that is meant by `name`. Raises ValueError when there is none, or more than one."""
        exact = posixpath.normpath(name)
        if exact in self.paths:
            return exact
        wanted = Path(name)

        def likeness(path: str) -> tuple[bool, bool]:
            found = Path(path)
            return found.name == wanted.name, found.parent.name == wanted.parent.name

        def another(path: str) -> bool:
            found = Path(path)
            elsewhere = wanted.parent.name not in ("", "..", found.parent.name)
            splits = {folder_split(name), folder_split(path)} - {""}
            return len(splits) > 1 or (elsewhere and path in self.named)

        candidates = [path for path in self.stems.get(wanted.stem, []) if not another(path)]
        best = max(map(likeness, candidates), default=None)
        candidates = [path for path in candidates if likeness(path) == best]
        if not candidates:
            raise ValueError(f"{name!r} does not exist below data.root, with no other extension or folder either")
        if len(candidates) > 1:
            raise ValueError(f"{name!r} may be {candidates[0]!r} or {candidates[1]!r}")
        return candidates[0]


def folder_split(path: str) -> str:
    """The split that a folder above a file names (train, val, valid, validation, test, train2017, ...), or ""."""
    named = (_SPLIT_FOLDER.fullmatch(part.lower()) for part in path.split("/")[:-1])
    return next((match[1] for match in named if match), "")


def split_of(data: DataConfig, image: str) -> str:
    """The split of an image, from a hash of (data.seed, image id): other images do not change it."""
    digest = hashlib.sha256(f"{data.seed}/{image}".encode("utf-8", "surrogatepass")).digest()
    held_out, hidden = (int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8))
    if held_out < data.test_fraction:
        return "test"
    if held_out < data.test_fraction + data.val_fraction:
        return "val"
    return "unlabelled" if hidden < data.unlabelled_fraction else "train"


def bad_item(data: DataConfig, file: str, bad: BadRecord, split: str = "") -> Item:
    """The item of a record that is known to be bad before its image is read."""
    ref = {"file": file, "field": bad.field, "reason": bad.reason}
    return Item(split or split_of(data, bad.record), bad.record, ref)


def bad_file(data: DataConfig, file: str, error: Exception, split: str = "train") -> Item:
    """The item of a file of annotations that cannot be read."""
    return bad_item(data, file, BadRecord(file, "file", str(error)), split)


def read_image(root: Root, item: Item, bands: list[int] | None = None) -> tuple[bytes, int, int]:
    """(encoded bytes, width, height in pixels) of an item's file, 8 bits deep; `bands`: see `imagery.displayable`.

    Raises BadRecord; that every pixel decodes is left to `record.validate`.
    """
    if "reason" in item.ref:
        raise BadRecord(item.id, item.ref["field"], item.ref["reason"])
    try:
        data = root.read(item.ref["file"])
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise BadRecord(item.id, "image", f"cannot be read ({why})") from error
    if not data:
        raise BadRecord(item.id, "image", "is empty (0 bytes)")
    return displayable(data, item.id, bands or [])


def new_record(
    data: DataConfig, item: Item, image: bytes, width: int, height: int, conversations: list[Conversation]
) -> ImageRecord:
    """The record of an item: the data set's sensor, its tag before every question, and no answers in the split unlabelled."""
    if data.sensor != "optical":
        tag = SENSOR_TAGS[data.sensor]
        conversations = [replace(c, turns=[(f"{tag} {q}", a) for q, a in c.turns]) for c in conversations]
    if item.split == "unlabelled":
        conversations = [c.unlabelled() for c in conversations]
    return ImageRecord(item.id, image, width, height, conversations, data.sensor)


def annotations_json(data: DataConfig, root: Root) -> Any:
    """The JSON of the file data.annotations, absolute or below data.root. Raises ValueError with the remedy."""
    name = data.annotations
    folder, _, file = name.rpartition("/")
    files = open_folder(folder or "/") if "://" in name or name.startswith("/") else root.files
    file = name if files is root.files else file
    if not exists(files, file):
        raise ValueError(
            f"data.annotations={name}: {name} does not exist; give a path that is absolute or below data.root={root.uri}"
        )
    try:
        return read_json(files, file)
    except ValueError as error:
        raise ValueError(f"data.annotations={name} is not JSON ({error}); get the file again") from error


def read_annotations(data: DataConfig, root: Root) -> list:
    """The records of the JSON list data.annotations. Raises ValueError with the remedy."""
    records = annotations_json(data, root)
    if not isinstance(records, list) or not records:
        raise ValueError(f"data.annotations={data.annotations} must hold a JSON list with at least one record")
    return records


def clean(value: Any) -> str:
    """A text or number of an annotation on one line; "" for anything else."""
    return " ".join(str(value).split()) if isinstance(value, str | int | float) else ""
