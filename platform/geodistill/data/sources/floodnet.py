"""FloodNet VQA: JSON files {"0": {"Image_ID", "Question", "Ground_Truth", "Question_Type"}, ...} over image files.

"Training Question.json", "Valid Question.json", "Test Question.json" over Train_Image/, Valid_Image/, Test_Image/; an answer
may be a number. The split is that of the file's name. As published only the training file has answers: then a hash deals its
images out, and the questions of the others become the split unlabelled.
"""

from collections.abc import Iterator
from typing import Any

from geodistill.config import DataConfig
from geodistill.data.record import BadRecord, Conversation, ImageRecord
from geodistill.data.sources.base import ImageIndex, Item, Root, bad_file, bad_item, clean, new_record, read_image, split_of
from geodistill.language import SHORT_ANSWER

_SPLITS = {"train": "train", "valid": "val", "test": "test"}


class FloodNet:
    def __init__(self, data: DataConfig):
        self.data, self.root = data, Root(data)

    def items(self) -> list[Item]:
        """One item an image, with all its questions. ValueError: no question file can be read."""
        images = ImageIndex(self.root.list())
        files: dict[str, dict[Any, dict]] = {}
        bad: list[Item] = []
        for path in self.root.list((".json",)):
            if "question" in path.rpartition("/")[2].lower():
                try:
                    files[path] = self._entries(path)
                except ValueError as error:
                    bad.append(bad_file(self.data, path, error))
        if not files:
            why = f" can be read ({bad[0].ref['reason']})" if bad else ""
            raise ValueError(f"no ...Question.json below data.root={self.data.root}{why}; set data.root to FloodNet's VQA folder")
        answered = {path: any("Ground_Truth" in entry for entry in found.values()) for path, found in files.items()}
        by_name = any(answered[path] and self._split(path) in ("val", "test") for path in files)
        found: dict[tuple[str, str], list[list[str]]] = {}
        for path, entries in files.items():
            fixed = "unlabelled" if not answered[path] else self._split(path) if by_name else ""
            needed = ("Image_ID", "Question", "Ground_Truth")[: 3 if answered[path] else 2]
            for key, entry in entries.items():
                name = f"{path.rpartition('/')[2].lower()}[{key}]"
                texts = {k: clean(entry.get(k)) for k in ("Image_ID", "Question", "Ground_Truth", "Question_Type")}
                empty = [k for k in needed if not texts[k]]
                try:
                    if empty:
                        raise BadRecord(name, empty[0], "is missing or empty")
                    image = images.find(texts["Image_ID"])
                except ValueError as error:
                    wrong = error if isinstance(error, BadRecord) else BadRecord(name, "Image_ID", str(error))
                    bad.append(bad_item(self.data, path, wrong, fixed))
                else:
                    question = [texts["Question"], texts["Ground_Truth"].lower(), texts["Question_Type"].lower()]
                    found.setdefault((fixed or split_of(self.data, image), image), []).append(question)
        return [Item(s, image, {"file": image, "questions": q}, len(q)) for (s, image), q in sorted(found.items())] + bad

    def _entries(self, path: str) -> dict[Any, dict]:
        raw = self.root.json(path)
        listed = raw if isinstance(raw, dict) else dict(enumerate(raw)) if isinstance(raw, list) else None
        if listed is None:
            raise ValueError(f'{path} must hold {{"0": {{"Image_ID", ...}}, ...}}; get the file again')
        return {key: entry if isinstance(entry, dict) else {} for key, entry in listed.items()}

    @staticmethod
    def _split(path: str) -> str:
        name = path.rpartition("/")[2].lower()
        return next((split for key, split in _SPLITS.items() if name.startswith(key)), "")

    def make(self, item: Item) -> Iterator[ImageRecord]:
        """One image and its questions. Raises BadRecord."""
        image, width, height = read_image(self.root, item, self.data.bands)
        found = [Conversation("vqa", [(f"{q} {SHORT_ANSWER}", a)], category) for q, a, category in item.ref["questions"]]
        yield new_record(self.data, item, image, width, height, found)
