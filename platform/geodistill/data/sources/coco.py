"""COCO: JSON files of images, annotations and categories over image files; `bbox` [x, y, w, h] in pixels.

Read are data.annotations, or every instances_*.json below data.root, or the first JSON file there. A folder of the image
named train, val or test (train2017) gives the split; otherwise a hash does. A `segmentation` polygon of four points is read
as an oriented box. The annotations of a crowd are left out.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from geodistill.data.record import BadRecord
from geodistill.data.sources.base import ImageIndex, Item, annotations_json, bad_file, bad_item, clean, split_of
from geodistill.data.sources.detection import DetectionSource, Object, folder_split, kind_of


class Coco(DetectionSource):
    def items(self) -> list[Item]:
        """One item an image, with its objects. ValueError: there is no COCO JSON."""
        named, every = self.data.annotations, self.root.list((".json",))
        files = [named] if named else [p for p in every if p.rpartition("/")[2].startswith("instances")] or every[:1]
        if not files:
            raise ValueError(f"no JSON file below data.root={self.data.root}; name it in data.annotations")
        images = ImageIndex(self.root.list())
        found: list[Item] = []
        unread: list[Item] = []
        for file in files:
            try:
                found += self._items(file, annotations_json(self.data, self.root) if named else self.root.json(file), images)
            except ValueError as error:
                unread.append(bad_file(self.data, file, error))
        if not found:
            raise ValueError(
                unread[0].ref["reason"] if unread else f"{files[0]} lists no image; name another in data.annotations"
            )
        return found + unread

    def _items(self, file: str, raw: Any, images: ImageIndex) -> list[Item]:
        if not isinstance(raw, dict) or not all(isinstance(raw.get(k), list) for k in ("images", "annotations", "categories")):
            raise ValueError(f"{file} holds no lists images, annotations and categories; name the right file in data.annotations")
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
                ref = {"file": image, "objects": mine}
                found.append(Item(folder_split(image) or split_of(self.data, image), image, ref))
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
