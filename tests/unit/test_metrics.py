"""Every metric against values worked out by hand."""

import json
import math
from importlib.metadata import version

import pytest
from shapely import Polygon

from geodistill.evaluate.metrics import box_iou, grounding_ious, match_boxes, score, score_file, summary_table
from geodistill.language import Box, box_corners, format_box, format_boxes, parse_boxes


def made(task: str, prediction: str, *references: str, category: str = "", **more: str) -> dict:
    return {
        "benchmark": "test",
        "id": "0",
        "task": task,
        "category": category,
        "question": "?",
        "prediction": prediction,
        "references": list(references),
        **more,
    }


def boxes(*items: tuple) -> str:
    return format_boxes([Box(*item) for item in items])


def test_scene_accuracies_and_confusion() -> None:
    # beach: 3 of 4 right, parking lot: 1 of 2 right; "bare land" is predicted once and never true
    result = score(
        [
            made("scene_classification", "Beach.", "beach"),
            made("scene_classification", " beach", "beach"),
            made("scene_classification", "beach", "beach"),
            made("scene_classification", "bare land", "beach"),
            made("scene_classification", "ParkingLot", "parking lot"),
            made("scene_classification", "beach", "parking lot"),
        ]
    )
    scene = result["scene_classification"]
    assert scene["samples"] == 6
    assert scene["OA"] == pytest.approx(100 * 4 / 6)
    assert scene["AA"] == pytest.approx((75 + 50) / 2)
    assert scene["AA_all_labels"] == pytest.approx((75 + 50 + 0) / 3)
    assert scene["confusion"] == {"labels": ["beach", "parking lot"], "counts": [[3, 0, 1], [1, 1, 0]]}
    assert result["summary"] == pytest.approx({"scene_classification": 100 * 4 / 6, "mean": 100 * 4 / 6})
    assert "vqa" not in result and "grounding" not in result


def test_vqa_is_weighted_by_samples() -> None:
    right = [made("vqa", "Yes.", "yes", category="presence")] * 3
    wrong = [made("vqa", "2", "3", category="count")]
    vqa = score([*right, *wrong])["vqa"]
    assert vqa["mOA"] == vqa["accuracy"] == pytest.approx(75)  # not (100 + 0) / 2
    published = [{**p, "benchmark": name} for p in (*right, *wrong) for name in ("lrben", "RSVQA-LR", "USGS_split_test_phili")]
    assert score(published)["vqa"]["mOA"] == 100 and score(published)["vqa"]["accuracy"] == 75  # counts are left out
    assert vqa["categories"] == {
        "count": {"samples": 1, "accuracy": 0.0},
        "presence": {"samples": 3, "accuracy": 100.0},
    }


def test_rotated_iou_is_exact() -> None:
    # A square of side a and the same turned by 45 degrees share a regular octagon of area 2 (sqrt(2) - 1) a^2.
    octagon = 2 * (math.sqrt(2) - 1)
    assert box_iou(Box(10, 10, 90, 90, 0), Box(10, 10, 90, 90, 45)) == pytest.approx(octagon / (2 - octagon), rel=1e-9)
    assert box_iou(Box(0, 0, 20, 20), Box(10, 0, 30, 20)) == pytest.approx(1 / 3)
    assert box_iou(Box(20, 40, 80, 60, 90), Box(40, 20, 60, 80, 0)) == pytest.approx(1)
    assert box_iou(Box(0, 0, 10, 10), Box(50, 50, 60, 60)) == 0


def test_boxes_are_turned_in_the_pixels_of_their_image() -> None:
    """An object of 200 x 40 pixels in an image of 2000 x 1000, turned by 88 and by 91 degrees: nearly the same box, though one is
    written with its sides swapped."""
    sides = (2000.0, 1000.0)
    truth, answer = Box(45, 48, 55, 52, 88), Box(49, 40, 51, 60, 1)
    turned, other = (Polygon(box_corners(one, *sides)) for one in (truth, answer))
    iou = turned.intersection(other).area / turned.union(other).area
    assert iou > 0.8 and box_iou(truth, answer, sides=sides) == pytest.approx(iou)
    assert box_iou(truth, answer) < 0.4  # what a square would say
    p = {"benchmark": "b", "id": "1", "task": "grounding", "category": "", "prediction": format_box(answer),
         "references": [format_box(truth)], "width": 2000, "height": 1000}  # fmt: skip
    assert score([p])["grounding"]["acc@0.5"] == 100 and score([{**p, "task": "detection"}])["detection"]["mAP@0.5 HBB"] == 100


def test_sign_of_the_angle() -> None:
    """With one sign for both boxes the IoU stays; turned up to the right is not turned down to the right."""
    a, b = Box(10, 45, 90, 55, 30), Box(10, 45, 90, 55, -30)
    assert box_iou(a, a, counter_clockwise=False) == pytest.approx(1)
    assert box_iou(a, b) == pytest.approx(box_iou(a, b, counter_clockwise=False))
    assert box_iou(a, b) < 0.2


@pytest.mark.parametrize(
    "text",
    [
        "{<50><50><50><50>|<0>}",
        "{<50><10><50><90>|<17>}",
        "{<" + "9" * 400 + "><0><1><1>|<0>}",
        "{<" + "9" * 5000 + "><0><1><1>|<0>}",
        "{<1" + "0" * 200 + "><0><1><1>|<9>}",
        "<10><20>",
        "none",
        "",
    ],
)
def test_bad_boxes_are_misses(text: str) -> None:
    assert grounding_ious(text, parse_boxes(boxes((0, 0, 50, 50)))) == (0.0, 0.0)


def test_a_box_written_backwards_is_the_same_rectangle() -> None:
    assert box_iou(Box(40, 50, 10, 20, 30), Box(10, 20, 40, 50, 30)) == pytest.approx(1)


def test_grounding_thresholds_groups_and_means() -> None:
    target = boxes((0, 0, 20, 20))
    grounding = score(
        [
            made("grounding", target, target, size_group="small"),  # IoU 1
            made("grounding", boxes((10, 0, 30, 20)), target, size_group="small"),  # IoU 1/3
            made("grounding", "there is none", target, size_group="large"),  # no box
            made("grounding", boxes((15, 0, 35, 20)), target),  # IoU 1/7
        ]
    )["grounding"]
    assert grounding["samples"] == 4 and grounding["without_box"] == 1
    assert grounding["acc@0.5"] == pytest.approx(25)
    assert grounding["acc@0.25"] == pytest.approx(50)
    assert grounding["mean_iou"] == pytest.approx(100 * (1 + 1 / 3 + 0 + 1 / 7) / 4)
    assert grounding["size_groups"]["small"] == pytest.approx(
        {"samples": 2, "acc@0.5": 50, "acc@0.25": 100, "mean_iou": 100 * (1 + 1 / 3) / 2}
    )
    assert grounding["size_groups"]["large"]["acc@0.25"] == 0


def test_two_targets_must_all_match_in_any_order() -> None:
    truth = boxes((0, 0, 20, 20), (60, 60, 80, 80, 45))
    swapped = boxes((60, 60, 80, 80, 45), (0, 0, 20, 20))
    assert grounding_ious(swapped, parse_boxes(truth)) == pytest.approx((1, 1))
    half = boxes((0, 0, 20, 20), (30, 30, 40, 40))  # one pair at 1, one at 0
    assert grounding_ious(half, parse_boxes(truth)) == pytest.approx((0, 0.5))
    twice = boxes((0, 0, 20, 20), (0, 0, 20, 20))  # one target cannot be used twice
    assert grounding_ious(twice, parse_boxes(truth)) == pytest.approx((0, 0.5))


def test_a_wrong_number_of_boxes_is_a_miss() -> None:
    truth = boxes((0, 0, 20, 20), (60, 60, 80, 80))
    assert grounding_ious(boxes((0, 0, 20, 20)), parse_boxes(truth)) == pytest.approx((0, 0.5))
    three = truth + "<delim>" + format_box(Box(0, 60, 20, 80))
    assert grounding_ious(three, parse_boxes(truth)) == pytest.approx((0, 2 / 3))
    assert score([made("grounding", three, truth)])["grounding"]["acc@0.25"] == 0


def test_matching_takes_the_best_pair_first() -> None:
    # IoU: p0-t0 1/3, p0-t1 1, p1-t0 0, p1-t1 1/3. The best pair p0-t1 leaves p1-t0.
    predicted = [Box(10, 0, 30, 20), Box(20, 0, 40, 20)]
    targets = [Box(0, 0, 20, 20), Box(10, 0, 30, 20)]
    assert match_boxes(predicted, targets) == pytest.approx([1, 0])


def test_targets_may_come_in_one_text_or_in_several() -> None:
    one, other = (50, 50, 60, 60), (0, 0, 9, 9)
    for task, key in (("grounding", "acc@0.5"), ("detection", "mAP@0.5 OBB")):
        for references in ([boxes(one, other)], [boxes(one), boxes(other)], ["two ships", boxes(one), boxes(other)]):
            assert score([made(task, boxes(other, one), *references)])[task][key] == 100
            assert score([made(task, boxes(other), *references)])[task][key] < 100


def test_horizontal_boxes_are_exact() -> None:
    thin = boxes((10, 10, 11, 18, 90))  # upright it is 8 wide and 1 high, between whole percents
    assert score([made("detection", thin, thin, category="ship")])["detection"]["mAP@0.5 HBB"] == 100


def test_a_truth_without_a_box_is_counted_apart() -> None:
    result = score([made("grounding", boxes((0, 0, 9, 9)), "none"), made("conversation", "hello", "hello")])
    assert "grounding" not in result
    assert result["not_scored"] == {"grounding without a target box": 1, "conversation": 1}
    assert result["summary"] == {}


def test_rouge_takes_the_best_reference_and_the_summary_weighs_by_samples() -> None:
    result = score(
        [
            made("captioning", "a red ship", "nothing", "a red ship"),  # 100
            made("region_captioning", "a", "b"),  # 0
            made("region_captioning", "", "b"),  # 0
            made("region_captioning", "b", "b"),  # 100
        ]
    )
    assert result["captioning"]["ROUGE-L"] == pytest.approx(100)
    assert [result["region_captioning"][k] for k in ("samples", "ROUGE-1", "ROUGE-L")] == pytest.approx([3, 100 / 3, 100 / 3])
    assert result["summary"]["captioning"] == pytest.approx(50)


def test_score_of_all_tasks() -> None:
    result = score(
        [
            made("scene_classification", "beach", "beach"),
            made("vqa", "no", "yes", category="presence"),
            made("grounding", boxes((0, 0, 9, 9)), boxes((0, 0, 9, 9))),
            made("captioning", "x", "y"),
        ]
    )
    assert result["summary"] == pytest.approx(
        {"scene_classification": 100, "vqa": 0, "grounding": 100, "captioning": 0, "mean": 50}
    )
    for metric, library in (("ROUGE-L", "rouge-score"), ("acc@0.5", "shapely"), ("OA", "geodistill")):
        assert result["libraries"][metric] == f"{library} {version(library)}"


def test_empty_and_wrong_input() -> None:
    assert score([])["summary"] == {}
    with pytest.raises(ValueError, match="none of scene_classification"):
        score([made("scene", "a", "a")])
    with pytest.raises(ValueError, match="has no reference"):
        score([made("vqa", "a")])


def test_summary_table() -> None:
    scores = {
        "teacher": score([made("vqa", "yes", "yes"), made("captioning", "x", "y")]),
        "distilled": {"summary": {"scene_classification": 7.25, "mean": 7.25}},
    }
    assert summary_table(scores).splitlines() == [
        "model      scene    VQA  grounding  captioning  mean",
        "teacher        -  100.0          -         0.0  50.0",
        "distilled    7.2      -          -           -   7.2",
    ]
    assert summary_table({}) == "model  scene  VQA  grounding  captioning  mean"
    box = boxes((1, 1, 9, 9))
    found = {"teacher": score([made("detection", box, box, category="ship")])}
    assert [line.split() for line in summary_table(found).splitlines()] == [
        ["model", "scene", "VQA", "grounding", "captioning", "detection", "mean"],
        ["teacher", "-", "-", "-", "-", "100.0", "100.0"],
    ]


def test_detection_without_confidences() -> None:
    # ships: 3 true, 2 predicted, 1 right -> precision 50, recall 33.3; cars: 1 true, found -> AP 100
    true, near, far = (10, 10, 30, 30), (11, 11, 31, 31), (60, 60, 80, 80)
    result = score(
        [
            made("detection", boxes(near, far), boxes(true, (40, 10, 50, 30)), category="ship"),
            made("detection", "none", boxes((1, 1, 9, 9)), category="ship"),
            made("detection", boxes(true), boxes(true), category="car"),
        ]
    )["detection"]
    assert result["categories"]["ship"] == pytest.approx({"samples": 3, "precision": 50, "recall": 100 / 3, "AP": 50 / 3})
    assert result["mAP@0.5 OBB"] == result["mAP@0.5 HBB"] == pytest.approx((50 / 3 + 100) / 2)
    turned = score([made("detection", boxes((10, 40, 90, 60, 90)), boxes((40, 10, 60, 90)), category="ship")])["detection"]
    assert turned["mAP@0.5 OBB"] == turned["mAP@0.5 HBB"] == 100


def test_a_file_of_predictions_is_scored_and_bad_lines_are_set_aside(tmp_path) -> None:
    good = made("vqa", "yes", "yes", category="presence")
    lines = [json.dumps(good), "{", json.dumps(good | {"task": "dance"}), json.dumps(good | {"references": []}),
             json.dumps({k: v for k, v in good.items() if k != "prediction"}), 
             json.dumps(good | {"benchmark": "other"})]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    result, _ = score_file(tmp_path / "p.jsonl", tmp_path / "out" / "scores.json")
    written = json.loads((tmp_path / "out/scores.json").read_text())
    assert result["test"]["vqa"]["mOA"] == written["other"]["vqa"]["mOA"] == 100
    assert [(bad["line"], bad["field"]) for bad in written["set_aside"]] == [
        (2, ""),
        (3, "task"),
        (4, "references"),
        (5, "prediction"),
    ]
    (tmp_path / "empty.jsonl").write_text("")
    for name, message in (("gone", "does not exist"), ("empty", "nothing that can be scored")):
        with pytest.raises(ValueError, match=message):
            score_file(tmp_path / f"{name}.jsonl", tmp_path / "x.json")


def test_lines_as_other_programs_write_them(tmp_path, capsys) -> None:
    """A mark at the head, blank lines, numbers as ids, no category, other ends of lines inside a text."""
    good = made("vqa", "yes\u2028indeed", "yes\u2028indeed") | {"id": 7, "category": None, "size_group": 3}
    text = json.dumps(good, ensure_ascii=False)
    (tmp_path / "p.jsonl").write_text(f"\ufeff{text}\r\n\n{text}\n", encoding="utf-8")
    result, bad = score_file(tmp_path / "p.jsonl", tmp_path / "s.json")
    assert result["test"]["vqa"]["samples"] == 2 and result["test"]["vqa"]["mOA"] == 100 and bad == []
    (tmp_path / "l.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"l\.jsonl is not UTF-8"):
        score_file(tmp_path / "l.jsonl", tmp_path / "s.json")
    decimals = made("grounding", "{<10.5><10><20.5><20>|<0>}", "{<10.5><10><20.5><20>}")
    assert score([decimals])["grounding"]["acc@0.5"] == 100
