"""FloodNet VQA: JSON files {"0": {"Image_ID", "Question", "Ground_Truth", "Question_Type"}, ...} over image files.

The split is read from the file's name (Training Question.json, Valid ..., Test ...). An answer may be a number.
"""

from collections.abc import Iterator

from geodistill.config import DataConfig
from geodistill.data.record import BadRecord, Conversation, ImageRecord
from geodistill.data.sources.base import ImageIndex, Item, Root, bad_item, clean, new_record, read_image, split_of
from geodistill.language import SHORT_ANSWER

_SPLITS = {"train": "train", "valid": "val", "test": "test"}


class FloodNet:
    def __init__(self, data: DataConfig):
        self.data, self.root = data, Root(data)

    def items(self) -> list[Item]:
        """One item an image, with all its questions. ValueError: no question file below data.root."""
        images = ImageIndex(self.root)
        found: dict[tuple[str, str], list[list[str]]] = {}
        bad: list[Item] = []
        files = [path for path in self.root.list((".json",)) if "question" in path.rpartition("/")[2].lower()]
        if not files:
            raise ValueError(f"no ...Question.json below data.root={self.data.root}; set data.root to FloodNet's VQA folder")
        for path in files:
            name = path.rpartition("/")[2].lower()
            fixed = next((split for key, split in _SPLITS.items() if name.startswith(key)), "")
            raw = self.root.json(path)
            for key, entry in raw.items() if isinstance(raw, dict) else enumerate(raw):
                entry = entry if isinstance(entry, dict) else {}
                texts = {k: clean(entry.get(k)) for k in ("Image_ID", "Question", "Ground_Truth", "Question_Type")}
                empty = [k for k in ("Image_ID", "Question", "Ground_Truth") if not texts[k]]
                try:
                    if empty:
                        raise BadRecord(f"{name}[{key}]", empty[0], "is missing or empty")
                    image = images.find(texts["Image_ID"])
                except ValueError as error:
                    reason = error if isinstance(error, BadRecord) else BadRecord(f"{name}[{key}]", "Image_ID", str(error))
                    bad.append(bad_item(self.data, path, reason, fixed))
                else:
                    answer, kind = texts["Ground_Truth"].lower(), texts["Question_Type"].lower()
                    found.setdefault((fixed or split_of(self.data, image), image), []).append([texts["Question"], answer, kind])
        return [Item(s, image, {"file": image, "questions": q}, len(q)) for (s, image), q in sorted(found.items())] + bad

    def make(self, item: Item) -> Iterator[ImageRecord]:
        """One image and its questions. Raises BadRecord."""
        image, width, height = read_image(self.root, item, self.data.bands)
        found = [Conversation("vqa", [(f"{q} {SHORT_ANSWER}", a)], category) for q, a, category in item.ref["questions"]]
        yield new_record(self.data, item, image, width, height, found)
