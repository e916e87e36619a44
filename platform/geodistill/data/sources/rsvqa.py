"""RSVQA, low and high resolution, as published: <prefix>_split_<split>_{questions,answers,images}.json over image files.

LR_split_train_questions.json, ... with <img_id>.tif; USGS_split_train_*, USGS_split_test_* and USGS_split_test_phili_* with
<img_id>.png. The three files are joined by id; what is not "active" is left out, as in the published loader. Both test
sets of the high resolution become the split test, told apart by the category: "presence", "phili presence".
"""

import re
from collections.abc import Iterator

from geodistill.config import DataConfig
from geodistill.data.record import BadRecord, Conversation, ImageRecord
from geodistill.data.sources.base import ImageIndex, Item, Root, bad_item, clean, new_record, read_image
from geodistill.language import SHORT_ANSWER

_FILE = re.compile(r"(?P<stem>.*_split_(?P<split>train|val|test)(?P<part>_phili)?)_questions\.json")
_TYPES = {"comp": "comparison"}


class Rsvqa:
    def __init__(self, data: DataConfig):
        self.data, self.root = data, Root(data)

    def items(self) -> list[Item]:
        """One item an image and split, with all its questions. ValueError: no split file below data.root."""
        images = ImageIndex(self.root)
        found: list[Item] = []
        for path in self.root.list((".json",)):
            match = _FILE.fullmatch(path)
            if match:
                found += self._split(match["stem"], match["split"], match["part"] or "", images)
        if not found:
            raise ValueError(
                f"no LR_split_train_questions.json or the like below data.root={self.data.root}; set data.root to the folder "
                "that holds the published JSON files and the images"
            )
        return found

    def _split(self, stem: str, split: str, part: str, images: ImageIndex) -> list[Item]:
        asked = self._entries(f"{stem}_questions.json", "questions")
        answers = self._entries(f"{stem}_answers.json", "answers")
        shown = self._entries(f"{stem}_images.json", "images")
        by_image: dict[int, list[list[str]]] = {}
        bad: list[Item] = []
        for number, question in asked.items():
            texts = [clean(answers[i].get("answer")) for i in question.get("answers_ids", []) if i in answers]
            where = f"{stem}_questions.json"
            image = question.get("img_id")
            if image not in shown:
                reason = BadRecord(f"question {number}", "img_id", f"{image} is no active image of {stem}_images.json")
                bad.append(bad_item(self.data, where, reason, split))
            elif not texts or not texts[0]:
                reason = BadRecord(f"question {number}", "answers_ids", f"has no active answer in {stem}_answers.json")
                bad.append(bad_item(self.data, where, reason, split))
            else:
                kind = clean(question.get("type"))
                category = f"{part.strip('_')} {_TYPES.get(kind, kind)}".strip()
                by_image.setdefault(image, []).append([clean(question.get("question")), texts[0], category])
        found = []
        for image, questions in sorted(by_image.items()):
            name = f"{stem.rpartition('/')[2]}/{image}"
            try:
                ref = {"file": images.find(str(image)), "questions": questions}
            except ValueError as error:
                ref = {"file": f"{stem}_images.json", "field": f"images[{image}]", "reason": str(error)}
            found.append(Item(split, name, ref, len(questions)))
        return found + bad

    def _entries(self, path: str, key: str) -> dict[int, dict]:
        """The active entries of a file, by id."""
        raw = self.root.json(path)
        listed = raw.get(key) if isinstance(raw, dict) else None
        if not isinstance(listed, list):
            raise ValueError(f'{self.root.uri}/{path} must hold {{"{key}": [...]}}; get the file again')
        return {entry["id"]: entry for entry in listed if isinstance(entry, dict) and "id" in entry and entry.get("active")}

    def make(self, item: Item) -> Iterator[ImageRecord]:
        """One image and its questions. Raises BadRecord."""
        image, width, height = read_image(self.root, item, self.data.bands)
        found = [Conversation("vqa", [(f"{q} {SHORT_ANSWER}", a)], category) for q, a, category in item.ref["questions"]]
        yield new_record(self.data, item, image, width, height, found)
