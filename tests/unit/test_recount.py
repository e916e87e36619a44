"""Real predictions of a published model: the scorer's file against a recount that shares no code with it."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

SHARED = os.environ.get("GEODISTILL_SHARED")
pytestmark = pytest.mark.skipif(not SHARED, reason="GEODISTILL_SHARED is not set: the folder with model_outputs/")
JOB = Path(__file__).parents[2] / "jobs" / "evaluate.py"


def published(name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(SHARED) / "model_outputs" / f"{name}.jsonl").read_text().splitlines()]


def geochat_text(text: str) -> str:
    """[[x1, y1, x2, y2, angle]]... -> the box text."""
    boxes = re.findall(r"\[(-?\d+), (-?\d+), (-?\d+), (-?\d+), (-?\d+)\]", text)
    return "<delim>".join("{" + "".join(f"<{v}>" for v in b[:4]) + f"|<{b[4]}>" + "}" for b in boxes)


def predictions() -> list[dict]:
    found = []

    def add(benchmark: str, task: str, said: str, true: str, category: str = "", size_group: str = "") -> None:
        found.append({"benchmark": benchmark, "id": str(len(found)), "task": task, "category": category,
                      "prediction": said, "references": [true], "size_group": size_group})  # fmt: skip

    for row in published("aid_classification"):
        add("aid", "scene_classification", row["answer"], row["annotation"])
    for row in published("rsvqa_lr"):
        add("lrben", "vqa", row["answer"], row["annotation"], row["vqa_type"])
    for row in published("geochat_refer"):
        add("referring", "grounding", geochat_text(row["answer"]), geochat_text(row["gt_bbox"]), "", row["size_group"])
    for row in published("geochat_region"):
        add("region", "region_captioning", row["answer"], row["annotation"], "", row["size_group"])
    return found


def corners(x1, y1, x2, y2, angle):
    cx, cy, w, h, a = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2, (y2 - y1) / 2, math.radians(angle)
    unit = ((-w, -h), (w, -h), (w, h), (-w, h))
    return [(cx + u * math.cos(a) + v * math.sin(a), cy - u * math.sin(a) + v * math.cos(a)) for u, v in unit]


def area(polygon):
    pairs = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairs)) / 2


def clip(subject, window):
    """Sutherland and Hodgman's clipping of one convex polygon by another, both clockwise on the screen."""
    for (x1, y1), (x2, y2) in zip(window, window[1:] + window[:1], strict=True):
        given, subject = subject, []
        side = [(x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) for x, y in given]
        for i, (p, s) in enumerate(zip(given, side, strict=True)):
            q, t = given[(i + 1) % len(given)], side[(i + 1) % len(given)]
            if s >= 0:
                subject.append(p)
            if (s >= 0) != (t >= 0):
                k = s / (s - t)
                subject.append((p[0] + k * (q[0] - p[0]), p[1] + k * (q[1] - p[1])))
        if not subject:
            return []
    return subject


def iou(a, b):
    first, second = corners(*a), corners(*b)
    if not area(first) or not area(second):
        return 0.0
    common = clip(first, second)
    inside = area(common) if len(common) > 2 else 0.0
    return inside / (area(first) + area(second) - inside)


def all_reach(said: list, true: list, threshold: float) -> bool:
    """As many boxes as targets, and pairs made best first all reach the threshold."""
    if len(said) != len(true):
        return False
    table = {(i, j): iou(p, t) for i, p in enumerate(said) for j, t in enumerate(true)}
    worst = 1.0
    while table:
        best = max(table, key=lambda pair: table[pair])
        worst = min(worst, table[best])
        table = {pair: value for pair, value in table.items() if pair[0] != best[0] and pair[1] != best[1]}
    return worst >= threshold


def rouge_f(said: str, true: str) -> tuple[float, float]:
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (said, true))
    common = sum((Counter(a) & Counter(b)).values())
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for j, y in enumerate(b):
            new.append(row[j] + 1 if x == y else max(row[j + 1], new[j]))
        row = new
    return 200 * common / (len(a) + len(b)), 200 * row[-1] / (len(a) + len(b))


def test_the_scorers_figures_equal_a_recount(tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions()))
    command = [sys.executable, str(JOB), f"predictions={tmp_path / 'p.jsonl'}", f"output={tmp_path / 'scores.json'}"]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
    scores = json.loads((tmp_path / "scores.json").read_text())

    rows = published("aid_classification")
    per_class: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        per_class[row["annotation"]].append(row["answer"].replace(" ", "").lower() == row["annotation"].lower())
    right = [r for found in per_class.values() for r in found]
    scene = scores["aid"]["scene_classification"]
    assert scene["OA"] == pytest.approx(100 * sum(right) / len(rows)) and 50 < scene["OA"] < 100
    assert scene["AA"] == pytest.approx(100 * sum(sum(r) / len(r) for r in per_class.values()) / len(per_class))

    rows = published("rsvqa_lr")
    kinds = {row["vqa_type"] for row in rows}
    for kind in kinds:
        answers = [row["answer"].strip().lower() == row["annotation"].strip().lower() for row in rows if row["vqa_type"] == kind]
        assert scores["lrben"]["vqa"]["categories"][kind]["accuracy"] == pytest.approx(100 * sum(answers) / len(answers))
    right = [(row["answer"].strip().lower() == row["annotation"].strip().lower(), row["vqa_type"]) for row in rows]
    counted = [good for good, kind in right if kind != "count"]  # the published figures of LRBEN leave counts out
    assert scores["lrben"]["vqa"]["mOA"] == pytest.approx(100 * sum(counted) / len(counted)) and len(kinds) == 4
    assert scores["lrben"]["vqa"]["accuracy"] == pytest.approx(100 * sum(good for good, _ in right) / len(rows))

    def numbers(text: str) -> list[tuple[int, ...]]:
        return [tuple(map(int, found.split(","))) for found in re.findall(r"\[(-?\d+(?:, -?\d+){4})\]", text)]

    rows, grounding = published("geochat_refer"), scores["referring"]["grounding"]
    for threshold in (0.5, 0.25):
        reached = [all_reach(numbers(row["answer"]), numbers(row["gt_bbox"]), threshold) for row in rows]
        assert grounding[f"acc@{threshold}"] == pytest.approx(100 * sum(reached) / len(rows)) and sum(reached) > 10
        for size in ("small", "medium", "large"):
            part = [good for good, row in zip(reached, rows, strict=True) if row["size_group"] == size]
            assert grounding["size_groups"][size][f"acc@{threshold}"] == pytest.approx(100 * sum(part) / len(part))

    rows, region = published("geochat_region"), scores["region"]["region_captioning"]
    pairs = [rouge_f(row["answer"], row["annotation"]) for row in rows]
    for i, name in enumerate(("ROUGE-1", "ROUGE-L")):
        assert region[name] == pytest.approx(sum(pair[i] for pair in pairs) / len(rows)) and 10 < region[name] < 100
    assert 5 < region["METEOR"] < region["ROUGE-1"] + 20 and "nltk" in scores["region"]["libraries"]["METEOR"]
