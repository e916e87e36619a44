"""The embedded data set: reproducible, varied, and true to its own drawings."""

import random
import time
from collections import Counter

import numpy as np
import pytest
from shapely.geometry import Polygon, box

from geodistill.data import synthetic
from geodistill.data.record import ImageRecord, validate
from geodistill.language import TASKS, box_corners, parse_boxes

COUNT = 300


@pytest.fixture(scope="module")
def made():
    """(scene, image, conversations) of the first training images."""
    return [synthetic.make_scene(0, "train", i) for i in range(COUNT)]


def test_deterministic_by_seed():
    for split in synthetic.SPLITS:
        assert synthetic.make_record(4, split, 17) == synthetic.make_record(4, split, 17)
        assert synthetic.make_record(4, split, 17).image != synthetic.make_record(5, split, 17).image
    assert list(synthetic.records(4, "val", 3)) == [synthetic.make_record(4, "val", i) for i in range(3)]


def test_splits_share_no_image():
    images = [synthetic.make_record(0, split, i).image for split in synthetic.SPLITS for i in range(60)]
    assert len(set(images)) == len(images)
    names = [synthetic.make_record(0, split, i).id for split in synthetic.SPLITS for i in range(3)]
    assert len(set(names)) == len(names)


def test_variety(made):
    scenes = [scene for scene, _, _ in made]
    assert len({s.name for s in scenes}) >= 10
    assert len({t.kind for s in scenes for t in s.things}) >= 5
    assert {s.sensor for s in scenes} == {"optical", "sar", "infrared"}
    assert {s.flooded for s in scenes} == {True, False}
    assert {len(s.things) for s in scenes} == {0, 1, 2, 3, 4}


def test_all_nine_kinds_of_instruction_occur(made):
    """Table 2: VQA and the flood questions are two of them; every other task is one."""
    kinds = Counter("flood" if c.category == "flood" else c.task for _, _, talk in made for c in talk)
    assert set(kinds) == {*TASKS, "flood"} - {"detection"}
    assert len(kinds) == 9 and min(kinds.values()) >= 20
    per_image = [len(talk) for _, _, talk in made]
    assert 6 < np.mean(per_image) < 11
    assert any(len(c.turns) > 1 for _, _, talk in made for c in talk)


def test_every_record_is_valid():
    for split in synthetic.SPLITS:
        for record in synthetic.records(0, split, 50):
            validate(record)
            assert ImageRecord.from_row(record.to_row()) == record
            answers = [answer for c in record.conversations for _, answer in c.turns]
            assert all((answer is None) == (split == "unlabelled") for answer in answers)


def test_answers_are_true(made):
    for scene, _, talk in made:
        for c in talk:
            (question, answer), *_ = c.turns
            if c.category == "count":
                kind = next(k for k in synthetic.KINDS if f"{k}s" in question)
                assert int(answer) == scene.count(kind)
            elif c.category == "presence":
                kind = next(k for k in synthetic.KINDS if k in question)
                assert answer == ("yes" if scene.count(kind) else "no")
            elif c.task == "scene_classification":
                assert answer == scene.name
            elif c.category == "refer":
                assert parse_boxes(answer)[0] in [t.box for t in scene.things]


def test_answers_need_the_image(made):
    """No answer to a yes-no question is so common that language alone would do."""
    answers = Counter(c.turns[0][1] for _, _, talk in made for c in talk if c.category == "presence")
    assert 0.3 < answers["yes"] / sum(answers.values()) < 0.7


def test_boxes_hold_the_drawn_objects(made):
    """What an object changes in the image lies in its box, turn included, and reaches all four sides of the box."""
    checked = 0
    for index, (scene, _, _) in enumerate(made[:60]):
        if scene.sensor != "optical":
            continue  # infrared blurs, radar speckles
        rng = random.Random(f"0/train/{index}")
        assert synthetic.plan_scene(rng) == scene
        state = rng.getstate()

        def draw(*things, rng=rng, scene=scene, state=state):
            rng.setstate(state)
            return np.asarray(synthetic.draw_scene(synthetic.Scene(scene.name, "optical", scene.flooded, things), rng), np.int16)

        empty = draw()
        for thing in scene.things:
            y, x = np.nonzero((draw(thing) != empty).any(-1))
            turned = Polygon(box_corners(thing.box, synthetic.SIZE, synthetic.SIZE))
            pixels = [box(i, k, i + 1, k + 1) for i, k in zip(x, y, strict=True)]
            inside = [turned.buffer(1.0).intersects(pixel.centroid) for pixel in pixels]
            assert np.mean(inside) > 0.98
            low_x, low_y, high_x, high_y = turned.bounds
            reach = np.array([x.min() - low_x, y.min() - low_y, high_x - x.max() - 1, high_y - y.max() - 1])
            limit = 3 if thing.kind in ("tennis court", "bridge", "vehicle", "storage tank") else 8  # pointed ends fill less
            assert (reach > -2).all() and (reach < limit).all()
            assert box(-1, -1, synthetic.SIZE + 1, synthetic.SIZE + 1).contains(turned)
            checked += 1
    assert checked > 40


def test_objects_do_not_hide_each_other(made):
    for scene, _, _ in made[:100]:
        shapes = [Polygon(box_corners(t.box, synthetic.SIZE, synthetic.SIZE)) for t in scene.things]
        for i, a in enumerate(shapes):
            assert all(a.intersection(b).area < 0.5 * min(a.area, b.area) for b in shapes[:i])


def test_time_per_image():
    start = time.process_time()
    for _ in synthetic.records(1, "train", 100):
        pass
    milliseconds = 10 * (time.process_time() - start)
    print(f"{milliseconds:.2f} ms per image")
    assert milliseconds < 10
