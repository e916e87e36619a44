"""Box text and geometry, and the prompt template."""

import math
import random

import pytest

from geodistill import language
from geodistill.language import (
    Box,
    box_corners,
    box_from_center,
    check_boxes,
    format_box,
    format_boxes,
    parse_boxes,
    speaks_of_place,
)


def test_box_text_round_trip():
    rng = random.Random(0)
    boxes = [Box(*(rng.randint(-33, 131) for _ in range(4)), rng.randint(-180, 180)) for _ in range(200)]
    assert all(parse_boxes(format_box(b)) == [b] for b in boxes)
    assert parse_boxes(format_boxes(boxes)) == boxes
    assert format_box(Box(1, 2, 30, 40, 90)) == "{<1><2><30><40>|<90>}"


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("none", []),
        ("", []),
        ("<77><981>", []),
        ("{<1><2><3>|<4>}", []),
        ("{<1><2><3><4>}", [Box(1, 2, 3, 4, 0)]),
        ("at {< 1 ><2><3><4>|<-5>}, and {<6><7><8><9>|<0>}.", [Box(1, 2, 3, 4, -5), Box(6, 7, 8, 9, 0)]),
    ],
)
def test_parse_boxes(text, boxes):
    assert parse_boxes(text) == boxes


def test_positive_angle_is_counter_clockwise_on_screen():
    """On the screen y points down: the right end of a flat box that turns counter-clockwise rises."""
    flat = Box(20, 45, 80, 55, 30)

    def right_end(**settings):
        corners = box_corners(flat, 100, 100, **settings)
        return (corners[1][0] + corners[2][0]) / 2, (corners[1][1] + corners[2][1]) / 2

    x, rise = 50 + 30 * math.cos(math.pi / 6), 30 * math.sin(math.pi / 6)
    assert right_end() == pytest.approx((x, 50 - rise))
    assert right_end(counter_clockwise=False) == pytest.approx((x, 50 + rise))


def test_corners_without_a_turn():
    assert box_corners(Box(10, 20, 30, 60), 200, 50) == [(20, 10), (60, 10), (60, 30), (20, 30)]


def test_the_turn_keeps_sizes_in_pixels():
    corners = box_corners(Box(-10, 25, 30, 75, 37), 300, 100)
    assert math.dist(corners[0], corners[1]) == pytest.approx(120)
    assert math.dist(corners[1], corners[2]) == pytest.approx(50)
    assert sum(x for x, _ in corners) / 4 == pytest.approx(30) and sum(y for _, y in corners) / 4 == pytest.approx(50)


def test_nothing_is_clipped_before_the_turn():
    x, y = zip(*box_corners(Box(-20, 40, 120, 60, 90), 100, 100), strict=True)
    assert x == pytest.approx((40, 40, 60, 60)) and y == pytest.approx((120, -20, -20, 120))


def test_box_from_center():
    box = box_from_center(40, 30, 20, 10, 15.2, width=200, height=100)
    assert box == Box(15, 25, 25, 35, 15)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{<10><20><30><40>|<0>}", None),
        ("none", None),
        ("{<-33><20><131><40>|<45>}", None),
        ("{<10><20><10><40>|<0>}", "x1 >= x2"),
        ("{<10><40><30><20>|<0>}", "y1 >= y2"),
        ("{<10><20><77><981>|<0>}", "far outside"),
        ("{<10><20><30><40>|<0>}<delim>{<5><5><5><5>|<0>}", "<5><5><5><5>"),
    ],
)
def test_degenerate_boxes(text, reason):
    found = check_boxes(text)
    assert found is None if reason is None else reason in found


def test_prompt_is_geochats(tokenizer):
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a ship"}]},
        {"role": "user", "content": "Where?"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == f"{language.SYSTEM} USER: <image>\nWhat is it? ASSISTANT: a ship</s>USER: Where? ASSISTANT:"
    other = tokenizer.apply_chat_template(turns[:1], tokenize=False, chat_template=language.chat_template("S", "human", "gpt"))
    assert other == "S human: <image>\nWhat is it? "


def test_every_number_is_one_token(tokenizer):
    for i in range(101):
        assert str(i) in [tokenizer.decode([t]) for t in tokenizer(f"{{<{i}><0>", add_special_tokens=False).input_ids]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("the leftmost plane", True),
        ("a road on the right-hand side", True),
        ("North-eastern part", True),
        ("{<1><2><3><4>|<0>}", True),
        ("vertically parked cars", True),
        ("Many ships in a harbour near bright water.", False),
        ("What is the class of this scene?", False),
        ("the best of the rest", False),
    ],
)
def test_words_of_place(text, place):
    assert speaks_of_place(text) is place
