"""What the sources share: the item, the split by hash, reading of images and annotation files."""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from geodistill.config import DataConfig
from geodistill.data.record import BadRecord, ImageRecord

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")


@dataclass(frozen=True)
class Item:
    """One image still to be read. `ref`: JSON-able, all that `make` needs; "file" is relative to data.root.

    An item whose ref has a "reason" was found bad while listing: `make` raises it, so that it is counted like any other.
    """

    split: str
    id: str
    ref: dict[str, Any]
    records: int = 1  # how many records of the raw data set it stands for


class Source(Protocol):
    """A raw data set. `items` lists it without decoding (ValueError: nothing to read); `make` may run in another process."""

    def __init__(self, data: DataConfig): ...

    def items(self) -> list[Item]: ...

    def make(self, item: Item) -> ImageRecord: ...


def split_of(data: DataConfig, image: str) -> str:
    """The split of an image, from a hash of (data.seed, image id): other images do not change it."""
    digest = hashlib.sha256(f"{data.seed}/{image}".encode("utf-8", "surrogatepass")).digest()
    held_out, hidden = (int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8))
    if held_out < data.test_fraction:
        return "test"
    if held_out < data.test_fraction + data.val_fraction:
        return "val"
    return "unlabelled" if hidden < data.unlabelled_fraction else "train"


def bad_item(data: DataConfig, file: Path | str, bad: BadRecord) -> Item:
    """The item of a record that is known to be bad before its image is read."""
    return Item(split_of(data, bad.record), bad.record, {"file": str(file), "field": bad.field, "reason": bad.reason})


def read_image(root: Path, item: Item) -> tuple[bytes, int, int]:
    """(encoded bytes, width, height in pixels) of an item's file. Raises BadRecord; pixels are left to `record.validate`."""
    if "reason" in item.ref:
        raise BadRecord(item.id, item.ref["field"], item.ref["reason"])
    try:
        data = (root / item.ref["file"]).read_bytes()
    except OSError as error:
        raise BadRecord(item.id, "image", f"cannot be read ({error.strerror})") from error
    if not data:
        raise BadRecord(item.id, "image", "is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return data, image.width, image.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadRecord(item.id, "image", "cannot be decoded (not an image that Pillow knows)") from error


def root_of(data: DataConfig) -> Path:
    """data.root, or ValueError with the remedy."""
    root = Path(data.root)
    if not root.is_dir():
        raise ValueError(f"data.root={data.root} is not a folder; set data.root to the folder of the raw data set")
    return root


def read_annotations(data: DataConfig) -> tuple[Path, list]:
    """(path, records) of the JSON file data.annotations, absolute or below data.root, or ValueError with the remedy."""
    path = Path(data.root) / data.annotations
    if not path.is_file():
        raise ValueError(
            f"data.annotations={data.annotations}: {path} does not exist; give a path that is absolute or below data.root"
        )
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"data.annotations={data.annotations}: {path} is not JSON ({error}); get the file again") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"data.annotations={data.annotations}: {path} must hold a JSON list with at least one record")
    return path, records


def clean(value: Any) -> str:
    """A text or number of an annotation on one line; "" for anything else."""
    return " ".join(str(value).split()) if isinstance(value, str | int | float) else ""
