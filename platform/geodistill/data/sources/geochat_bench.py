"""GeoChat-Bench's question files (*.jsonl below data.root) over image files: every record becomes a test question.

referring.jsonl, region_captioning.jsonl: {"question_id", "image_id", "question", "ground_truth", "type", "size_group"};
aid.jsonl, UCmerced.jsonl: {"question_id": "<Class>/<file>" or with a suffix gt, "image", "text", "ground_truth"};
lrben.jsonl, hrben.jsonl: {"question_id", "image", "text", "category", "ground_truth" where there is one}.
The conversation's category is the size group of a referring question and the type of a VQA question.
"""

import json
from collections import defaultdict
from collections.abc import Iterator

from geodistill.config import DataConfig
from geodistill.data.record import BadRecord, Conversation, ImageRecord
from geodistill.data.sources.base import ImageIndex, Item, Root, bad_item, clean, new_record, read_image
from geodistill.data.sources.class_folders import class_name
from geodistill.language import GROUNDING, IDENTIFY, REFER, check_boxes, parse_boxes

_SCENES = ("aid", "ucmerced", "resisc")
_VQA = ("lrben", "hrben", "rsvqa", "floodnet")


def question_of(raw: dict, name: str) -> tuple[str, str, str, str]:
    """(task, category, question, answer) of a record of the file `name`.jsonl. Raises ValueError with the reason."""
    text, truth = clean(raw.get("text") or raw.get("question")), raw.get("ground_truth")
    if not text:
        raise ValueError("question is missing or empty")
    if any(key in name for key in _SCENES):
        answer = clean(truth) or clean(raw.get("question_id")).split("/")[0]
        answer = answer.removesuffix("gt").strip(" _-")
        task, category = "scene_classification", ""
        answer = class_name(answer)
    elif any(key in name for key in _VQA):
        task, category, answer = (
            "vqa",
            clean(raw.get("category") or raw.get("type")),
            clean(truth if truth is not None else raw.get("answer")),
        )
    elif "region" in name:
        task, category, answer = "region_captioning", clean(raw.get("size_group")), clean(truth)
        text = text if text.startswith(IDENTIFY) else f"{IDENTIFY} What is the object present at {text}"
    else:
        answer = clean(truth) if isinstance(truth, str) else "<delim>".join(map(str, truth or []))
        task, category = "grounding", clean(raw.get("size_group"))
        if not text.startswith("["):
            text = f"{REFER} Give me the location of <p> {text} </p>" if raw.get("type", "ref") == "ref" else f"{GROUNDING}{text}"
        if not parse_boxes(answer) or check_boxes(answer):
            raise ValueError(check_boxes(answer) or "ground_truth holds no box")
    if not answer:
        raise ValueError("ground_truth is missing or empty")
    return task, category, text, answer


class GeoChatBench:
    def __init__(self, data: DataConfig):
        self.data, self.root = data, Root(data)

    def items(self) -> list[Item]:
        """One item an image of a question file, in the split test. ValueError: no question file below data.root."""
        files = self.root.list((".jsonl",))
        if not files:
            raise ValueError(f"no *.jsonl below data.root={self.data.root}; set data.root to the folder of GeoChat-Bench")
        images, found, bad = ImageIndex(self.root), defaultdict(list), []
        for path in files:
            name = path.rpartition("/")[2].removesuffix(".jsonl").lower()
            for i, line in enumerate(self.root.text(path).splitlines()):
                if not line.strip():
                    continue
                record = f"{name}[{i}]"
                try:
                    raw = json.loads(line)
                    shown = clean(raw.get("image") or raw.get("image_id"))
                    image = images.find(shown)
                    found[name, image].append(question_of(raw, name))
                except (ValueError, AttributeError) as error:
                    bad.append(bad_item(self.data, path, BadRecord(record, "record", str(error)), "test"))
        return [
            Item("test", f"{name}/{image}", {"file": image, "questions": q}, len(q)) for (name, image), q in sorted(found.items())
        ] + bad

    def make(self, item: Item) -> Iterator[ImageRecord]:
        """One image and its questions. Raises BadRecord."""
        image, width, height = read_image(self.root, item, self.data.bands)
        found = [Conversation(task, [(q, a)], category) for task, category, q, a in item.ref["questions"]]
        yield new_record(self.data, item, image, width, height, found)
