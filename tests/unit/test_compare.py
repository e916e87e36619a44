"""Intervals and paired tests against analytic values and values worked out by hand."""

import math

import numpy as np
import pytest

from geodistill.evaluate.compare import intervals, intervals_table, mcnemar, measure, paired, paired_table
from geodistill.evaluate.metrics import by_benchmark, score

BOX, FAR = "{<0><0><20><20>|<0>}", "{<60><60><80><80>|<0>}"
MOA = ("test", "vqa", "mOA")


def made(image: object, right: bool = True, task: str = "vqa", question: str = "?", truth: str = "yes", said: str = "") -> dict:
    return {"benchmark": "test", "id": str(image), "task": task, "category": "c", "question": question,
            "prediction": said or (truth if right else "nothing"), "references": [truth]}  # fmt: skip


def test_figures_are_those_of_the_metrics() -> None:
    rng = np.random.default_rng(0)
    answers = [made(i % 40, rng.random() < 0.7, "scene_classification", str(i), "park" if i % 3 else "sea") for i in range(90)]
    answers += [made(i % 40, rng.random() < 0.4, question=str(i)) for i in range(70)]
    answers += [made(i, task="grounding", truth=BOX, said=BOX if i % 4 else FAR) for i in range(9)]
    answers += [made(i, task="captioning", truth="a red ship", said="a ship " * (i % 3)) for i in range(9)]
    answers += [made(0, task="conversation"), made(0, task="grounding", truth="none")]  # without a figure
    found, result = intervals(measure(answers), resamples=200), score(answers)
    assert {f[1:] for f in found} == {
        ("scene_classification", "OA"), ("scene_classification", "AA"), ("vqa", "mOA"), ("grounding", "acc@0.5"),
        ("grounding", "acc@0.25"), ("captioning", "ROUGE-1"), ("captioning", "ROUGE-L"), ("captioning", "METEOR"),
    }  # fmt: skip
    for (_, task, name), interval in found.items():
        assert interval.value == pytest.approx(result[task][name])
        assert 0 <= interval.low <= interval.value <= interval.high <= 100


def test_interval_of_a_binomial() -> None:
    n, p = 400, 0.8
    found = intervals(measure([made(i, i < p * n) for i in range(n)]))[MOA]
    half = 100 * 1.96 * math.sqrt(p * (1 - p) / n)
    assert found.value == pytest.approx(100 * p)
    assert (found.low, found.high) == pytest.approx((100 * p - half, 100 * p + half), abs=0.5)


def test_images_are_drawn_not_questions() -> None:
    """Ten questions of an image that are right or wrong together tell no more than one."""
    one = measure([made(i, i % 2 == 0) for i in range(60)])
    ten = measure([made(i, i % 2 == 0, question=str(q)) for i in range(60) for q in range(10)])
    assert intervals(ten) == intervals(one)
    tiles = measure([made(f"{i}.png#0,{800 * q},800,{800 * q + 800}", i % 2 == 0) for i in range(60) for q in range(10)])
    assert intervals(tiles) == intervals(one)  # tiles of an image share objects
    assert intervals(one, 200) == intervals(one, 200)
    assert len({intervals(one, 200, seed)[MOA] for seed in range(5)}) > 1


def test_interval_covers_the_truth_in_95_of_100_cases() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = intervals(measure([made(i, right) for i, right in enumerate(rng.random(100) < 0.7)]), resamples=300)[MOA]
        hits += found.low <= 70 <= found.high
    assert 180 <= hits <= 199  # 190 expected, deviation 3


def test_average_accuracy_weighs_classes_in_every_resample() -> None:
    answers = [made(i, True, "scene_classification", truth="sea") for i in range(300)]
    answers += [made(i, i % 2 == 0, "scene_classification", truth="park") for i in range(300, 320)]
    found = intervals(measure(answers))
    oa, aa = (found["test", "scene_classification", name] for name in ("OA", "AA"))
    assert (oa.value, aa.value) == pytest.approx((100 * 310 / 320, 75))
    half = 1.96 * 50 * math.sqrt(0.25 / 20)  # half of what 20 images leave open of the rare class
    assert aa.high - aa.low == pytest.approx(2 * half, rel=0.1) and oa.high - oa.low < 5
    assert intervals(measure(answers[:301]))["test", "scene_classification", "AA"].value == 100  # often drawn without a park


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(2, 8) == mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(3, 3) == 1
    assert 0 <= mcnemar(4000, 6000) < 1e-80


def test_paired_by_hand() -> None:
    # 20 images: both right on 10, the first alone on 8, the second alone on 2
    first = measure([made(i, i < 18) for i in range(20)])
    second = measure([made(i, i < 10 or i >= 18) for i in reversed(range(20))])  # in another order
    found = paired(first, second, resamples=20_000)[MOA]
    assert found.difference.value == pytest.approx(100 * (18 - 12) / 20)
    deviation = 100 * math.sqrt((10 / 20 - 0.3**2) / 20)  # of the mean of 8 ones, 2 minus ones, 10 zeros
    assert found.difference.high - found.difference.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert (found.only_first, found.only_second) == (8, 2)
    assert found.p_mcnemar == pytest.approx(112 / 1024)
    assert found.p_images == pytest.approx(112 / 1024, abs=0.01)  # one question an image: the same test, by chance
    assert paired(first, first)[MOA].p_images == 1 and paired(first, first)[MOA].difference.high == 0


def test_permutation_takes_an_image_as_one() -> None:
    """Five images with twenty questions each, all of them better: 2 of 2^5 exchanges are as extreme; McNemar thinks of 100."""
    first = measure([made(i, True, question=str(q)) for i in range(5) for q in range(20)])
    second = measure([made(i, False, question=str(q)) for i in range(5) for q in range(20)])
    found = paired(first, second, resamples=20_000)[MOA]
    assert found.p_images == pytest.approx(2 / 32, abs=0.01)
    assert found.p_mcnemar is not None and found.p_mcnemar < 1e-20


def test_permutation_of_the_average_accuracy() -> None:
    first = measure([made(i, True, "scene_classification", truth="sea" if i else "park") for i in range(5)])
    second = measure([made(i, i != 0, "scene_classification", truth="sea" if i else "park") for i in range(5)])
    found = paired(first, second)["test", "scene_classification", "AA"]
    assert found.difference.value == 50 and found.p_images == 1 and found.p_mcnemar is None


def test_other_questions_are_refused_with_the_remedy() -> None:
    first, second = [made(i) for i in range(4)], [made(i) for i in range(1, 4)] + [made(9), made(9)]
    remedy = r"the same questions of test: vqa, mOA: 1 by new alone, 2 by old alone, such as .*'0'.*: python jobs/evaluate\.py"
    with pytest.raises(ValueError, match=remedy):
        paired(measure(first), measure(second), ("new", "old"))
    with pytest.raises(ValueError, match="4 by new alone, 0 by old alone"):
        paired(measure(first), {}, ("new", "old"))


def test_tables() -> None:
    first = [made(i, question=q) for i in range(4) for q in "ab"] + [made(0, task="captioning", truth="a ship")]
    second = [{**p, "prediction": "no"} for p in first]
    a, b = measure(first), measure(second)
    lines = intervals_table({"new": a, "old": {}}).text().splitlines()
    assert lines[1].split() == ["figure", "questions", "images", "new", "old"]
    assert next(line for line in lines if "mOA" in line).split()[-6:] == ["8", "4", "100.0", "[100.0,", "100.0]", "-"]
    rows = {row[0]: row[1:] for row in paired_table(("new", "old"), a, b).rows}
    assert rows["test: vqa, mOA"][0] == "+100.0 [+100.0, +100.0]" and rows["test: vqa, mOA"][2:] == ["8 : 0", "0.0078"]
    assert rows["test: captioning, ROUGE-L"][2:] == ["-", "-"]
    assert intervals_table({}).empty and by_benchmark(first) == {"test": first}
