"""Pure metrics of the evaluation: answers in, figures from 0 to 100 out. Neither torch nor ray.

A prediction is a dict: benchmark, id, task (one of `language.TASKS`), category, question, prediction (the model's text),
references (every accepted answer), and for grounding optionally size_group. Where figures are to stand beside published
ones, call `score` with the predictions of one benchmark at a time.
"""

import json
import re
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

from shapely import Polygon
from shapely.errors import GEOSException

from geodistill.data.files import beside, exists, read_text, write_json
from geodistill.evaluate import captions
from geodistill.language import TASK_GROUP, TASKS, Box, box_corners, parse_boxes

OTHER = "(other)"
_RSVQA = re.compile(r"rsvqa|(lr|hr)[ _-]?ben|(lr|usgs)_split", re.IGNORECASE)  # names of its benchmarks
# Column of the summary -> key of `score(...)["summary"]`
SUMMARY = {
    "scene": "scene_classification",
    "VQA": "vqa",
    "grounding": "grounding",
    "captioning": "captioning",
    "detection": "detection",
    "mean": "mean",
}
Sides = tuple[float, float]
SQUARE: Sides = (100.0, 100.0)  # sides of an image of which no more is known


def columns(scores: dict[str, dict]) -> dict[str, str]:
    """SUMMARY without detection where no model has it: the paper's four tasks are always there."""
    detects = any("detection" in result["summary"] for result in scores.values())
    return {name: key for name, key in SUMMARY.items() if detects or key != "detection"}


def normalise(text: str) -> str:
    """The form in which short answers are compared: lower case, without white space and full stops."""
    return "".join(text.split()).replace(".", "").lower()


def is_right(prediction: str, references: list[str]) -> bool:
    """Whether a short answer equals one of the references, both normalised."""
    return normalise(prediction) in {normalise(r) for r in references}


def percent(part: float, whole: float) -> float:
    """100 part / whole; 0 for an empty whole."""
    return 100.0 * part / whole if whole else 0.0


def scene_classification(predictions: list[dict]) -> dict:
    """Overall and average accuracy of class names, and the confusion matrix.

    OA: share of right answers. AA: mean over the true classes of the share found (recall). AA_all_labels: the same sum
    divided by the number of labels that occur in truth or prediction; a label that is never true has recall 0.
    confusion: labels = the true classes; counts = one row per true class, one column per predicted class and a last one,
    "(other)", for predictions that are no true class.
    """
    names: dict[str, str] = {}  # normalised -> as first written
    for p in predictions:
        names.setdefault(normalise(p["references"][0]), p["references"][0])
    classes = sorted(names)
    column = {label: i for i, label in enumerate(classes)}
    counts = [[0] * (len(classes) + 1) for _ in classes]
    predicted_labels = set()
    for p in predictions:
        truth = normalise(p["references"][0])
        predicted = truth if is_right(p["prediction"], p["references"]) else normalise(p["prediction"])
        predicted_labels.add(predicted)
        counts[column[truth]][column.get(predicted, len(classes))] += 1
    recalls = [percent(row[i], sum(row)) for i, row in enumerate(counts)]
    return {
        "samples": len(predictions),
        "OA": percent(sum(row[i] for i, row in enumerate(counts)), len(predictions)),
        "AA": sum(recalls) / len(classes),
        "AA_all_labels": sum(recalls) / len(predicted_labels | set(classes)),
        "confusion": {"labels": [names[c] for c in classes], "counts": counts},
    }


def counts_in_moa(p: dict) -> bool:
    """Is a VQA answer part of mOA? In RSVQA's benchmarks counts and areas are not: published figures leave them out."""
    return not (_RSVQA.search(p["benchmark"]) and p["category"].lower() in ("count", "area"))


def vqa(predictions: list[dict]) -> dict:
    """Accuracy of short answers per category; mOA, their mean weighted by samples under `counts_in_moa`; accuracy: over all."""
    right: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    counted = []
    for p in predictions:
        good = is_right(p["prediction"], p["references"])
        samples[p["category"]] += 1
        right[p["category"]] += good
        counted += [good] if counts_in_moa(p) else []
    return {
        "samples": samples.total(),
        "mOA": percent(sum(counted), len(counted)),
        "accuracy": percent(right.total(), samples.total()),
        "categories": {c: {"samples": samples[c], "accuracy": percent(right[c], samples[c])} for c in sorted(samples)},
    }


def boxes_of(text: str) -> list[Box]:
    """The boxes in a text; one that holds a number of thousands of digits counts as without boxes."""
    try:
        return parse_boxes(text)
    except ValueError:  # Python's own limit on the digits of an integer
        return []


def sides_of(p: dict) -> Sides:
    """Width and height of the image of a prediction, in pixels; where they are not given, those of a square."""
    return (p["width"], p["height"]) if p.get("width") and p.get("height") else SQUARE


def box_iou(a: Box, b: Box, counter_clockwise: bool = True, sides: Sides = SQUARE) -> float:
    """Area of intersection / union of two oriented boxes, 0-1, in pixels of an image of `sides`, in which they are turned.

    0 where the union has no finite area, or where the geometry cannot be computed.
    """
    try:
        first, second = (Polygon(box_corners(box, *sides, counter_clockwise)) for box in (a, b))
        common = first.intersection(second).area
        union = first.area + second.area - common
    except (GEOSException, OverflowError):
        return 0.0
    return common / union if 0 < union < float("inf") else 0.0


def match_boxes(predicted: list[Box], targets: list[Box], counter_clockwise: bool = True, sides: Sides = SQUARE) -> list[float]:
    """The IoU (0-1) of each pair of a greedy one-to-one matching: the best pair first, then the best of what is left."""
    pairs = [(box_iou(p, t, counter_clockwise, sides), i, j) for i, p in enumerate(predicted) for j, t in enumerate(targets)]
    matched: list[float] = []
    used_predicted: set[int] = set()
    used_targets: set[int] = set()
    for iou, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if i not in used_predicted and j not in used_targets:
            used_predicted.add(i)
            used_targets.add(j)
            matched.append(iou)
    return matched


def targets_of(p: dict) -> list[Box]:
    """Every box that a prediction should hold: those of all its references."""
    return [box for reference in p["references"] for box in boxes_of(reference)]


def grounding_ious(
    prediction: str, targets: list[Box], counter_clockwise: bool = True, sides: Sides = SQUARE
) -> tuple[float, float]:
    """(weakest, mean) IoU, 0-1, of an answer under the rule of `grounding`."""
    predicted = boxes_of(prediction)
    if not predicted or not targets:
        return 0.0, 0.0
    ious = match_boxes(predicted, targets, counter_clockwise, sides)
    weakest = min(ious) if len(predicted) == len(targets) else 0.0
    return weakest, sum(ious) / max(len(predicted), len(targets))


def grounding(predictions: list[dict], counter_clockwise: bool = True) -> dict:
    """acc@0.5, acc@0.25 and mean IoU of rotated boxes, over all and per size_group where it is given.

    Rule: predicted and target boxes are matched one to one, greedily by falling polygon IoU in pixels of the image.
    An answer is right at a threshold if it holds as many boxes as there are targets and every pair reaches the threshold.
    The IoU of a sample is the sum over its pairs divided by the larger of the two numbers of boxes, so a box that is
    missing or too many counts as 0. An answer without a box is a miss (counted in `without_box`). The targets are the boxes
    of all references, in one text or in several.
    """
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    ious = []
    for p in predictions:
        ious.append(grounding_ious(p["prediction"], targets_of(p), counter_clockwise, sides_of(p)))
        if p.get("size_group"):
            groups[p["size_group"]].append(ious[-1])

    def figures(pairs: list[tuple[float, float]]) -> dict:
        return {
            "samples": len(pairs),
            "acc@0.5": percent(sum(weakest >= 0.5 for weakest, _ in pairs), len(pairs)),
            "acc@0.25": percent(sum(weakest >= 0.25 for weakest, _ in pairs), len(pairs)),
            "mean_iou": percent(sum(mean for _, mean in pairs), len(pairs)),
        }

    result = figures(ious) | {"without_box": sum(not boxes_of(p["prediction"]) for p in predictions)}
    return result | ({"size_groups": {name: figures(groups[name]) for name in sorted(groups)}} if groups else {})


def horizontal(found: Box, counter_clockwise: bool = True, sides: Sides = SQUARE) -> Box:
    """The upright rectangle around an oriented box of an image of `sides`."""
    xs, ys = zip(*box_corners(found, *sides, counter_clockwise), strict=True)
    x, y = (100 / side for side in sides)
    return Box(x * min(xs), y * min(ys), x * max(xs), y * max(ys))


def detection(predictions: list[dict], counter_clockwise: bool = True) -> dict:
    """mAP at IoU 0.5 of oriented (OBB) and horizontal (HBB) boxes, and precision and recall per class (category).

    A text has no confidences, so a class has one point of its precision-recall curve, and the area under that curve,
    precision being 0 beyond the recall that was reached, is AP = precision x recall. Boxes are matched in each image as in
    `grounding`; a pair below 0.5 is no match. mAP is the mean over the classes that are asked for.
    """
    result: dict = {"samples": len(predictions)}
    for name in ("OBB", "HBB"):
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])  # right, predicted, true
        for p in predictions:
            found, targets = boxes_of(p["prediction"]), targets_of(p)
            if name == "HBB":
                found, targets = ([horizontal(b, counter_clockwise, sides_of(p)) for b in boxes] for boxes in (found, targets))
            right = sum(iou >= 0.5 for iou in match_boxes(found, targets, counter_clockwise, sides_of(p)))
            counts[p["category"]] = [a + b for a, b in zip(counts[p["category"]], (right, len(found), len(targets)), strict=True)]
        classes = {
            kind: {"samples": true, "precision": percent(right, found), "recall": percent(right, true)}
            for kind, (right, found, true) in sorted(counts.items())
        }
        for figures in classes.values():
            figures["AP"] = figures["precision"] * figures["recall"] / 100
        result[f"mAP@0.5 {name}"] = sum(figures["AP"] for figures in classes.values()) / len(classes)
        if name == "OBB":
            result["categories"] = classes
    return result


def _sort(predictions: list[dict]) -> tuple[dict[str, list[dict]], Counter[str]]:
    """(task -> the predictions that are scored, task -> number of those that are not)."""
    tasks: dict[str, list[dict]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for p in predictions:
        if p["task"] not in TASKS:
            raise ValueError(f"prediction {p['id']}: task {p['task']!r} is none of {', '.join(TASKS)}")
        if p["task"] not in TASK_GROUP and p["task"] != "detection":
            left_out[p["task"]] += 1
        elif not p["references"]:
            raise ValueError(f"prediction {p['id']} ({p['task']}) has no reference; score only labelled conversations")
        elif p["task"] in ("grounding", "detection") and not any(map(boxes_of, p["references"])):
            left_out[f"{p['task']} without a target box"] += 1
        else:
            tasks[p["task"]].append(p)
    return tasks, left_out


def score(predictions: list[dict], counter_clockwise: bool = True) -> dict:
    """Every figure of one model, 0-100, per task; a task without samples is absent.

    summary: OA, mOA, acc@0.25 (acc@0.5 stands with the task), mAP@0.5 OBB, the mean ROUGE-L over all captions (of images and
    regions), and the mean of those present.
    not_scored: counts of the samples that have no metric. counter_clockwise: the sign of theta in the box text.
    """
    tasks, left_out = _sort(predictions)
    functions = {
        "scene_classification": scene_classification,
        "vqa": vqa,
        "grounding": lambda samples: grounding(samples, counter_clockwise),
        "detection": lambda samples: detection(samples, counter_clockwise),
        "captioning": captions.captioning,
        "region_captioning": captions.captioning,
    }
    result: dict = {task: function(tasks[task]) for task, function in functions.items() if tasks.get(task)}
    headline = {"scene_classification": "OA", "vqa": "mOA", "grounding": "acc@0.25", "detection": "mAP@0.5 OBB"}
    summary = {task: result[task][key] for task, key in headline.items() if task in result}
    texts = [result[task] for task in ("captioning", "region_captioning") if task in result]
    if texts:
        summary["captioning"] = sum(c["samples"] * c["ROUGE-L"] for c in texts) / sum(c["samples"] for c in texts)
    if summary:
        summary["mean"] = sum(summary.values()) / len(summary)
    return result | {"summary": summary, "not_scored": dict(left_out), "libraries": libraries()}


def libraries() -> dict[str, str]:
    """Metric -> "library version" that computes it."""
    ours, geometry = f"geodistill {version('geodistill')}", f"shapely {version('shapely')}"
    counted = dict.fromkeys(("OA", "AA", "mOA"), ours)
    boxes = dict.fromkeys(("acc@0.5", "acc@0.25", "mean_iou", "mAP@0.5 OBB", "mAP@0.5 HBB"), geometry)
    return counted | boxes | captions.libraries()


def summary_table(scores: dict[str, dict]) -> str:
    """Plain text: a row per model, a column per task and their mean, one decimal, "-" where a task is absent."""
    shown = columns(scores)
    rows = [["model", *shown]]
    for model, result in scores.items():
        values = [result["summary"].get(key) for key in shown.values()]
        rows.append([model, *("-" if v is None else f"{v:.1f}" for v in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]
    return "\n".join(lines)


COLUMNS = {"benchmark": str, "id": str, "task": str, "category": str, "prediction": str, "references": list}


def read_predictions(file: str | Path) -> tuple[list[dict], list[dict]]:
    """(predictions, what is set aside: {"line", "field", "reason"}) of a file of JSON lines with the fields of this module, local
    or s3://.

    `question`, `size_group`, `width` and `height` (of the image, in pixels) may be missing. Raises ValueError, with the remedy,
    where the file is missing or nothing in it can be scored.
    """
    files, name = beside(file)
    if not exists(files, name):
        raise ValueError(f"predictions={file} does not exist; give a file of JSON lines, one prediction a line")
    try:
        lines = read_text(files, name).removeprefix("\ufeff").split("\n")  # not splitlines: texts may hold other ends of lines
    except UnicodeDecodeError as error:
        raise ValueError(f"predictions={file} is not UTF-8 ({error}); save it as UTF-8") from error
    found, bad = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except ValueError as error:
            bad.append({"line": number, "field": "", "reason": f"is not JSON ({error})"})
            continue
        raw = raw if isinstance(raw, dict) else {}
        raw |= {k: str(raw[k]) for k in ("id", "benchmark") if isinstance(raw.get(k), int)}
        raw |= {k: "" if raw.get(k) is None else str(raw[k]) for k in ("category", "question", "size_group")}
        wrong = [k for k, kind in COLUMNS.items() if not isinstance(raw.get(k), kind)]
        unsized = [k for k in ("width", "height") if k in raw and not (isinstance(raw[k], int | float) and raw[k] > 0)]
        if wrong:
            bad.append({"line": number, "field": wrong[0], "reason": f"is missing or no {COLUMNS[wrong[0]].__name__}"})
        elif unsized:
            bad.append({"line": number, "field": unsized[0], "reason": "is no number of pixels above 0"})
        elif raw["task"] not in TASKS:
            bad.append({"line": number, "field": "task", "reason": f"{raw['task']!r} is none of {', '.join(TASKS)}"})
        elif not raw["references"] or not all(isinstance(r, str) for r in raw["references"]):
            bad.append({"line": number, "field": "references", "reason": "holds no text"})
        else:
            found.append(raw)
    if not found:
        worst = f"; line {bad[0]['line']}, field {bad[0]['field']}: {bad[0]['reason']}" if bad else ""
        raise ValueError(f"predictions={file} holds nothing that can be scored{worst}; the fields are {', '.join(COLUMNS)}")
    return found, bad


def by_benchmark(predictions: list[dict]) -> dict[str, list[dict]]:
    """Predictions grouped by their field benchmark."""
    found: dict[str, list[dict]] = defaultdict(list)
    for p in predictions:
        found[p["benchmark"]].append(p)
    return dict(found)


def score_file(file: str | Path, output: str | Path, counter_clockwise: bool = True) -> tuple[dict, list[dict]]:
    """Score existing predictions, each benchmark by itself: (benchmark -> figures, what is set aside), both in `output`."""
    predictions, bad = read_predictions(file)
    result: dict = {name: score(found, counter_clockwise) for name, found in by_benchmark(predictions).items()}
    write_json(*beside(output, create=True), result | {"set_aside": bad})
    return result, bad
