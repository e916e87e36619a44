"""Detection data sets -> instructions: what their sources share, from a list of objects to tiles, phrases and questions.

Size: an object is "large" ("small") if its area is at least 1.5 times (at most 1/1.5 of) the median of its kind in the tile,
and its kind is there more than once and has no such word in its name ("small vehicle").
Place: the third of the tile, across and down, in which its centre lies: "top left", ..., "center", ..., "bottom right".
A tile shows an object whole, or cut to the part inside if that is data.min_visible of its area or more, or not at all.
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median

from shapely import Polygon, box
from shapely.geometry.base import BaseGeometry

from geodistill.config import DataConfig
from geodistill.data.imagery import encode
from geodistill.data.record import BadRecord, Conversation, ImageRecord, NothingToAsk, open_image
from geodistill.data.sources.base import IMAGE_SUFFIXES, Item, Root, new_record, read_image, split_of
from geodistill.language import GROUNDING, IDENTIFY, REFER, Box, box_from_corners, check_boxes, format_box, format_boxes

LARGE = 1.5
MOST_ASKED = 4  # referring and region questions of a tile, each
MOST_GROUNDED = 5  # boxes in one grounded description
_DOWN, _ACROSS = ("top", "", "bottom"), ("left", "", "right")
_JOINED = {
    "baseballfield": "baseball field",
    "basketballcourt": "basketball court",
    "golffield": "golf field",
    "groundtrackfield": "ground track field",
    "storagetank": "storage tank",
    "tenniscourt": "tennis court",
    "trainstation": "train station",
}  # DIOR writes two words as one


@dataclass(frozen=True)
class Object:
    """An annotated object. corners: (x, y) in pixels, in order around it. difficult: seen, but not asked for."""

    kind: str
    corners: tuple[tuple[float, float], ...]
    difficult: bool = False


@dataclass(frozen=True)
class Seen:
    """An object in a tile: its kind, box text units, and the words for its size and place."""

    kind: str
    box: Box
    area: float
    difficult: bool
    size: str = ""
    place: str = ""

    @property
    def phrase(self) -> str:
        return f"{self.size} {self.kind} at the {self.place}".strip()


class DetectionSource:
    """A source whose items are images and whose annotations are objects: a subclass lists them and parses one."""

    def __init__(self, data: DataConfig):
        self.data, self.root = data, Root(data)

    def objects(self, item: Item, width: int, height: int) -> Iterator[Object | BadRecord]:
        """The objects of an image of width x height pixels; a BadRecord for what cannot be read. May raise BadRecord."""
        raise NotImplementedError

    def items_of(self, images: list[str], labels: list[str], split: Callable[[str], str]) -> list[Item]:
        """One item an image, in order of path; `labels`: the annotation files, of which an image has that of its own stem.

        Of several the one whose folders are most like the image's is taken. split: path of an image -> its split, or ""
        where a hash decides. Raises ValueError where no image has a file; an image without one is set aside.
        """
        by_stem = defaultdict(list)
        for path in labels:
            by_stem[stem_of(path)].append(path)
        found = []
        for image in images:
            found.append(Item(split(image) or split_of(self.data, image), image, _label(image, by_stem[stem_of(image)])))
        if not any("labels" in item.ref for item in found):
            raise ValueError(
                f"none of the {len(images)} images ({', '.join(IMAGE_SUFFIXES)}) below data.root={self.root.uri} has one of the "
                f"{len(labels)} annotation files: set data.root to the folder that holds both"
            )
        return found

    def labels(self, item: Item) -> bytes:
        """The annotation file of an item. Raises BadRecord."""
        try:
            return self.root.read(item.ref["labels"])
        except OSError as error:
            raise BadRecord(item.id, "labels", f"{item.ref['labels']} cannot be read ({error})") from error

    def lines(self, item: Item) -> list[str]:
        """The lines of its annotation file. Raises BadRecord."""
        return self.labels(item).decode("utf-8-sig", "replace").splitlines()

    def make(self, item: Item) -> Iterator[ImageRecord | BadRecord]:
        """A record for every tile that shows an object; a BadRecord for each object that cannot be used."""
        image, width, height = read_image(self.root, item, self.data.bands)
        objects, unusable = [], 0
        for i, found in enumerate(self.objects(item, width, height)):
            reason = found if isinstance(found, BadRecord) else _unusable(found)
            if reason:
                unusable += 1
                yield reason if isinstance(reason, BadRecord) else BadRecord(item.id, f"objects[{i}]", reason)
            elif isinstance(found, Object):
                objects.append((i, found))
        if unusable and not objects:
            raise BadRecord(item.id, "objects", f"none of its {unusable} objects can be used")
        if all(found.difficult for _, found in objects):
            raise NothingToAsk(item.id, "objects", "is empty or all difficult: there is nothing to ask for")
        side = self.data.tile
        places = tiles(width, height, side, self.data.tile_overlap) if side and max(width, height) > side else []
        picture = open_image(image, item.id) if places else None
        made, small = False, 0
        for place in places or [(0, 0, width, height)]:
            seen: list[Seen] = []
            for i, found in objects:
                shown = visible(found, place, self.data)
                if shown is None:
                    continue
                reason = check_boxes(format_box(shown.box))
                if reason:
                    small += 1
                    remedy = "lower data.tile" if side else "set data.tile"
                    yield BadRecord(item.id, f"objects[{i}]", f"{reason}: too small for a tile of this size; {remedy}")
                seen.append(replace(shown, difficult=shown.difficult or bool(reason)))  # no phrase may fit it either
            if not any(not s.difficult for s in seen):
                continue
            name = f"{item.id}#{','.join(map(str, place))}" if places else item.id
            kinds = ask(describe(seen), random.Random(f"{self.data.seed}/{name}"), self.data.horizontal, self.data.max_boxes)
            shot = encode(picture.crop(place)) if picture else image
            size = (place[2] - place[0], place[3] - place[1])
            made = True
            yield new_record(self.data, replace(item, id=name), shot, *size, kinds)
        if not made:
            reason = f"show less than data.min_visible={self.data.min_visible} of their area"
            raise BadRecord(item.id, "objects", "are too small in an image of this size" if small else reason)


def stem_of(path: str) -> str:
    """ "train/images/P0001.png" -> "P0001"."""
    return path.rpartition("/")[2].rpartition(".")[0]


def kind_of(name: str) -> str:
    """A data set's name of a class as words: "small-vehicle", "tenniscourt", "Dry-Cargo-Ship", but "Boeing737"."""
    words = re.sub(r"[-_\s]+", " ", name).strip().split(" ")
    text = " ".join(word if re.search(r"\d", word) else word.lower() for word in words)
    return _JOINED.get(text, text)


def _label(image: str, labels: list[str]) -> dict[str, str]:
    """The ref of an image, with the annotation file, of those with its stem, whose folders are most like its own."""
    here = {part.lower() for part in image.split("/")[:-1]}
    alike = {path: len(here & {part.lower() for part in path.split("/")[:-1]}) for path in labels}
    best = [path for path in labels if alike[path] == max(alike.values())]
    if len(best) == 1:
        return {"file": image, "labels": best[0]}
    reason = f"may be {best[0]!r} or {best[1]!r}: keep one below data.root" if best else "has no annotation file of its name"
    return {"file": image, "field": "labels", "reason": reason}


def _unusable(found: Object) -> str | None:
    if all(math.isfinite(v) for corner in found.corners for v in corner):
        shape = Polygon(found.corners)
        if shape.is_valid and shape.area >= 1:
            return None
    corners = ", ".join(f"({x:.0f}, {y:.0f})" for x, y in found.corners)
    return f"{found.kind} with corners {corners} encloses no area"


def tiles(width: int, height: int, side: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """(x1, y1, x2, y2) in pixels of squares of `side` that cover an image, `overlap` pixels shared by neighbours at least.

    They are spread evenly, the last ends with the image; an image that is smaller one way is not padded.
    """

    def starts(length: int) -> list[int]:
        if length <= side:
            return [0]
        count = -(-(length - overlap) // (side - overlap))
        return [round(i * (length - side) / (count - 1)) for i in range(count)]

    return [(x, y, min(x + side, width), min(y + side, height)) for y in starts(height) for x in starts(width)]


def visible(found: Object, tile: tuple[int, int, int, int], data: DataConfig) -> Seen | None:
    """What a tile shows of an object: whole, cut to the part inside, or None below data.min_visible of its area."""
    x, y, x2, y2 = tile
    whole: BaseGeometry = Polygon(found.corners)
    inside = whole.intersection(box(*tile))
    share = inside.area / whole.area
    if share < data.min_visible or not inside.area:
        return None
    if data.horizontal:
        shape = box(*(inside if share < 0.999 else whole).bounds)
    else:
        shape = (inside if share < 0.999 else whole).minimum_rotated_rectangle
    corners = [(cx - x, cy - y) for cx, cy in shape.exterior.coords[:4]]
    size = (x2 - x, y2 - y)
    written = box_from_corners(corners, *size, data.angle_counter_clockwise)
    return Seen(found.kind, written, shape.area, found.difficult, "", _place(corners, *size))


def _place(corners: list[tuple[float, float]], width: float, height: float) -> str:
    cx, cy = (sum(c[i] for c in corners) / len(corners) for i in (0, 1))
    down, across = _DOWN[min(int(3 * max(cy, 0) / height), 2)], _ACROSS[min(int(3 * max(cx, 0) / width), 2)]
    return f"{down} {across}".strip() or "center"


def describe(seen: list[Seen]) -> list[Seen]:
    """The same objects with their words of size."""
    areas = defaultdict(list)
    for s in seen:
        areas[s.kind].append(s.area)

    def size(s: Seen) -> str:
        if len(areas[s.kind]) == 1 or s.kind.startswith(("small ", "large ")):
            return ""
        middle = median(areas[s.kind])
        return "large" if s.area >= LARGE * middle else "small" if s.area <= middle / LARGE else ""

    return [replace(s, size=size(s)) for s in seen]


def plural(kind: str, count: int) -> str:
    """ "1 ship", "3 ships"."""
    if count == 1 or kind.endswith("craft"):
        return f"{count} {kind}"
    if re.search(r"[^aeiou]y$", kind):
        return f"{count} {kind[:-1]}ies"
    return f"{count} {kind}" + ("es" if kind.endswith(("s", "sh", "ch", "x")) else "s")


def ask(seen: list[Seen], rng: random.Random, horizontal: bool, most: int) -> list[Conversation]:
    """Referring, region captions, a grounded description, and detection of every kind; no answer holds over `most` boxes."""
    sure = [s for s in seen if not s.difficult]
    alike, by_place, by_kind = defaultdict(list), defaultdict(list), defaultdict(list)
    for s in seen:  # the difficult ones too: a phrase must not fit them either
        alike[s.phrase].append(s)
        by_place[s.kind, s.place].append(s)
        by_kind[s.kind].append(s)
    found: list[Conversation] = []
    for s in rng.sample(sure, len(sure)):
        fits = by_place[s.kind, s.place] if not s.size else alike[s.phrase]  # "ship at the left" is true of a large one too
        if len(fits) == 1 and len(found) < MOST_ASKED:
            question = rng.choice((f"{REFER} where is <p>{s.phrase}</p>?", f"{REFER} give the location of <p>{s.phrase}</p>."))
            found.append(Conversation("grounding", [(question, format_box(s.box))], "refer"))
    for (kind, place), group in by_place.items():
        if 1 < len(group) <= min(most, MOST_GROUNDED) and not any(s.difficult for s in group):
            question = f"{REFER} where are <p>{plural(kind, len(group))} at the {place}</p>?"
            found.append(Conversation("grounding", [(question, format_boxes([s.box for s in group]))], "refer"))
    for s in rng.sample(sure, min(MOST_ASKED, len(sure))):
        question = f"{IDENTIFY} what is at {format_box(s.box)}?"
        found.append(Conversation("region_captioning", [(question, f"1 {s.phrase}")], "identify"))
    if len(seen) == len(sure) <= MOST_GROUNDED:
        parts = [f"<p>{plural(k, len(v))}</p> {format_boxes([s.box for s in v])}" for k, v in by_kind.items()]
        listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
        text = f"There {'is' if len(next(iter(by_kind.values()))) == 1 else 'are'} {listed}."
        found.append(Conversation("grounded_captioning", [(f"{GROUNDING} describe the image in detail.", text)], "grounding"))
    how = "horizontal" if horizontal else "oriented"
    for kind, group in by_kind.items():
        asked = [s for s in group if not s.difficult]
        if asked and len(asked) <= most:
            question = f"Detect every <p>{kind}</p> with {how} boxes."
            found.append(Conversation("detection", [(question, format_boxes([s.box for s in asked]))], kind))
    return found
