"""Detection sets: formats in their original layouts, tiles, phrases, and boxes that come back as they were drawn."""

import json
import math
import random

import numpy as np
import pytest
from shapely import Polygon

from geodistill.config import DataConfig
from geodistill.data.sources import open_source
from geodistill.data.sources.detection import Object, ask, describe, kind_of, plural, tiles, visible
from geodistill.language import Box, box_corners, box_from_corners, parse_boxes

from .test_sources import make_all, picture, put

ALL_TRAIN = {"val_fraction": 0.0, "test_fraction": 0.0}


def rectangle(cx, cy, w, h, degrees):
    """Corners of a rectangle turned counter-clockwise on the screen."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = ((-w / 2, -h / 2), (w / 2, -h / 2), (w / 2, h / 2), (-w / 2, h / 2))
    return tuple((cx + x * c + y * s, cy - x * s + y * c) for x, y in corners)


def iou(a, b):
    a, b = Polygon(a), Polygon(b)
    return a.intersection(b).area / a.union(b).area


def test_corners_to_box_text_and_back():
    rng = random.Random(0)
    for _ in range(500):
        width, height = rng.choice([(800, 800), (1000, 400)])
        corners = rectangle(
            rng.uniform(200, 600), rng.uniform(150, 250), rng.uniform(60, 300), rng.uniform(60, 300), rng.uniform(0, 360)
        )
        start = rng.randrange(4)
        turned = corners[start:] + corners[:start]
        box = box_from_corners(turned[::-1] if rng.random() < 0.5 else turned, width, height)
        assert 0 <= box.theta <= 90
        assert iou(box_corners(box, width, height), corners) > 0.8  # a percent is up to 10 pixels
    assert box_from_corners(((10, 20), (30, 20), (30, 60), (10, 60)), 100, 100) == box_from_corners(
        ((30, 60), (10, 60), (10, 20), (30, 20)), 100, 100
    )


def test_tiles_cover_the_image_and_end_with_it():
    for width, height, side, overlap in (
        (1000, 700, 512, 100),
        (513, 512, 512, 0),
        (300, 2000, 512, 128),
        (4096, 4096, 1024, 200),
    ):
        seen = np.zeros((height, width), int)
        found = tiles(width, height, side, overlap)
        for x1, y1, x2, y2 in found:
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            assert (x2 - x1, y2 - y1) == (min(side, width), min(side, height))
            seen[y1:y2, x1:x2] += 1
        assert seen.min() >= 1 and len(set(found)) == len(found)


def test_an_object_is_whole_cut_or_dropped_by_the_share_that_a_tile_shows():
    ship = Object("ship", rectangle(100, 50, 40, 20, 0))
    tile = (0, 0, 100, 100)  # its right edge halves the ship
    whole = visible(ship, (0, 0, 200, 100), DataConfig())
    half = visible(ship, tile, DataConfig())
    assert (whole.box.x1, whole.box.x2, whole.place) == (40, 60, "center")
    assert (half.box.x1, half.box.y1, half.box.x2, half.box.y2) == (80, 40, 100, 60) and half.place == "right"
    assert visible(ship, tile, DataConfig(min_visible=0.51)) is None
    oblique = Object("ship", rectangle(50, 50, 60, 10, 45))
    flat = visible(oblique, tile, DataConfig(horizontal=True))
    assert flat.box.theta == 0 and flat.box.x2 - flat.box.x1 > 45
    assert visible(oblique, tile, DataConfig()).box.theta == 45


def test_words_of_size_and_place():
    things = [Object("car", rectangle(15, 15, 8, 8, 0)), Object("car", rectangle(50, 50, 8, 8, 0)),
              Object("car", rectangle(85, 85, 16, 16, 0)), Object("plane", rectangle(15, 85, 20, 20, 0))]  # fmt: skip
    seen = describe([visible(t, (0, 0, 100, 100), DataConfig()) for t in things])
    assert [s.phrase for s in seen] == ["car at the top left", "car at the center", "large car at the bottom right",
                                        "plane at the bottom left"]  # fmt: skip
    assert [plural(kind, 3) for kind in ("bus", "bridge", "ferry", "chimney", "aircraft")] == [
        "3 buses", "3 bridges", "3 ferries", "3 chimneys", "3 aircraft"]  # fmt: skip
    assert plural("ship", 1) == "1 ship"
    named = [Object("small vehicle", rectangle(x, 50, side, side, 0)) for x, side in ((20, 8), (50, 8), (80, 20))]
    assert [s.phrase for s in describe([visible(t, (0, 0, 100, 100), DataConfig()) for t in named])] == [
        f"small vehicle at the {place}" for place in ("left", "center", "right")
    ]  # no "small small vehicle"


@pytest.mark.parametrize(
    ("name", "words"),
    [("small-vehicle", "small vehicle"), ("tenniscourt", "tennis court"), ("Expressway-toll-station", "expressway toll station"),
     ("Dry-Cargo-Ship", "dry cargo ship"), ("Small Car", "small car"), ("Boeing737", "Boeing737"),
     ("container_crane", "container crane")],
)  # fmt: skip
def test_names_of_classes_become_words(name, words):
    assert kind_of(name) == words


def test_phrases_fit_one_object_and_answers_hold_its_box():
    rng = random.Random(1)
    for _ in range(30):
        places = [(rng.uniform(10, 90), rng.uniform(10, 90), 8, rng.uniform(4, 12), 0) for _ in range(8)]
        things = [Object(rng.choice(["car", "ship"]), rectangle(*place), rng.random() < 0.2) for place in places]
        seen = describe([visible(t, (0, 0, 100, 100), DataConfig()) for t in things])
        for c in ask(seen, random.Random(0), False, 20):
            ((question, answer),) = c.turns
            boxes = parse_boxes(answer if c.task != "region_captioning" else question)
            if c.task in ("grounding", "region_captioning") and "where are" not in question:
                phrase = question.split("<p>")[1].split("</p>")[0] if c.task == "grounding" else answer.removeprefix("1 ")
                plain = phrase.split(" at the ")[0] in ("car", "ship")
                fitting = [s for s in seen if s.phrase == phrase or (plain and phrase == f"{s.kind} at the {s.place}")]
                assert boxes[0] in [s.box for s in fitting]
                assert c.task == "region_captioning" or (len(fitting) == 1 and not fitting[0].difficult)
            if c.task == "detection":
                assert boxes == [s.box for s in seen if s.kind == c.category and not s.difficult]


BOX = "10 20 60 20 60 50 10 50"
DIOR = """<annotation><object><name>tenniscourt</name>
<bndbox><xmin>10</xmin><ymin>20</ymin><xmax>60</xmax><ymax>50</ymax></bndbox></object><object><name>ship</name></object></annotation>"""
DIOR_R = """<annotation><object><type>robndbox</type><name>Expressway-toll-station</name><difficult>0</difficult><robndbox>
<x_left_top>10</x_left_top><y_left_top>20</y_left_top><x_right_top>60</x_right_top><y_right_top>20</y_right_top>
<x_right_bottom>60</x_right_bottom><y_right_bottom>50</y_right_bottom><x_left_bottom>10</x_left_bottom><y_left_bottom>50</y_left_bottom>
</robndbox></object></annotation>"""
FAIR1M = """<annotation><objects><object><possibleresult><name>Boeing737</name></possibleresult><points><point>-20,20</point>
<point>60,20</point><point>60,50</point><point>-20,50</point><point>-20,20</point></points></object></objects></annotation>"""
COCO = {
    "images": [{"id": 7, "file_name": "old/a.jpg"}, {"id": 8, "file_name": "gone.png"}],
    "categories": [{"id": 1, "name": "ship"}],
    "annotations": [{"image_id": 7, "category_id": 1, "bbox": [10, 20, 50, 30], "iscrowd": 0},
                    {"image_id": 7, "category_id": 9, "bbox": [10, 20, 50, 30]},
                    {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3]}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "files", "kind", "box", "rejected"),
    [
        ("dota", {"images/a.png": None, "labelTxt/a.txt": f"imagesource:Google\ngsd:0.2\n{BOX} small-vehicle 0\n1 2 ship\n"},
         "small vehicle", (10, 20, 60, 50), ["line 4"]),
        ("dior", {"JPEGImages-test/a.png": None, "Annotations/Horizontal Bounding Boxes/a.xml": DIOR}, "tennis court",
         (10, 20, 60, 50), ["object[1]"]),
        ("dior", {"x/a.png": None, "Annotations/Horizontal Bounding Boxes/a.xml": DIOR,
                  "Annotations/Oriented Bounding Boxes/a.xml": DIOR_R}, "expressway toll station", (10, 20, 60, 50), []),
        ("fair1m", {"images/a.png": None, "labelXml/a.xml": FAIR1M}, "Boeing737", (0, 20, 60, 50), []),
        ("yolo", {"a.png": None, "a.txt": "1 0.35 0.35 0.5 0.3\n7 0.1 0.1 0.1 0.1\n", "x.names": "car\nship\n"}, "ship",
         (10, 20, 60, 50), ["line 2"]),
        ("coco", {"a.png": None, "ann.json": json.dumps(COCO)}, "ship", (10, 20, 60, 50),
         ["annotations[1]", "annotations[2]", "file_name"]),
    ],
)  # fmt: skip
def test_original_layouts(tmp_path, source, files, kind, box, rejected):
    put(tmp_path, {name: picture("PNG", (100, 100)) if data is None else data.encode() for name, data in files.items()})
    good, bad = make_all(DataConfig(source=source, root=str(tmp_path), **ALL_TRAIN))
    (record,) = good.values()
    asked = [c for c in record.conversations if c.task == "detection"]
    assert [c.category for c in asked] == [kind]
    (found,) = parse_boxes(asked[0].turns[0][1])
    assert (found.x1, found.y1, found.x2, found.y2) == box
    assert sorted(field for field, _ in bad.values()) == sorted(rejected)
    assert {"grounding", "region_captioning", "grounded_captioning", "detection"} <= {c.task for c in record.conversations}


def test_a_large_image_is_cut_and_its_boxes_belong_to_the_tiles(tmp_path):
    lines = [f"{x} {y} {x + 40} {y} {x + 40} {y + 20} {x} {y + 20} ship 0" for x, y in ((10, 10), (280, 190), (295, 20))]
    put(tmp_path, {"images/a.png": picture("PNG", (500, 250)), "labelTxt/a.txt": "\n".join(lines).encode()})
    data = DataConfig(source="dota", root=str(tmp_path), tile=250, tile_overlap=50, **ALL_TRAIN)
    good, bad = make_all(data)
    assert not bad and {(r.width, r.height) for r in good.values()} == {(250, 250)}
    assert len(good) == 3 and all("#" in name for name in good)
    counts = sum(len(parse_boxes(c.turns[0][1])) for r in good.values() for c in r.conversations if c.task == "detection")
    assert counts == 5  # two ships lie in two tiles each


def test_images_without_labels_and_folders_without_any_are_named(tmp_path):
    put(tmp_path, {"images/a.png": picture(), "images/b.png": picture(), "labelTxt/a.txt": f"{BOX} ship 0".encode()})
    _, bad = make_all(DataConfig(source="dota", root=str(tmp_path), **ALL_TRAIN))
    assert bad["images/b.png"] == ("labels", "has no annotation file of its name")
    (tmp_path / "labelTxt/a.txt").unlink()
    with pytest.raises(ValueError, match=r"none of the 2 images .* set data\.root"):
        open_source(DataConfig(source="dota", root=str(tmp_path))).items()


@pytest.mark.parametrize("angle", [0, 1, 30, 45, 60, 89])
@pytest.mark.parametrize("counter_clockwise", [True, False])
def test_the_sign_of_theta_is_written_as_it_is_read(angle, counter_clockwise):
    """Corners -> box text -> corners, either sign: the same rectangle, up to the rounding to whole percents and degrees."""
    true = Polygon(box_corners(Box(20, 40, 80, 60, angle), 400, 400, counter_clockwise=True))
    written = box_from_corners(list(true.exterior.coords[:4]), 400, 400, counter_clockwise)
    read = Polygon(box_corners(written, 400, 400, counter_clockwise))
    assert 0 <= written.theta < 90 and read.intersection(true).area / read.union(true).area > 0.93
