"""How sure a figure is: bootstrap intervals over the images of a benchmark, and paired tests of two models.

Several questions share one image, so images, not questions, are drawn (cluster bootstrap). Every figure is the mean over its
strata of the mean of their values, one value a question: one stratum, and for AA one a true class. An interval tells what
other test images would give; what another seed of the training gives it does not tell.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from geodistill.evaluate.captions import meteor, rouge
from geodistill.evaluate.metrics import counts_in_moa, grounding_ious, is_right, normalise, sides_of, targets_of
from geodistill.evaluate.tables import ABSENT, Table

RESAMPLES = 2000
_TILE = re.compile(r"#\d+,\d+,\d+,\d+$")  # tiles of an image share objects: they are drawn together
RIGHT_OR_WRONG = ("OA", "mOA", "acc@0.5", "acc@0.25")  # figures that McNemar's test is for

Figure = tuple[str, str, str]  # (benchmark, task, name)
Question = tuple[str, str, str, str]  # (benchmark, id of the image, task, question)


@dataclass(frozen=True)
class Values:
    """One figure of one model. N questions, in the order of `questions`, which is sorted; I images; K strata."""

    questions: list[Question]
    value_N: np.ndarray  # 0-100
    sum_IK: np.ndarray  # of the values
    count_IK: np.ndarray  # of the questions


@dataclass(frozen=True)
class Interval:
    """value and the ends of its 95 % interval, 0-100 (of a difference: -100 to 100)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """First model minus second. only_first, only_second: questions that one alone has right, and p_mcnemar: None for AA and
    the figures that are no share of right answers."""

    difference: Interval
    p_images: float
    only_first: int | None = None
    only_second: int | None = None
    p_mcnemar: float | None = None


def _figures(p: dict, counter_clockwise: bool) -> dict[str, float]:
    """What one answer (a prediction of `metrics`) adds to each figure of its task, 0-100."""
    said, truth = p["prediction"], p["references"]
    if p["task"] == "scene_classification":
        return dict.fromkeys(("OA", "AA"), 100.0 * is_right(said, truth))
    if p["task"] == "vqa":
        return {"mOA": 100.0 * is_right(said, truth)} if counts_in_moa(p) else {}
    if p["task"] == "grounding" and targets_of(p):
        weakest, _ = grounding_ious(said, targets_of(p), counter_clockwise, sides_of(p))
        return {f"acc@{at}": 100.0 * (weakest >= at) for at in (0.5, 0.25)}
    if p["task"] in ("captioning", "region_captioning"):
        one, longest = rouge(said, truth)
        return {"ROUGE-1": one, "ROUGE-L": longest, "METEOR": meteor(said, truth)}
    return {}


def measure(predictions: list[dict], counter_clockwise: bool = True) -> dict[Figure, Values]:
    """The values of every figure of one model. counter_clockwise: the sign of theta in the box text."""

    def question(p: dict) -> Question:
        return p["benchmark"], p["id"], p["task"], p.get("question", "")

    found: dict[Figure, list[tuple[Question, float, str]]] = defaultdict(list)
    for p in sorted(predictions, key=question):
        for name, value in _figures(p, counter_clockwise).items():
            stratum = normalise(p["references"][0]) if name == "AA" else ""
            found[p["benchmark"], p["task"], name].append((question(p), value, stratum))
    measured = {}
    for figure, rows in found.items():
        questions, values, strata = (list(column) for column in zip(*rows, strict=True))
        value_N = np.array(values)
        images, image_N = np.unique([_TILE.sub("", q[1]) for q in questions], return_inverse=True)
        classes, class_N = np.unique(strata, return_inverse=True)
        sum_IK, count_IK = np.zeros((2, len(images), len(classes)))
        np.add.at(sum_IK, (image_N, class_N), value_N)
        np.add.at(count_IK, (image_N, class_N), 1)
        measured[figure] = Values(questions, value_N, sum_IK, count_IK)
    return measured


def _resamples(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn: [<= 100, images], `resamples` rows in all. The same for the same arguments."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, 100):
        rows = min(100, resamples - start)
        drawn = rng.integers(images, size=(rows, images)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(float)


def _figure(values: Values, weight_RI: np.ndarray) -> np.ndarray:
    """The figure [R] of each weighting of the images; a class of which no image is drawn does not count."""
    with np.errstate(invalid="ignore"):
        return np.nanmean((weight_RI @ values.sum_IK) / (weight_RI @ values.count_IK), axis=1)


def _interval(models: list[Values], resamples: int, seed: int) -> Interval:
    """Of the figure of one model, or of the difference of two, drawn with the same images."""

    def difference(weight_RI: np.ndarray) -> np.ndarray:
        first, *second = (_figure(values, weight_RI) for values in models)
        return first - second[0] if second else first

    images = len(models[0].sum_IK)
    drawn = np.concatenate([difference(weight_RI) for weight_RI in _resamples(images, resamples, seed)])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(difference(np.ones((1, images)))[0]), float(low), float(high))


def intervals(measured: dict[Figure, Values], resamples: int = RESAMPLES, seed: int = 0) -> dict[Figure, Interval]:
    """Every figure of one model with its percentile bootstrap interval."""
    return {figure: _interval([values], resamples, seed) for figure, values in measured.items()}


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: of n questions that one model alone has right, each is either's with chance 1/2."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = term = 1
    for k in range(fewer):
        term = term * (n - k) // (k + 1)  # n over k + 1, exact
        tail += term
    return min(1.0, 2 * tail / 2**n)


def _permuted(first: Values, second: Values, resamples: int, seed: int) -> float:
    """Two-sided p of the difference if, image by image, it were chance which model gave which answers."""
    share = [np.mean(values.sum_IK / values.count_IK.sum(0), axis=1) for values in (first, second)]
    difference_I = share[0] - share[1]  # what each image adds to the difference of the figures
    rng = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, resamples, 100):
        sign_RI = rng.choice([-1.0, 1.0], size=(min(100, resamples - start), len(difference_I)))
        extreme += int((abs(sign_RI @ difference_I) >= abs(difference_I.sum()) - 1e-9).sum())
    return (1 + extreme) / (1 + resamples)


def paired(
    first: dict[Figure, Values],
    second: dict[Figure, Values],
    names: tuple[str, str] = ("first", "second"),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[Figure, Paired]:
    """Every figure of `first` minus that of `second`. Raises ValueError if they are not of the same questions."""
    result = {}
    for figure in dict.fromkeys([*first, *second]):
        asked = [Counter(m[figure].questions if figure in m else []) for m in (first, second)]
        if asked[0] != asked[1]:
            alone = asked[0] - asked[1], asked[1] - asked[0]
            raise ValueError(
                f"{names[0]} and {names[1]} did not answer the same questions of {_name(figure)}: {alone[0].total()} by "
                f"{names[0]} alone, {alone[1].total()} by {names[1]} alone, such as {next(iter(alone[0] or alone[1]))}; "
                "let both answer the same data: python jobs/evaluate.py --config FILE"
            )
        a, b = first[figure], second[figure]
        test = Paired(_interval([a, b], resamples, seed), _permuted(a, b, resamples, seed))
        if figure[2] in RIGHT_OR_WRONG:
            only = int((a.value_N > b.value_N).sum()), int((b.value_N > a.value_N).sum())
            test = Paired(test.difference, test.p_images, *only, mcnemar(*only))
        result[figure] = test
    return result


def _name(figure: Figure) -> str:
    benchmark, task, name = figure
    return f"{benchmark}: {task.replace('_', ' ')}, {name}"


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def intervals_table(models: dict[str, dict[Figure, Values]]) -> Table:
    """A row per figure, a column per model. models: name -> `measure`."""
    found = {model: intervals(measured) for model, measured in models.items()}
    rows = []
    for figure in dict.fromkeys(figure for measured in models.values() for figure in measured):
        values = next(measured[figure] for measured in models.values() if figure in measured)
        cells = [f"{i.value:.1f} [{i.low:.1f}, {i.high:.1f}]" if (i := found[model].get(figure)) else ABSENT for model in models]
        rows.append([_name(figure), str(len(values.questions)), str(len(values.sum_IK)), *cells])
    note = (
        f"In brackets: 95 % interval, percentiles of {RESAMPLES} bootstrap resamples of the test images with all their "
        "questions. It covers the choice of the test images, not the seed of the training."
    )
    columns = [("", name) for name in ("questions", "images", *models)]
    return Table("Intervals", columns, rows, note, label="figure", empty=not rows)


def paired_table(names: tuple[str, str], first: dict[Figure, Values], second: dict[Figure, Values]) -> Table:
    """A row per figure: difference, p by image, and McNemar's test. Raises ValueError if the questions differ."""
    rows = []
    for figure, test in paired(first, second, names).items():
        d = test.difference
        only = ABSENT if test.p_mcnemar is None else f"{test.only_first} : {test.only_second}"
        exact = ABSENT if test.p_mcnemar is None else _p(test.p_mcnemar)
        rows.append([_name(figure), f"{d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}]", _p(test.p_images), only, exact])
    note = (
        "p by image: permutation test, the two models' answers exchanged image by image. Right by one alone: questions; their "
        "exact McNemar test takes questions as independent, so where images hold many, p by image is the one to go by. "
        "No p is corrected for the number of rows."
    )
    columns = [("", name) for name in ("difference [95 %]", "p by image", "right by one alone", "p McNemar")]
    return Table(f"{names[0]} − {names[1]}", columns, rows, note, label="figure", empty=not rows)
