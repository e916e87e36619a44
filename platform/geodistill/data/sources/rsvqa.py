"""RSVQA, low and high resolution, as published: <prefix>_split_<split>_{questions,answers,images}.json over image files.

LR_split_{train,val,test}_* with Images_LR/<img_id>.tif; USGS_split_{train,val,test,test_phili}_* with Data/<img_id>.tif. The
three files are joined by id; what is not "active" belongs to another split or was withdrawn, and is left out, as in the
published loader. Both test sets of the high resolution become the split test, told apart by an image's id:
"USGS_split_test_phili/<img_id>".
"""

import re
from collections.abc import Iterator

from geodistill.config import DataConfig
from geodistill.data.record import BadRecord, Conversation, ImageRecord
from geodistill.data.sources.base import ImageIndex, Item, Root, bad_file, bad_item, clean, new_record, read_image
from geodistill.language import SHORT_ANSWER

QUESTIONS = re.compile(r"(?P<stem>(.*/)?(?P<prefix>\w+)_split_(?P<split>train|val|test)(?P<part>_phili)?)_questions\.json")
FOLDERS = {"LR": ("images_lr", "lrben", "lr"), "USGS": ("data", "hrben", "hr")}  # where the images of a prefix lie, if there
TYPES = {"comp": "comparison"}


def entries(root: Root, path: str, key: str) -> dict[int, dict]:
    """The active entries of one of the JSON files, by id. Raises ValueError, with the remedy, where it is no such file."""
    raw = root.json(path)
    listed = raw.get(key) if isinstance(raw, dict) else None
    if not isinstance(listed, list):
        raise ValueError(f'{root.uri}/{path} must hold {{"{key}": [...]}}; get the file again')
    return {e["id"]: e for e in listed if isinstance(e, dict) and isinstance(e.get("id"), int) and e.get("active")}


def answer_of(question: dict, answers: dict[int, dict]) -> str:
    """The first active answer to a question; "" where there is none."""
    ids = question.get("answers_ids")
    found = (clean(answers[i].get("answer")) for i in ids if isinstance(i, int) and i in answers) if isinstance(ids, list) else ()
    return next(iter(found), "")


class Rsvqa:
    def __init__(self, data: DataConfig):
        self.data, self.root = data, Root(data)

    def items(self) -> list[Item]:
        """One item an image and split, with all its questions. ValueError: no split can be read."""
        images = ImageIndex(self.root.list())
        found: list[Item] = []
        unread: list[Item] = []
        for match in filter(None, map(QUESTIONS.fullmatch, self.root.list((".json",)))):
            try:
                found += self._split(match, images.within(FOLDERS.get(match["prefix"], ())))
            except ValueError as error:
                unread.append(bad_file(self.data, match[0], error))
        if not found:
            why = f" ({unread[0].ref['reason']})" if unread else ""
            raise ValueError(
                f"no LR_split_train_questions.json or the like below data.root={self.data.root} can be read{why}; set data.root "
                "to the folder that holds the published JSON files and the images"
            )
        return found + unread

    def _split(self, match: re.Match, images: ImageIndex) -> list[Item]:
        stem, split = match["stem"], match["split"]
        asked, answers, shown = (entries(self.root, f"{stem}_{key}.json", key) for key in ("questions", "answers", "images"))
        by_image: dict[int, list[list[str]]] = {}
        bad: list[Item] = []
        for number, question in asked.items():
            image, text, answer = question.get("img_id"), clean(question.get("question")), answer_of(question, answers)
            if not isinstance(image, int) or image not in shown:
                wrong = "img_id", f"{image} is no active image of {stem}_images.json"
            elif not text:
                wrong = "question", "is missing or empty"
            elif not answer:
                wrong = "answers_ids", f"has no active answer in {stem}_answers.json"
            else:
                kind = clean(question.get("type"))
                by_image.setdefault(image, []).append([text, answer, TYPES.get(kind, kind)])
                continue
            bad.append(bad_item(self.data, f"{stem}_questions.json", BadRecord(f"question {number}", *wrong), split))
        found = []
        for image, questions in sorted(by_image.items()):
            name = f"{stem.rpartition('/')[2]}/{image}"
            try:
                ref = {"file": images.find(f"{image}.tif"), "questions": questions}
            except ValueError as error:
                ref = {"file": f"{stem}_images.json", "field": f"images[{image}]", "reason": str(error)}
            found.append(Item(split, name, ref, len(questions)))
        return found + bad

    def make(self, item: Item) -> Iterator[ImageRecord]:
        """One image and its questions. Raises BadRecord."""
        image, width, height = read_image(self.root, item, self.data.bands)
        found = [Conversation("vqa", [(f"{q} {SHORT_ANSWER}", a)], category) for q, a, category in item.ref["questions"]]
        yield new_record(self.data, item, image, width, height, found)
