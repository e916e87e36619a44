"""The embedded data set: procedural overhead scenes with true oriented boxes and all nine kinds of instruction.

Every image is a pure function of (seed, split, index), so splits never share one and any part can be made again.
A scene is drawn at twice its size and reduced, which costs about a millisecond with its PNG.
"""

import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from geodistill.data.record import Conversation, ImageRecord
from geodistill.language import GROUNDING, IDENTIFY, REFER, SHORT_ANSWER, Box, box_from_center, format_box, format_boxes

SIZE = 64
SPLITS = ("train", "unlabelled", "val", "test")
SENSOR_SHARES = {"optical": 0.7, "sar": 0.15, "infrared": 0.15}
SENSOR_NAMES = {"optical": "An optical", "sar": "A SAR", "infrared": "An infrared"}
COLORS = {"white": (235, 235, 235), "red": (205, 40, 40), "blue": (45, 70, 215), "yellow": (235, 205, 50)}
# kind -> (length / breadth, takes a colour, has a direction)
KINDS = {
    "airplane": (1.1, True, True),
    "ship": (2.0, True, True),
    "vehicle": (1.6, True, True),
    "storage tank": (1.0, True, False),
    "tennis court": (1.6, False, True),
    "bridge": (2.2, False, True),
}
# scene -> (urban, can be flooded, kinds at home there, what it is used for)
SCENES = {
    "airport": (True, False, ("airplane", "vehicle"), "air transport, because there is a runway"),
    "beach": (False, False, ("ship", "vehicle"), "recreation, because sand meets the water"),
    "desert": (False, False, ("vehicle", "storage tank"), "nothing regular, because only bare sand is visible"),
    "farmland": (False, True, ("vehicle", "bridge"), "growing crops, because the fields lie in strips"),
    "forest": (False, False, ("vehicle", "bridge"), "forestry, because trees cover the ground"),
    "harbor": (True, False, ("ship", "vehicle"), "shipping, because piers reach into the water"),
    "industrial area": (True, True, ("storage tank", "vehicle"), "production, because large halls stand there"),
    "mountain": (False, False, ("vehicle", "bridge"), "hiking, because ridges cross the image"),
    "parking lot": (True, True, ("vehicle", "tennis court"), "parking, because painted bays line the ground"),
    "residential area": (True, True, ("vehicle", "tennis court"), "living, because small houses stand in rows"),
    "river": (False, False, ("ship", "bridge"), "water transport, because a stream crosses the land"),
    "stadium": (True, False, ("tennis court", "vehicle"), "sports, because a track surrounds a field"),
}
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


@dataclass(frozen=True)
class Thing:
    """One object of a scene. Centre and size in pixels; theta in degrees counter-clockwise on the screen."""

    kind: str
    color: str
    large: bool
    cx: float
    cy: float
    length: float
    breadth: float
    theta: int

    @property
    def box(self) -> Box:
        return box_from_center(self.cx, self.cy, self.length, self.breadth, self.theta, SIZE, SIZE)

    @property
    def position(self) -> str:
        row, column = _ROWS[min(int(3 * self.cy / SIZE), 2)], _COLUMNS[min(int(3 * self.cx / SIZE), 2)]
        return "center" if (row, column) == ("middle", "center") else f"{row} {column}"


@dataclass(frozen=True)
class Scene:
    """What is true of an image, from which every answer follows."""

    name: str
    sensor: str
    flooded: bool
    things: tuple[Thing, ...]

    def count(self, kind: str) -> int:
        return sum(t.kind == kind for t in self.things)


def plan_scene(rng: random.Random) -> Scene:
    """Draw the content of a scene: its class, sensor, flood, and 0-4 objects that do not overlap."""
    name = rng.choice(list(SCENES))
    _, can_flood, home, _ = SCENES[name]
    sensor = rng.choices(list(SENSOR_SHARES), list(SENSOR_SHARES.values()))[0]
    flooded = can_flood and rng.random() < 0.5
    things: list[Thing] = []
    wanted = rng.choices(range(5), [0.08, 0.27, 0.3, 0.2, 0.15])[0]
    for _ in range(40):
        if len(things) == wanted:
            break
        kind = rng.choice(home if rng.random() < 0.6 else list(KINDS))
        ratio, colored, turned = KINDS[kind]
        large = rng.random() < 0.5
        length = (rng.uniform(22, 27) if large else rng.uniform(14, 18)) * (1.0 if ratio > 1.3 else 0.85)
        theta = rng.randrange(12) * 15 if turned else 0
        reach = 0.5 * math.hypot(length, length / ratio) if turned else 0.5 * length
        cx, cy = rng.uniform(reach, SIZE - reach), rng.uniform(reach, SIZE - reach)
        if all(math.hypot(cx - t.cx, cy - t.cy) > 0.45 * (length + t.length) + 1 for t in things):
            color = rng.choice(list(COLORS)) if colored else ""
            things.append(Thing(kind, color, large, cx, cy, length, length / ratio, theta))
    return Scene(name, sensor, flooded, tuple(things))


def _shade(color: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return tuple(max(0, min(255, int(c * factor))) for c in color)  # type: ignore[return-value]


def _noise(rng: random.Random, cells: int, low: float, high: float) -> np.ndarray:
    """Smooth noise [2*SIZE, 2*SIZE] in [low, high]."""
    coarse = Image.frombytes("L", (cells, cells), rng.randbytes(cells * cells))
    return np.asarray(coarse.resize((2 * SIZE, 2 * SIZE), Image.Resampling.BICUBIC), np.float32) / 255 * (high - low) + low


def _tinted(color: tuple[int, int, int], field: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(field[..., None] * np.array(color, np.float32), 0, 255).astype(np.uint8))


def _background(rng: random.Random, name: str) -> Image.Image:
    """The ground of a scene class, RGB of 2*SIZE pixels a side."""
    n = 2 * SIZE
    sideways = rng.random() < 0.5
    grass, water, asphalt, sand = (86, 128, 62), (48, 92, 128), (112, 112, 116), (212, 186, 128)
    ground = {
        "airport": grass, "beach": sand, "desert": (218, 182, 110), "farmland": (150, 140, 70), "forest": (32, 78, 38),
        "harbor": water, "industrial area": (150, 142, 134), "mountain": (120, 104, 84), "parking lot": (92, 92, 96),
        "residential area": (120, 142, 92), "river": (104, 136, 72), "stadium": grass,
    }[name]  # fmt: skip
    cells, low = {"forest": (22, 0.35), "mountain": (7, 0.3), "desert": (4, 0.75)}.get(name, (8, 0.82))
    image = _tinted(ground, _noise(rng, cells, low, 1.25 if low < 0.5 else 1.1))
    draw = ImageDraw.Draw(image)
    a = rng.randrange(n // 4, n - n // 4)
    if name == "airport":
        draw.rectangle((0, a - 13, n, a + 13), fill=asphalt)
        for x in range(4, n, 16):
            draw.rectangle((x, a - 1, x + 8, a + 1), fill=(235, 235, 235))
    elif name == "beach":
        shore = [(x, a + 7 * math.sin(x / 17 + a)) for x in range(0, n + 9, 8)]
        draw.polygon([*shore, (n, n), (0, n)], fill=water)
        draw.line(shore, fill=(240, 240, 235), width=4)
    elif name == "farmland":
        width = rng.randrange(10, 20)
        for i, x in enumerate(range(0, n, width)):
            shade = ((170, 158, 82), (98, 130, 58), (190, 172, 100), (124, 112, 62))[(i + a) % 4]
            draw.rectangle((x, 0, x + width - 1, n), fill=_shade(shade, rng.uniform(0.88, 1.1)))
    elif name == "harbor":
        draw.rectangle((0, 0, n, n // 5), fill=(140, 136, 130))
        for x in range(a % 24, n, 30):
            draw.rectangle((x, n // 5, x + 5, n // 5 + n // 2), fill=(160, 152, 140))
    elif name == "industrial area":
        for x in range(a % 10, n, 44):
            for y in range(a % 14, n, 36):
                draw.rectangle((x, y, x + 34, y + 25), fill=_shade((178, 180, 186), rng.uniform(0.72, 1.08)))
                draw.line((x, y + 12, x + 34, y + 12), fill=(110, 110, 114), width=2)
    elif name == "mountain":
        for k in range(4):
            y = a + (k - 2) * 32
            ridge = [(x, y + 10 * math.sin(x / 11 + k * 2 + a)) for x in range(0, n + 9, 8)]
            draw.line(ridge, fill=(228, 224, 220) if k % 2 else (74, 62, 50), width=5)
    elif name == "parking lot":
        for y in range(a % 20, n, 32):
            draw.line((0, y, n, y), fill=(205, 205, 200), width=2)
            for x in range(0, n, 9):
                draw.line((x, y, x, y + 13), fill=(205, 205, 200), width=1)
    elif name == "residential area":
        for x in range(a % 12, n, 22):
            for y in range(a % 15, n, 24):
                roof = rng.choice(((172, 88, 62), (150, 74, 60), (128, 100, 88)))
                draw.rectangle((x, y, x + 11, y + 12), fill=roof)
                draw.line((x, y + 6, x + 11, y + 6), fill=_shade(roof, 0.7), width=2)
        draw.rectangle((0, a - 4, n, a + 4), fill=asphalt)
    elif name == "river":
        width = rng.randrange(13, 19)
        center = [(x, a + 20 * math.sin(x / 30 + a)) for x in range(-8, n + 17, 8)]
        draw.line(center, fill=water, width=2 * width, joint="curve")
    elif name == "stadium":
        draw.ellipse((6, 16, n - 6, n - 16), fill=(186, 92, 70))
        draw.ellipse((20, 30, n - 20, n - 30), fill=(104, 160, 70))
        draw.ellipse((12, 22, n - 12, n - 22), outline=(235, 225, 220), width=2)
    return image.transpose(Image.Transpose.ROTATE_90) if sideways else image


_PARTS: dict[str, list[tuple[float, list[tuple[float, float]]]]] = {
    # (brightness, polygon in units of length and breadth, -0.5..0.5); the box is exactly the unit square
    "airplane": [
        (1.0, [(-0.5, -0.06), (0.38, -0.08), (0.5, 0), (0.38, 0.08), (-0.5, 0.06)]),
        (0.92, [(0.14, -0.07), (-0.12, -0.5), (-0.24, -0.5), (-0.1, 0), (-0.24, 0.5), (-0.12, 0.5), (0.14, 0.07)]),
        (0.85, [(-0.36, 0), (-0.42, -0.2), (-0.5, -0.2), (-0.46, 0), (-0.5, 0.2), (-0.42, 0.2)]),
    ],
    "ship": [
        (1.0, [(-0.5, -0.4), (-0.42, -0.5), (0.18, -0.5), (0.5, 0), (0.18, 0.5), (-0.42, 0.5), (-0.5, 0.4)]),
        (0.55, [(-0.36, -0.26), (-0.08, -0.26), (-0.08, 0.26), (-0.36, 0.26)]),
        (0.75, [(0.05, -0.14), (0.25, 0), (0.05, 0.14)]),
    ],
    "vehicle": [
        (1.0, [(-0.5, -0.42), (-0.42, -0.5), (0.42, -0.5), (0.5, -0.42), (0.5, 0.42), (0.42, 0.5), (-0.42, 0.5), (-0.5, 0.42)]),
        (0.2, [(0.12, -0.4), (0.28, -0.4), (0.28, 0.4), (0.12, 0.4)]),
        (0.2, [(-0.36, -0.36), (-0.26, -0.36), (-0.26, 0.36), (-0.36, 0.36)]),
    ],
    "tennis court": [
        (1.0, [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]),
        (0.0, [(-0.4, -0.36), (-0.03, -0.36), (-0.03, 0.36), (-0.4, 0.36)]),
        (0.0, [(0.03, -0.36), (0.4, -0.36), (0.4, 0.36), (0.03, 0.36)]),
    ],
    "bridge": [
        (1.0, [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]),
        (0.5, [(-0.5, -0.28), (0.5, -0.28), (0.5, 0.28), (-0.5, 0.28)]),
        (0.85, [(-0.3, -0.05), (0.3, -0.05), (0.3, 0.05), (-0.3, 0.05)]),
    ],
}  # fmt: skip


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, bright: bool) -> None:
    """Draw one object at twice its size; `bright`: as radar and infrared see it, without colour."""
    cx, cy = 2 * thing.cx, 2 * thing.cy
    base = COLORS[thing.color] if thing.color else {"tennis court": (225, 235, 225), "bridge": (200, 192, 180)}[thing.kind]
    base = (250, 250, 250) if bright else base
    if thing.kind == "storage tank":
        r = thing.length
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=_shade(base, 0.72))
        draw.ellipse((cx - 0.8 * r, cy - 0.8 * r, cx + 0.8 * r, cy + 0.8 * r), fill=base)
        draw.ellipse((cx - 0.25 * r, cy - 0.25 * r, cx + 0.25 * r, cy + 0.25 * r), fill=_shade(base, 0.6))
        return
    cos, sin = math.cos(math.radians(thing.theta)), math.sin(math.radians(thing.theta))
    for brightness, polygon in _PARTS[thing.kind]:
        fill = _shade(base, brightness)
        if thing.kind == "tennis court" and brightness == 0.0:
            fill = (150, 150, 150) if bright else (40, 120, 92)
        points = [(2 * thing.length * u, 2 * thing.breadth * v) for u, v in polygon]
        draw.polygon([(cx + x * cos + y * sin, cy - x * sin + y * cos) for x, y in points], fill=fill)


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Scene -> RGB image of SIZE x SIZE pixels, in the look of its sensor."""
    image = _background(rng, scene.name)
    if scene.flooded:
        field = _noise(rng, 5, 0, 1)
        covered = Image.fromarray(((field > np.quantile(field, 0.5)) * 215).astype(np.uint8))
        image.paste(Image.new("RGB", image.size, (98, 82, 58)), (0, 0), covered)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(draw, thing, bright=scene.sensor != "optical")
    image = image.reduce(2)
    if scene.sensor == "infrared":
        image = image.convert("L").filter(ImageFilter.GaussianBlur(0.7))
    pixels = np.asarray(image, np.float32)
    noise = np.random.default_rng(rng.getrandbits(64))
    if scene.sensor == "sar":
        gray = pixels.mean(axis=2)
        pixels = gray * noise.standard_gamma(20.0, gray.shape, np.float32) / 20.0
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    pixels = pixels + 4 * noise.standard_normal((SIZE, SIZE, 1), np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _plural(kind: str, count: int) -> str:
    return f"{count} {kind}" + ("" if count == 1 else "s")


def _phrase(thing: Thing, scene: Scene, rng: random.Random) -> str | None:
    """The shortest phrase that is true of this object alone, or None; sometimes a longer one for variety."""
    color = thing.color + " " if thing.color and scene.sensor == "optical" else ""
    size = "large " if thing.large else "small "

    def fits(with_color: bool, with_size: bool, with_position: bool) -> int:
        return sum(
            t.kind == thing.kind
            and (not with_color or t.color == thing.color)
            and (not with_size or t.large == thing.large)
            and (not with_position or t.position == thing.position)
            for t in scene.things
        )

    options = [(False, False, False), (True, False, False), (False, True, False), (True, True, False), (False, False, True)]
    unique = [o for o in options if (color or not o[0]) and fits(*o) == 1]
    if not unique:
        return None
    with_color, with_size, with_position = rng.choice(unique) if rng.random() < 0.5 else unique[0]
    text = (size if with_size else "") + (color if with_color else "") + thing.kind
    return text + (f" at the {thing.position}" if with_position else "")


def _inventory(scene: Scene) -> str:
    parts = [_plural(k, scene.count(k)) for k in KINDS if scene.count(k)]
    if not parts:
        return "no visible objects"
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def describe_region(thing: Thing, scene: Scene) -> str:
    """The region caption of an object."""
    color = thing.color + " " if thing.color and scene.sensor == "optical" else ""
    return f"a {'large' if thing.large else 'small'} {color}{thing.kind} at the {thing.position}"


def _questions_of_counts(scene: Scene, rng: random.Random) -> list[Conversation]:
    """RSVQA-style questions: presence, count, comparison, rural or urban; and the flood question where it applies."""

    def short(question: str, answer: str, category: str) -> Conversation:
        return Conversation("vqa", [(f"{question} {SHORT_ANSWER}", answer)], category)

    present = [k for k in KINDS if scene.count(k)]
    absent = [k for k in KINDS if not scene.count(k)]
    asked = rng.choice(present if present and (not absent or rng.random() < 0.5) else absent)
    yes_no = {True: "yes", False: "no"}
    found = [short(rng.choice((f"Is there a {asked}?", f"Is a {asked} present?")), yes_no[asked in present], "presence")]
    counted = rng.choice(present if present and rng.random() < 0.75 else list(KINDS))
    found.append(short(rng.choice((f"How many {counted}s are there?", f"What is the number of {counted}s?")),
                       str(scene.count(counted)), "count"))  # fmt: skip
    first, second = rng.sample(list(KINDS), 2)
    if present and rng.random() < 0.8:
        first = rng.choice(present)
        second = rng.choice([k for k in KINDS if k != first])
        first, second = (first, second) if rng.random() < 0.6 else (second, first)
    urban, can_flood, _, _ = SCENES[scene.name]
    compare = short(f"Are there more {first}s than {second}s?", yes_no[scene.count(first) > scene.count(second)], "comparison")
    rural = short("Is it a rural or an urban area?", "urban" if urban else "rural", "rural_urban")
    if can_flood:
        found.append(compare if rng.random() < 0.5 else rural)
        condition = "flooded" if scene.flooded else "non flooded"
        found.append(short("What is the overall condition of the area?", condition, "flood"))
    else:
        found += [compare, rural]
    return found


def converse(scene: Scene, rng: random.Random) -> list[Conversation]:
    """About eight conversations on a scene, over the paper's nine kinds of instruction (Table 2)."""
    flooded = "flooded " if scene.flooded else ""
    article = "an" if (flooded + scene.name)[0] in "aeiou" else "a"
    place = f"{SENSOR_NAMES[scene.sensor]} image of {article} {flooded}{scene.name}"
    ask_scene = rng.choice(("What is the class of this scene?", "Classify the scene."))
    found = [Conversation("scene_classification", [(f"{ask_scene} {SHORT_ANSWER}", scene.name)])]
    found += _questions_of_counts(scene, rng)
    found.append(
        Conversation(
            "captioning",
            [
                (
                    rng.choice(("Describe the image in detail.", "Give a detailed description.")),
                    f"{place} with {_inventory(scene)}.",
                )
            ],
        )
    )
    order = rng.sample(scene.things, len(scene.things))
    named = [(thing, phrase) for thing in order if (phrase := _phrase(thing, scene, rng))]
    for thing, phrase in named[:2]:
        question = rng.choice((f"{REFER} where is <p>{phrase}</p>?", f"{REFER} give the location of <p>{phrase}</p>."))
        found.append(Conversation("grounding", [(question, format_box(thing.box))], "refer"))
    if order:
        question = f"{IDENTIFY} what is at {format_box(order[0].box)}?"
        found.append(Conversation("region_captioning", [(question, describe_region(order[0], scene))], "identify"))
    extra = rng.randrange(3)
    if extra == 0 and 1 <= len(order) <= 2:
        parts = []
        for kind in KINDS:
            boxes = [t.box for t in scene.things if t.kind == kind]
            if boxes:
                parts.append(f"<p>{_plural(kind, len(boxes))}</p> {format_boxes(boxes)}")
        text = f"{place} with " + " and ".join(parts) + "."
        found.append(Conversation("grounded_captioning", [(f"{GROUNDING} describe the image in detail.", text)], "grounding"))
    elif extra == 1:
        use = SCENES[scene.name][3]
        found.append(
            Conversation("complex_question", [("What is this area mainly used for, and why?", f"It is used for {use}.")])
        )
    else:
        turns: list[tuple[str, str | None]] = [("What can be seen here?", _inventory(scene))]
        if order:
            turns.append(("Where is the largest object?", f"at the {max(order, key=lambda t: t.length).position}"))
        else:
            turns.append(("What kind of place is it?", scene.name))
        found.append(Conversation("conversation", turns))
    return found


def make_scene(seed: int, split: str, index: int) -> tuple[Scene, Image.Image, list[Conversation]]:
    """Scene, image and conversations number `index` of `split`; a pure function of its arguments."""
    rng = random.Random(f"{seed}/{split}/{index}")
    scene = plan_scene(rng)
    return scene, draw_scene(scene, rng), converse(scene, rng)


def make_record(seed: int, split: str, index: int) -> ImageRecord:
    """`make_scene` as an ImageRecord with a PNG. The split "unlabelled" keeps the prompts and hides the answers."""
    scene, image, conversations = make_scene(seed, split, index)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    if split == "unlabelled":
        conversations = [c.unlabelled() for c in conversations]
    return ImageRecord(f"{split}-{index:06d}", buffer.getvalue(), SIZE, SIZE, conversations, scene.sensor)


def records(seed: int, split: str, count: int) -> Iterator[ImageRecord]:
    """The first `count` records of `split`."""
    return (make_record(seed, split, i) for i in range(count))
