"""GeoChat-Bench: question files (*.jsonl) over image files, each a benchmark of its own; all of it is the split test.

referring.jsonl: {"question_id", "image_id", "question", "ground_truth": [four corners in pixels, ...], "type": "ref" or
"grounding", "dataset": "SOTA", "SIOR" or "FAST", "obj_ids", "size_group"}; region_captioning.jsonl: the same, with the box
text as the question and a text as the truth; grounding_description.jsonl: {"image_id", "description"};
aid.jsonl, UCmerced.jsonl: {"question_id": "<Class>/...", "image", "text", "ground_truth": "<Class>", in AID "<Class>gt"};
lrben.jsonl, hrben.jsonl: {"question_id", "image", "text", "category"}, without answers: these are RSVQA's, joined by the
question's number from LR_split_test_* and USGS_split_test_phili_*_{questions,answers}.json below data.root.
The category of a conversation is the size group, or the type of a VQA question; the id is "<benchmark>/<image>".
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from shapely import Polygon

from geodistill.config import DataConfig
from geodistill.data.record import BadRecord, Conversation, ImageRecord
from geodistill.data.sources.base import ImageIndex, Item, Root, bad_file, bad_item, clean, new_record, read_image
from geodistill.data.sources.class_folders import class_name
from geodistill.data.sources.rsvqa import FOLDERS, QUESTIONS, TYPES, answer_of, entries
from geodistill.language import GROUNDING, IDENTIFY, REFER, box_from_corners, check_boxes, format_boxes, parse_boxes

_TASKS = {
    "referring": "grounding",
    "region_captioning": "region_captioning",
    "grounding_description": "grounded_captioning",
    "aid": "scene_classification",
    "ucmerced": "scene_classification",
    "lrben": "vqa",
    "hrben": "vqa",
}
_RSVQA = {"lrben": "LR", "hrben": "USGS"}
_SIDES = {"SOTA": 1024, "SIOR": 800, "FAST": 600}  # pixels of the square images that the corners of a data set lie in


class GeoChatBench:
    def __init__(self, data: DataConfig):
        self.data, self.root = data, Root(data)

    def items(self) -> list[Item]:
        """One item an image of a question file, in the split test. ValueError: there is no question file."""
        files = self.root.list((".jsonl",))
        if not files:
            raise ValueError(f"no *.jsonl below data.root={self.data.root}; set data.root to the folder of GeoChat-Bench")
        images = ImageIndex(self.root.list())
        found: dict[tuple[str, str], list] = defaultdict(list)
        bad: list[Item] = []
        for path in files:
            name = path.rpartition("/")[2].removesuffix(".jsonl").lower()
            try:
                if name not in _TASKS:
                    raise ValueError(f"{path} is none of {', '.join(_TASKS)}.jsonl; take it out of data.root")
                lines = self.root.text(path).splitlines()
                asked = self._asked(_RSVQA[name]) if name in _RSVQA else {}
            except (OSError, ValueError) as error:
                bad.append(bad_file(self.data, path, error, "test"))
                continue
            near = images.within(FOLDERS[_RSVQA[name]]) if name in _RSVQA else images
            for i, line in enumerate(lines):
                if line.strip():
                    try:
                        image, question = _record(line, name, f"{name}[{i}]", asked, near)
                        found[name, image].append(question)
                    except BadRecord as wrong:
                        bad.append(bad_item(self.data, path, wrong, "test"))
        return [
            Item("test", f"{name}/{image}", {"file": image, "questions": q}, len(q)) for (name, image), q in sorted(found.items())
        ] + bad

    def _asked(self, prefix: str) -> dict[str, tuple[str, str, str]]:
        """Number of a test question of RSVQA -> (question, type, answer)."""
        asked: dict[str, tuple[str, str, str]] = {}
        for match in filter(None, map(QUESTIONS.fullmatch, self.root.list((".json",)))):
            if (match["prefix"], match["split"]) == (prefix, "test"):
                answers = entries(self.root, f"{match['stem']}_answers.json", "answers")
                for number, q in entries(self.root, match[0], "questions").items():
                    asked[str(number)] = clean(q.get("question")), clean(q.get("type")), answer_of(q, answers)
        return asked

    def make(self, item: Item) -> Iterator[ImageRecord | BadRecord]:
        """One image and its questions; a BadRecord for each box that cannot be used. Raises BadRecord."""
        image, width, height = read_image(self.root, item, self.data.bands)
        found = []
        for i, (task, category, question, answer, corners, side) in enumerate(item.ref["questions"]):
            if corners:
                frame = (side, side) if side else (width, height)
                sign = self.data.angle_counter_clockwise
                rectangles = [Polygon(c).minimum_rotated_rectangle.exterior.coords[:4] for c in corners]
                answer = format_boxes([box_from_corners(r, frame[0], frame[1], sign) for r in rectangles])
                if check_boxes(answer):
                    yield BadRecord(item.id, f"questions[{i}].ground_truth", str(check_boxes(answer)))
                    continue
            found.append(Conversation(task, [(question, answer)], category))
        if found:
            yield new_record(self.data, item, image, width, height, found)


def _record(line: str, name: str, record: str, asked: dict, images: ImageIndex) -> tuple[str, list]:
    """(image, [task, category, question, answer, corners, side of their frame]) of a line. Raises BadRecord."""

    def need(field: str, good: object, reason: str | None) -> None:
        if not good:
            raise BadRecord(record, field, reason or "is missing or empty")

    try:
        raw = json.loads(line)
    except ValueError as error:
        raise BadRecord(record, "record", f"is not JSON ({error})") from error
    need("record", isinstance(raw, dict), "is no JSON object")
    number, task = clean(raw.get("question_id")), _TASKS[name]
    record = f"{record} {number}".strip()
    shown, asks = ("image", "text") if "image" in raw else ("image_id", "question")
    try:
        image = images.find(clean(raw.get(shown)))
    except ValueError as error:
        raise BadRecord(record, shown, str(error)) from error
    question, truth, category = clean(raw.get(asks)), raw.get("ground_truth"), clean(raw.get("size_group"))
    answer, corners = clean(truth), _corners(truth) if task == "grounding" else []
    if task == "grounded_captioning":
        question, answer = f"{GROUNDING} describe the image in detail.", clean(raw.get("description"))
    need(asks, question, None)
    need(asks, not check_boxes(question), check_boxes(question))
    if task == "grounding":
        need("ground_truth", corners or parse_boxes(answer), "holds no box: neither four corners in pixels nor a box text")
        refer = raw.get("type", "ref") == "ref"
        question = f"{REFER} Give me the location of <p> {question} </p>" if refer else f"{GROUNDING} {question}"
    elif task == "region_captioning":
        need(asks, parse_boxes(question), "holds no box")
        question = f"{IDENTIFY} What is the object present at {question}"
    elif task == "scene_classification":
        answer = class_name((number.split("/")[0] if "/" in number else answer).removesuffix("gt"))
    elif task == "vqa":
        text, kind, known = asked.get(number, ("", clean(raw.get("category")), ""))
        need("question_id", text.lower() in question.lower(), f"{number} is another question in RSVQA: {text!r}")
        category, answer = TYPES.get(kind, kind), answer or known
        files = f"{_RSVQA[name]}_split_test{'_phili' if name == 'hrben' else ''}_{{questions,answers}}.json"
        need("ground_truth", answer, f"is missing, and RSVQA's {files} below data.root do not have question {number!r}: add them")
    need("description" if task == "grounded_captioning" else "ground_truth", corners or answer, None)
    need("ground_truth", not check_boxes(answer), check_boxes(answer))
    return image, [task, category, question, answer, corners, _SIDES.get(clean(raw.get("dataset")).upper(), 0)]


def _corners(truth: Any) -> list[list[list[float]]]:
    """The corners in pixels of one or several boxes, each as four points, eight numbers or x1 y1 x2 y2; [] for no such list."""
    try:
        numbers = np.asarray(truth, dtype=float)
    except (TypeError, ValueError):
        return []
    if not numbers.ndim or not numbers.size or not np.isfinite(numbers).all():
        return []
    if numbers.shape[-2:] == (4, 2) or numbers.shape[-1] == 8:
        boxes = numbers.reshape(-1, 4, 2)
    elif numbers.shape[-1] == 4:
        boxes = numbers.reshape(-1, 4)[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    else:
        return []
    return boxes.tolist() if all(Polygon(box).area > 0 for box in boxes) else []
