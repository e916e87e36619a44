"""ImageRecord: one image and all its conversations; the Arrow schema of a shard; validation with reasons."""

import io
import struct
import zlib
from dataclasses import dataclass, field

import pyarrow as pa
from PIL import Image

from geodistill.language import BOS, EOS, IMAGE, PAD, TASKS, check_boxes

SCHEMA_VERSION = 1
SENSORS = ("optical", "sar", "infrared")
MAX_PIXELS = 100_000_000
# of Pillow; others of its formats run programs, or hide how large they are
FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "JPEG2000", "PPM")
# Colours of the images that CLIP's towers learned from; here, because a data process that imports the towers starts 5 s later
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_TURN = pa.struct([("question", pa.string()), ("answer", pa.string())])
_CONVERSATION = pa.struct(
    [
        ("task", pa.string()),
        ("category", pa.string()),
        ("turns", pa.list_(_TURN)),
        ("references", pa.list_(pa.string())),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sensor", pa.string()),
        ("conversations", pa.list_(_CONVERSATION)),
    ],
    metadata={"geodistill_schema": str(SCHEMA_VERSION)},
)


class BadRecord(ValueError):
    """A record that cannot be used. `field` names where, the message says why; the record is set aside and counted."""

    def __init__(self, record: str, field: str, reason: str):
        super().__init__(f"record {record}, field {field}: {reason}")
        self.record, self.field, self.reason = record, field, reason


class NothingToAsk(BadRecord):
    """An image without an object: listed with the others, and not an error of the data."""


@dataclass
class Conversation:
    """One line of talk about an image: `turns` of (question, answer); an answer of None is an unlabelled prompt.

    `references`: every accepted answer to the last turn (several captions, say); empty means its answer alone.
    """

    task: str
    turns: list[tuple[str, str | None]]
    category: str = ""
    references: list[str] = field(default_factory=list)

    def unlabelled(self) -> "Conversation":
        """The same prompt without its answers: the first turn only, since later ones stand on answers."""
        return Conversation(self.task, [(self.turns[0][0], None)], self.category)


@dataclass
class ImageRecord:
    """One image (encoded bytes, stored once) and all that is said about it. width, height: pixels."""

    id: str
    image: bytes
    width: int
    height: int
    conversations: list[Conversation]
    sensor: str = "optical"

    def to_row(self) -> dict:
        """A row of the shard's schema."""
        return {
            "id": self.id,
            "image": self.image,
            "width": self.width,
            "height": self.height,
            "sensor": self.sensor,
            "conversations": [
                {
                    "task": c.task,
                    "category": c.category,
                    "turns": [{"question": q, "answer": a} for q, a in c.turns],
                    "references": list(c.references),
                }
                for c in self.conversations
            ],
        }

    @staticmethod
    def from_row(row: dict) -> "ImageRecord":
        """The inverse of `to_row`."""
        conversations = [
            Conversation(
                c["task"],
                [(t["question"], t["answer"]) for t in c["turns"]],
                c["category"],
                list(c["references"]),
            )
            for c in row["conversations"]
        ]
        return ImageRecord(row["id"], row["image"], row["width"], row["height"], conversations, row["sensor"])


def open_image(data: bytes, record: str) -> Image.Image:
    """Encoded bytes -> a fully decoded RGB image. Raises BadRecord for a corrupt, truncated or oversized one."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BadRecord(record, "image", f"{image.width}x{image.height} pixels is over the limit of {MAX_PIXELS}")
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy what is RGB already
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord(record, "image", f"cannot be decoded ({error})") from error


def check_special(text: str) -> str | None:
    """The reason why a text would be read as more than a text, or None."""
    special = next((token for token in (IMAGE, BOS, EOS, PAD) if token in text), None)
    return f"holds the special token {special}" if special else None


def check_text(text: str) -> str | None:
    """The reason why a question or an answer cannot be used, or None."""
    return check_special(text) or check_boxes(text)


def validate(record: ImageRecord) -> ImageRecord:
    """Return the record unchanged if it can be trained on; raise BadRecord with the field and the reason otherwise."""
    if not record.id:
        raise BadRecord("(no id)", "id", "is empty")
    if not record.image:
        raise BadRecord(record.id, "image", "is missing: every conversation needs an image")
    open_image(record.image, record.id)
    if record.sensor not in SENSORS:
        raise BadRecord(record.id, "sensor", f"{record.sensor!r} is none of {', '.join(SENSORS)}")
    if not record.conversations:
        raise BadRecord(record.id, "conversations", "is empty")
    for i, conversation in enumerate(record.conversations):
        where = f"conversations[{i}]"
        if conversation.task not in TASKS:
            raise BadRecord(record.id, f"{where}.task", f"{conversation.task!r} is none of {', '.join(TASKS)}")
        if not conversation.turns:
            raise BadRecord(record.id, f"{where}.turns", "is empty")
        for j, (question, answer) in enumerate(conversation.turns):
            if not question or not question.strip():
                raise BadRecord(record.id, f"{where}.turns[{j}].question", "is empty")
            if answer is not None and not answer.strip():
                raise BadRecord(record.id, f"{where}.turns[{j}].answer", "is empty")
            for name, text in (("question", question), ("answer", answer or "")):
                reason = check_text(text)
                if reason:
                    raise BadRecord(record.id, f"{where}.turns[{j}].{name}", reason)
    return record
