"""COCO: JSON files of images, annotations and categories over image files; `bbox` [x, y, w, h] in pixels.

Read are data.annotations, or every instances_*.json below data.root, or every JSON file there that holds the three lists. Of
several files the name (instances_val2017.json), or else a folder (valid/_annotations.coco.json), says which split they list; of
one file the folders of its images do; otherwise a hash does. Where the splits have no val, a part of train is
(data.val_fraction). A `segmentation` polygon of four points is read as an oriented box. The annotations of a crowd are left out.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from geodistill.data.record import BadRecord
from geodistill.data.sources.base import ImageIndex, Item, annotations_json, bad_file, bad_item, clean, folder_split, split_of
from geodistill.data.sources.detection import DetectionSource, Object, kind_of

LISTS = ("images", "annotations", "categories")


class Coco(DetectionSource):
    def items(self) -> list[Item]:
        """One item an image, with its objects. ValueError: there is no COCO JSON."""
        named, every = self.data.annotations, self.root.list((".json",))
        instances = [path for path in every if path.rpartition("/")[2].startswith("instances")]
        files = [named] if named else instances or every
        if not files:
            raise ValueError(f"no JSON file below data.root={self.data.root}; name it in data.annotations")
        raws: dict[str, dict] = {}
        unread: list[Item] = []
        for file in files:
            try:
                raw = annotations_json(self.data, self.root) if named else self.root.json(file)
                if isinstance(raw, dict) and all(isinstance(raw.get(name), list) for name in LISTS):
                    raws[file] = raw
                elif named or instances:
                    raise ValueError(f"{file} holds no lists {', '.join(LISTS)}; name the right file in data.annotations")
            except ValueError as error:
                unread.append(bad_file(self.data, file, error))
        entries = [entry for raw in raws.values() for entry in raw["images"] if isinstance(entry, dict)]
        images = ImageIndex(self.root.list(), (clean(entry.get("file_name")) for entry in entries))
        splits = {file: named_split(file) if len(raws) > 1 else "" for file in raws}
        if splits and "val" not in splits.values():
            splits = {file: "train or val" if split == "train" else split for file, split in splits.items()}
        listed: dict[str, str] = {}
        found = [item for file, raw in raws.items() for item in self._items(file, raw, images, splits[file], listed)]
        if not found:
            none = f"no JSON file below data.root={self.data.root} lists images; name one in data.annotations"
            raise ValueError(unread[0].ref["reason"] if unread else none)
        return found + unread

    def _split(self, image: str, named: str) -> str:
        if named == "train or val":  # the hash that deals out a test as well, over the rest of it
            return split_of(replace(self.data, test_fraction=0.0), image)
        return named or folder_split(image) or split_of(self.data, image)

    def _items(self, file: str, raw: Any, images: ImageIndex, split: str, listed: dict[str, str]) -> list[Item]:
        kinds = {str(c.get("id")): kind_of(clean(c.get("name"))) for c in raw["categories"] if isinstance(c, dict)}
        objects: dict[str, list[dict]] = defaultdict(list)
        for one in raw["annotations"]:
            one = one if isinstance(one, dict) else {}
            if not one.get("iscrowd"):
                kept = {"kind": kinds.get(str(one.get("category_id")), "")} | {k: one.get(k) for k in ("bbox", "segmentation")}
                objects[str(one.get("image_id"))].append(kept)
        found = []
        for i, entry in enumerate(raw["images"]):
            entry = entry if isinstance(entry, dict) else {}
            name, mine = clean(entry.get("file_name")), objects.pop(str(entry.get("id")), [])
            try:
                if not name:
                    raise BadRecord(f"images[{i}]", "file_name", "is missing or empty")
                image = images.find(name)
                if image in listed:
                    raise BadRecord(name, "file_name", f"{image} is listed twice, in {listed[image]} too: its first list stands")
                listed[image] = file
                found.append(Item(self._split(image, split), image, {"file": image, "objects": mine}))
            except ValueError as error:
                bad = error if isinstance(error, BadRecord) else BadRecord(name, "file_name", str(error))
                found.append(bad_item(self.data, file, bad))
        for image, left in objects.items():
            reason = f"{image} is in none of the images: {len(left)} annotations are lost"
            found.append(bad_item(self.data, file, BadRecord(f"image {image}", "image_id", reason)))
        return found

    def objects(self, item: Item, width: int, height: int) -> Iterator[Object | BadRecord]:
        """The objects of an image; one without a category or a box is set aside."""
        for i, one in enumerate(item.ref["objects"]):
            shapes = one["segmentation"]
            shape = shapes[0] if isinstance(shapes, list) and shapes else None
            try:
                if not one["kind"]:
                    raise ValueError("category_id is not in categories")
                if isinstance(shape, list) and len(shape) == 8:
                    yield Object(one["kind"], tuple(zip(map(float, shape[::2]), map(float, shape[1::2]), strict=True)))
                    continue
                x, y, w, h = (float(v) for v in one["bbox"])
                yield Object(one["kind"], ((x, y), (x + w, y), (x + w, y + h), (x, y + h)))
            except (TypeError, ValueError) as error:
                yield BadRecord(item.id, f"annotations[{i}]", f"bbox {one['bbox']} cannot be read ({error})")


def named_split(file: str) -> str:
    """The split that the name of a JSON file, or else a folder above it, tells: "instances_train2017.json" -> "train"; or ""."""
    words = re.split(r"[\W_\d]+", file.rpartition("/")[2].lower())
    return folder_split("/".join([*words, ""])) or folder_split(file)
