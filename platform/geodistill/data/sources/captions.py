"""Caption sets in Karpathy's JSON: RSICD, UCM-Captions, Sydney-Captions: dataset_rsicd.json over a folder of images.

{"images": [{"filename", "split", "sentences": [{"raw"}, ...]}, ...]}. In training every caption is an answer of its own;
a test image has its first one as the answer and all of them as references.
"""

from collections.abc import Iterator

from geodistill.config import DataConfig
from geodistill.data.record import BadRecord, ImageRecord
from geodistill.data.sources.base import ImageIndex, Item, Root, annotations_json, bad_item, clean, new_record, read_image
from geodistill.data.sources.class_folders import caption_conversations

_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


class Captions:
    def __init__(self, data: DataConfig):
        self.data, self.root = data, Root(data)

    def items(self) -> list[Item]:
        """One item an image. ValueError: no such JSON file below data.root."""
        images = ImageIndex(self.root.list())
        path = self.data.annotations or next(iter(self.root.list((".json",))), "")
        if not path:
            raise ValueError(f"no JSON file below data.root={self.data.root}; set data.root to the folder of dataset_rsicd.json")
        raw = annotations_json(self.data, self.root) if self.data.annotations else self.root.json(path)
        entries = raw.get("images") if isinstance(raw, dict) else None
        if not isinstance(entries, list) or not entries:
            raise ValueError(f'{path} must hold {{"images": [...]}}; name the right file in data.annotations')
        found = []
        for i, entry in enumerate(entries):
            entry = entry if isinstance(entry, dict) else {}
            name, split = clean(entry.get("filename")), _SPLITS.get(clean(entry.get("split")), "")
            said = entry.get("sentences")
            captions = [clean(s.get("raw")) for s in said if isinstance(s, dict)] if isinstance(said, list) else []
            captions = [text for text in captions if text]
            try:
                for field, good in (("filename", name), ("split", split), ("sentences", captions)):
                    if not good:
                        raise BadRecord(name or f"images[{i}]", field, "is missing or empty")
                found.append(Item(split, name, {"file": images.find(name), "captions": captions}))
            except ValueError as error:
                bad = error if isinstance(error, BadRecord) else BadRecord(name, "filename", str(error))
                found.append(bad_item(self.data, path, bad, split or "train"))
        return found

    def make(self, item: Item) -> Iterator[ImageRecord]:
        """One image and its captions. Raises BadRecord."""
        image, width, height = read_image(self.root, item, self.data.bands)
        yield new_record(self.data, item, image, width, height, caption_conversations(item.ref["captions"], item.split))
