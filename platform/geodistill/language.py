"""The remote-sensing language: task tokens, prompt template, and box text <-> geometry (GeoChat's conventions)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

GROUNDING, IDENTIFY, REFER = "[grounding]", "[identify]", "[refer]"
SHORT_ANSWER = "Answer the question using a single word or phrase."
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE, BOS, EOS, PAD = "<image>", "<s>", "</s>", "<pad>"
DELIM = "<delim>"
SENSOR_TAGS = {"sar": "[sar]", "infrared": "[infrared]"}  # what stands before a question on an image of no optical sensor

# What a conversation is for. A report groups them under the four tasks of the paper.
TASKS = (
    "scene_classification",
    "vqa",
    "grounding",
    "captioning",
    "region_captioning",
    "grounded_captioning",
    "conversation",
    "complex_question",
    "detection",
)
TASK_GROUP = {
    "scene_classification": "scene_classification",
    "vqa": "vqa",
    "grounding": "grounding",
    "captioning": "captioning",
    "region_captioning": "captioning",
}

_TOKENS = {
    REFER: ("grounding", "refer"),
    GROUNDING: ("grounded_captioning", "grounding"),
    IDENTIFY: ("region_captioning", "identify"),
}
_PLACE = re.compile(
    r"\{<|\b((left|right|top|bottom|upper|lower)(most|hand|side)?|above|below|beneath|underneath"
    r"|(north|south|east|west)\w*|corners?|horizontal\w*|vertical\w*)\b",
    re.IGNORECASE,
)
_NUMBER = r"<\s*(-?\d{1,15}(?:\.\d{1,15})?)\s*>"
_BOX = re.compile(r"\{" + _NUMBER * 4 + r"(?:\|" + _NUMBER + r")?\}")
_PHRASE = re.compile(r"<p>(.*?)</p>", re.DOTALL)
_COUNT = re.compile(r"^(\d+|an?|the)\s+", re.IGNORECASE)
_WHERE = re.compile(r"\s+(at|in|on|to|near|next to|close to)\s.*$", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Box:
    """An oriented box. x1, y1, x2, y2: the unrotated rectangle in percent of image width / height; theta: degrees.

    The rectangle is turned about its own centre by `theta`, counter-clockwise as seen on the screen
    unless a reader asks for the other sign. Values outside 0-100 are legal before the turn.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    theta: float = 0


def format_box(box: Box) -> str:
    """Box -> GeoChat's text, `{<x1><y1><x2><y2>|<theta>}` (equation 11 of the paper)."""
    return f"{{<{box.x1}><{box.y1}><{box.x2}><{box.y2}>|<{box.theta}>}}"


def format_boxes(boxes: list[Box]) -> str:
    """Several boxes of one phrase, joined by `<delim>`."""
    return DELIM.join(format_box(b) for b in boxes)


def parse_boxes(text: str) -> list[Box]:
    """Every box in `text`, in order. A missing angle is 0. Text without a box gives an empty list."""
    return [Box(*(float(v) if "." in v else int(v) for v in m.groups("0"))) for m in _BOX.finditer(text)]


def labelled_boxes(answer: str, question: str = "") -> list[tuple[str, Box]]:
    """(label, box) of every box in an answer: the last phrase `<p>...</p>` before it, else the one that the question asks for.

    A box with numbers of five digits or more is nonsense, and left out.
    """
    asked = _PHRASE.search(question)
    found, label, at = [], asked[1].strip() if asked else "", 0
    for match in _BOX.finditer(answer):
        for phrase in _PHRASE.finditer(answer, at, match.start()):
            label = phrase[1].strip()
        at = match.end()
        if max(map(len, re.findall(r"\d+", match[0]))) < 5:
            found.append((label, parse_boxes(match[0])[0]))
    return found


TOKEN_CATEGORIES = frozenset(category for _, category in _TOKENS.values())


def token_task(question: str) -> tuple[str, str] | None:
    """(task, category) that a task token in a question names, or None."""
    return next((found for token, found in _TOKENS.items() if token in question), None)


def kind_in(phrase: str) -> str:
    """What a phrase is about, whatever their number and place: "2 ships at the left", "A ship" -> "ship"."""
    kind = _WHERE.sub("", _COUNT.sub("", " ".join(phrase.split()))).lower()
    if kind.endswith("ies") and len(kind) > 4:
        return kind[:-3] + "y"
    if kind.endswith(("sses", "shes", "ches", "xes", "buses")):
        return kind[:-2]
    return kind[:-1] if kind.endswith("s") and not kind.endswith(("ss", "us", "is")) else kind


def box_corners(box: Box, width: float, height: float, counter_clockwise: bool = True) -> list[tuple[float, float]]:
    """The four corners (x, y) in pixels of an image of `width` x `height`, top-left first before the turn.

    The turn happens in pixels, so a square object stays square in an image that is not.
    """
    x1, x2 = box.x1 * width / 100, box.x2 * width / 100
    y1, y2 = box.y1 * height / 100, box.y2 * height / 100
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    angle = math.radians(box.theta if counter_clockwise else -box.theta)
    cos, sin = math.cos(angle), math.sin(angle)
    return [
        (cx + (x - cx) * cos + (y - cy) * sin, cy - (x - cx) * sin + (y - cy) * cos)
        for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
    ]


def box_from_center(cx: float, cy: float, w: float, h: float, theta: float, width: float, height: float) -> Box:
    """Pixels -> box text units. (cx, cy) centre, w x h the unrotated size, theta degrees counter-clockwise on screen."""
    return Box(
        round(100 * (cx - w / 2) / width),
        round(100 * (cy - h / 2) / height),
        round(100 * (cx + w / 2) / width),
        round(100 * (cy + h / 2) / height),
        round(theta),
    )


def speaks_of_place(text: str) -> bool:
    """Does a text hold a box or a word of direction, so that it is no longer true when its image is turned?"""
    return bool(_PLACE.search(text))


def box_from_corners(corners: Sequence[tuple[float, float]], width: float, height: float, counter_clockwise: bool = True) -> Box:
    """The four corners of a rectangle in pixels, in order around it, -> box text units with 0 <= theta < 90.

    counter_clockwise: the direction of theta on the screen.
    """
    cx, cy = (sum(c[i] for c in corners) / 4 for i in (0, 1))
    (x1, y1), (x2, y2), (x3, y3) = corners[:3]
    along, across = math.hypot(x2 - x1, y2 - y1), math.hypot(x3 - x2, y3 - y2)
    up = -1 if counter_clockwise else 1  # y of pixels grows downwards
    theta = round(math.degrees(math.atan2(up * (y2 - y1), x2 - x1))) % 180
    if theta >= 90:
        theta, along, across = theta - 90, across, along
    return box_from_center(cx, cy, along, across, theta, width, height)


def check_boxes(text: str) -> str | None:
    """The reason why a box in `text` cannot be used, or None: a degenerate box, or a corner far outside the image."""
    for box in parse_boxes(text):
        if box.x1 >= box.x2 or box.y1 >= box.y2:
            return f"box {format_box(box)} has x1 >= x2 or y1 >= y2"
        if min(box.x1, box.y1, box.x2, box.y2) < -100 or max(box.x1, box.y1, box.x2, box.y2) > 200:
            return f"box {format_box(box)} lies far outside 0-100"
        if any(isinstance(value, float) for value in vars(box).values()):
            return f"box {format_box(box)} has decimals: GeoChat's boxes are whole percents and degrees"
        if abs(box.theta) > 360:
            return f"box {format_box(box)} has an angle beyond 360 degrees"
    return None


def chat_template(system: str = SYSTEM, user: str = "USER", assistant: str = "ASSISTANT") -> str:
    """The Jinja chat template of GeoChat's prompt, for the processor: image first, then the turns.

    `{system} USER: <image>\\n{question} ASSISTANT: {answer}</s>USER: ...`; content is text or a list of parts.
    """
    text = (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + IMAGE + "{{ '\\n' }}{% endif %}{% endfor %}"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endif %}"
    )
    return (
        "{{ " + repr(system + " ") + " }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}" + user + ": " + text + "{{ ' ' }}"
        "{% else %}" + assistant + ": " + text + EOS + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + assistant + ":{% endif %}"
    )
