"""Detection data sets -> instructions: what their sources share, from a list of objects to tiles, phrases and questions.

Size: an object is "large" ("small") if its area is at least 1.5 times (at most 1/1.5 of) the median of its kind in the tile,
and its kind is there more than once. Place: the third of the tile, across and down, in which its centre lies.
A tile shows an object whole, or cut to the part inside if that is data.min_visible of its area or more, or not at all.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median

from shapely import Polygon, box
from shapely.geometry.base import BaseGeometry

from geodistill.config import DataConfig
from geodistill.data.imagery import encode
from geodistill.data.record import BadRecord, Conversation, ImageRecord, open_image
from geodistill.data.sources.base import IMAGE_SUFFIXES, Item, Root, new_record, read_image, split_of
from geodistill.language import GROUNDING, IDENTIFY, REFER, Box, box_from_corners, check_boxes, format_box, format_boxes

LARGE = 1.5
MOST_ASKED = 4  # referring and region questions of a tile, each
MOST_GROUNDED = 5  # boxes in one grounded description
_DOWN, _ACROSS = ("top", "", "bottom"), ("left", "", "right")


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

    def items_of(self, images: list[str], labels: dict[str, str], split: Callable[[str], str]) -> list[Item]:
        """One item an image that has a label file, in order of path. `labels`: stem of an image -> label file.

        split: path of an image -> its split, or "" where a hash decides.

        Raises ValueError where no image has one; an image without labels is set aside.
        """
        found = []
        for image in images:
            stem = image.rpartition("/")[2].rpartition(".")[0]
            ref = {"file": image, "labels": labels[stem]} if stem in labels else {
                "file": image, "field": "labels", "reason": "has no annotation file of its name"}  # fmt: skip
            found.append(Item(split(image) or split_of(self.data, image), image, ref))
        if not any("labels" in item.ref for item in found):
            raise ValueError(
                f"none of the {len(images)} images ({', '.join(IMAGE_SUFFIXES)}) below data.root={self.root.uri} has one of the "
                f"{len(labels)} annotation files: set data.root to the folder that holds both"
            )
        return found

    def make(self, item: Item) -> Iterator[ImageRecord | BadRecord]:
        """A record for every tile that shows an object; a BadRecord for each object that cannot be used."""
        image, width, height = read_image(self.root, item, self.data.bands)
        objects = []
        for i, found in enumerate(self.objects(item, width, height)):
            reason = found if isinstance(found, BadRecord) else _unusable(found)
            if isinstance(reason, BadRecord):
                yield reason
            elif reason:
                yield BadRecord(item.id, f"objects[{i}]", reason)
            elif isinstance(found, Object):
                objects.append((i, found))
        if not objects:
            raise BadRecord(item.id, "objects", "is empty: there is nothing to ask for")
        side = self.data.tile
        places = tiles(width, height, side, self.data.tile_overlap) if side and max(width, height) > side else []
        picture = open_image(image, item.id) if places else None
        for place in places or [(0, 0, width, height)]:
            seen: list[Seen] = []
            for i, found in objects:
                shown = visible(found, place, self.data.min_visible, self.data.horizontal)
                if shown is None:
                    continue
                reason = check_boxes(format_box(shown.box))
                if reason:
                    yield BadRecord(item.id, f"objects[{i}]", f"{reason}: too small for a tile of this size; lower data.tile")
                else:
                    seen.append(shown)
            if not any(not s.difficult for s in seen):
                continue
            name = f"{item.id}#{','.join(map(str, place))}" if places else item.id
            kinds = ask(describe(seen), random.Random(f"{self.data.seed}/{name}"), self.data.horizontal, self.data.max_boxes)
            shot = encode(picture.crop(place)) if picture else image
            size = (place[2] - place[0], place[3] - place[1])
            yield new_record(self.data, replace(item, id=name), shot, *size, kinds)


def folder_split(path: str) -> str:
    """The split that a folder above a file names (train, val or valid, test), or ""."""
    names = [name.lower() for name in path.split("/")[:-1]]
    return next((split for name in names for split in ("train", "val", "test") if name == split or name == f"{split}id"), "")


def _unusable(found: Object) -> str | None:
    shape = Polygon(found.corners) if len(found.corners) >= 3 else None
    if shape is None or not shape.is_valid or shape.area < 1:
        return f"{found.kind} with corners {[tuple(round(v) for v in c) for c in found.corners]} encloses no area"
    return None


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


def visible(found: Object, tile: tuple[int, int, int, int], least: float, horizontal: bool) -> Seen | None:
    """What a tile shows of an object: whole, cut to the part inside, or None below the share `least` of its area."""
    x, y, x2, y2 = tile
    whole: BaseGeometry = Polygon(found.corners)
    inside = whole.intersection(box(*tile))
    share = inside.area / whole.area
    if share < least or not inside.area:
        return None
    if horizontal:
        shape = box(*(inside if share < 0.999 else whole).bounds)
    else:
        shape = (inside if share < 0.999 else whole).minimum_rotated_rectangle
    corners = [(cx - x, cy - y) for cx, cy in shape.exterior.coords[:4]]
    return Seen(
        found.kind, box_from_corners(corners, x2 - x, y2 - y), shape.area, found.difficult, "", _place(corners, x2 - x, y2 - y)
    )


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
        middle = median(areas[s.kind])
        if len(areas[s.kind]) > 1 and s.area >= LARGE * middle:
            return "large"
        return "small" if len(areas[s.kind]) > 1 and s.area <= middle / LARGE else ""

    return [replace(s, size=size(s)) for s in seen]


def plural(kind: str, count: int) -> str:
    """ "1 ship", "3 ships"."""
    return f"{count} {kind}" + ("" if count == 1 else "es" if kind.endswith(("s", "sh", "ch", "x")) else "s")


def ask(seen: list[Seen], rng: random.Random, horizontal: bool, most: int) -> list[Conversation]:
    """Referring, region captions, a grounded description, and detection of every kind; no answer holds over `most` boxes."""
    sure = [s for s in seen if not s.difficult]
    alike, by_place, by_kind = defaultdict(list), defaultdict(list), defaultdict(list)
    for s in seen:  # the difficult ones too: a phrase must not fit them either
        alike[s.phrase].append(s)
        by_place[s.kind, s.place].append(s)
        by_kind[s.kind].append(s)
    found = []
    for s in rng.sample(sure, len(sure)):
        if len(alike[s.phrase]) == 1 and len(found) < MOST_ASKED:
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
        text = "There " + ("is " if len(seen) == 1 else "are ") + " and ".join(parts) + "."
        found.append(Conversation("grounded_captioning", [(f"{GROUNDING} describe the image in detail.", text)], "grounding"))
    how = "horizontal" if horizontal else "oriented"
    for kind, group in by_kind.items():
        asked = [s for s in group if not s.difficult]
        if asked and len(asked) <= most:
            question = f"Detect every <p>{kind}</p> with {how} boxes."
            found.append(Conversation("detection", [(question, format_boxes([s.box for s in asked]))], kind))
    return found
