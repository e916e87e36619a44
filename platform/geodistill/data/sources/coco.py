"""COCO: a JSON of images, annotations and categories (data.annotations) over image files; `bbox` [x, y, w, h] in pixels.

A `segmentation` polygon of four points is read as an oriented box. The annotations of a crowd are left out.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from geodistill.config import DataConfig
from geodistill.data.record import BadRecord
from geodistill.data.sources.base import ImageIndex, Item, bad_item, clean, split_of
from geodistill.data.sources.detection import DetectionSource, Object


class Coco(DetectionSource):
    def __init__(self, data: DataConfig):
        super().__init__(data)
        self.file = data.annotations or next(iter(self.root.list((".json",))), "")
        if not self.file:
            raise ValueError(f"no JSON file below data.root={data.root}; name it in data.annotations")

    def items(self) -> list[Item]:
        """One item an image, with its objects. ValueError: the file is no COCO JSON."""
        raw = self.root.json(self.file)
        if not isinstance(raw, dict) or not all(isinstance(raw.get(k), list) for k in ("images", "annotations", "categories")):
            raise ValueError(
                f"{self.file} holds no lists images, annotations and categories; name the right file in data.annotations"
            )
        kinds = {c.get("id"): clean(c.get("name")) for c in raw["categories"]}
        objects: dict[Any, list[dict]] = defaultdict(list)
        for one in raw["annotations"]:
            if not one.get("iscrowd"):
                kept = {"kind": kinds.get(one.get("category_id"), ""), "bbox": one.get("bbox"), "shape": one.get("segmentation")}
                objects[one.get("image_id")].append(kept)
        images, found = ImageIndex(self.root), []
        for i, entry in enumerate(raw["images"]):
            name = clean(entry.get("file_name"))
            try:
                if not name:
                    raise BadRecord(f"images[{i}]", "file_name", "is missing or empty")
                image = images.find(name)
                found.append(Item(split_of(self.data, image), image, {"file": image, "objects": objects[entry.get("id")]}))
            except ValueError as error:
                bad = error if isinstance(error, BadRecord) else BadRecord(name, "file_name", str(error))
                found.append(bad_item(self.data, self.file, bad))
        return found

    def objects(self, item: Item, width: int, height: int) -> Iterator[Object | BadRecord]:
        """The objects of an image; one without a category or a box is set aside."""
        for i, one in enumerate(item.ref["objects"]):
            shape = one["shape"][0] if isinstance(one["shape"], list) and one["shape"] else None
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
