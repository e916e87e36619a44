"""LLaVA's instruction JSON, as in GeoChat_Instruct: data.annotations over the images below data.root.

[{"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}, ...]}, ...]
Records of one image are joined. Published files name images with other extensions or folders than the archives hold,
so an image that is not at its path is looked up by the stem of its file name.
"""

import re
from collections import defaultdict
from collections.abc import Iterator

from geodistill.config import DataConfig
from geodistill.data.record import BadRecord, Conversation, ImageRecord, check_text
from geodistill.data.sources.base import (
    ImageIndex,
    Item,
    Root,
    bad_item,
    clean,
    new_record,
    read_annotations,
    read_image,
    split_of,
)
from geodistill.language import IMAGE, parse_boxes, token_task

_SHORT = re.compile(r"(single|one) word or (a )?(short )?phrase", re.IGNORECASE)
_CLASS = re.compile(r"\bclass(es|ify|ified|ification)?\b", re.IGNORECASE)
_DESCRIBE = re.compile(r"\b(describe|description|caption|summari[sz]e)\b", re.IGNORECASE)


def guess_task(question: str, exchanges: int) -> tuple[str, str]:
    """(task, category) of a record, from the conventions of its first question."""
    if found := token_task(question):
        return found
    if _SHORT.search(question):
        return ("scene_classification" if _CLASS.search(question) else "vqa"), ""
    if exchanges > 1:
        return "conversation", ""
    return ("captioning" if _DESCRIBE.search(question) else "complex_question"), ""


def conversation_of(raw: dict, record: str) -> Conversation:
    """The conversation of one raw record. Raises BadRecord with the field as the JSON file spells it."""
    said = raw.get("conversations")
    if not isinstance(said, list) or not said:
        raise BadRecord(record, "conversations", "is missing or empty")
    texts: list[str] = []
    for i, message in enumerate(said):
        who, where = ("human", "gpt")[i % 2], f"conversations[{i}]"
        if not isinstance(message, dict) or message.get("from") != who:
            raise BadRecord(record, f"{where}.from", f"is not {who!r}: human and gpt must take turns, human first")
        value = message.get("value")
        text = value if isinstance(value, str) else ""
        text = (text.replace(IMAGE, "", 1) if i == 0 else text).strip()
        reason = "is empty" if not text else f"holds another {IMAGE}" if IMAGE in text else check_text(text)
        if reason:
            raise BadRecord(record, f"{where}.value", reason)
        texts.append(text)
    if len(texts) % 2:
        raise BadRecord(record, f"conversations[{len(texts)}]", "is missing: the last question has no answer")
    task, category = guess_task(texts[0], len(texts) // 2)
    for i, (question, answer) in enumerate(zip(texts[::2], texts[1::2], strict=True)):
        _, asked = token_task(question) or ("", "")
        where = f"conversations[{2 * i + 1}].value"
        if asked and answer.lower().strip(" .") == "none":
            raise BadRecord(record, where, "is 'none', which answers no question about a box")
        if asked in ("refer", "grounding") and not parse_boxes(answer):
            raise BadRecord(record, where, f"holds no box, which [{asked}] asks for")
    return Conversation(task, list(zip(texts[::2], texts[1::2], strict=True)), category)


class Llava:
    def __init__(self, data: DataConfig):
        self.data, self.root = data, Root(data)

    def items(self) -> list[Item]:
        """One item an image with all its conversations, in order of path, then one for each unusable record."""
        raws = read_annotations(self.data, self.root)
        images = ImageIndex(self.root.list(), (clean(raw.get("image")) for raw in raws if isinstance(raw, dict)))
        found: dict[str, list] = defaultdict(list)
        rejected = []
        for i, raw in enumerate(raws):
            raw = raw if isinstance(raw, dict) else {}
            record = str(raw.get("id", f"[{i}]"))
            try:
                conversation = conversation_of(raw, record)
                found[self._image(raw, record, images)].append(
                    [conversation.task, conversation.category, conversation.turns],
                )
            except BadRecord as bad:
                rejected.append(bad_item(self.data, self.data.annotations, bad))
        if not found:
            raise ValueError(
                f"none of the {len(raws)} records of data.annotations={self.data.annotations} can be used with the "
                f"{len(images.paths)} images below data.root={self.data.root}; the first: "
                f"record {rejected[0].id}, field {rejected[0].ref['field']}: {rejected[0].ref['reason']}"
            )
        return [
            Item(split_of(self.data, image), image, {"file": image, "conversations": found[image]}, len(found[image]))
            for image in sorted(found)
        ] + rejected

    def _image(self, raw: dict, record: str, images: ImageIndex) -> str:
        name = raw.get("image")
        if not isinstance(name, str) or not name.strip():
            raise BadRecord(record, "image", "is missing: every conversation needs an image")
        try:
            return images.find(name.strip())
        except ValueError as error:
            raise BadRecord(record, "image", str(error)) from error

    def make(self, item: Item) -> Iterator[ImageRecord]:
        """One image and the conversations of all its records. Raises BadRecord."""
        image, width, height = read_image(self.root, item, self.data.bands)
        found = [Conversation(task, [(q, a) for q, a in turns], category) for task, category, turns in item.ref["conversations"]]
        yield new_record(self.data, item, image, width, height, found)
