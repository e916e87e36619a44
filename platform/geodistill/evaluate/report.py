"""report.html of a run: metrics, curves, confusion matrices and drawn samples in one file that needs no network."""

import random
from datetime import UTC, datetime
from html import escape

from matplotlib import rc_context

from geodistill.config import Config
from geodistill.data.files import exists, local, open_folder, read_json, read_lines, write_text
from geodistill.data.shards import groups, load_manifest, read_group
from geodistill.evaluate.captions import rouge
from geodistill.evaluate.compare import intervals_table, measure, paired_table
from geodistill.evaluate.metrics import (
    OTHER,
    SQUARE,
    Sides,
    boxes_of,
    by_benchmark,
    columns,
    grounding_ious,
    is_right,
    score,
    sides_of,
)
from geodistill.evaluate.page import drawing, page, plot, table
from geodistill.evaluate.plots import RC, UNITS, bars_figure, color_of, confusion_figure, stage_figure, validation_figure
from geodistill.evaluate.tables import Table, tables
from geodistill.language import SHORT_ANSWER
from geodistill.models.cost import size_of

TASKS = {
    "scene_classification": "Scene classification",
    "vqa": "Visual question answering",
    "grounding": "Grounding",
    "captioning": "Captioning",
    "region_captioning": "Region captioning",
    "detection": "Detection",
}


def _summary(scores: dict[str, dict]) -> str:
    """The headline table; the best of each column is bold; a last row for distilled minus baseline."""
    shown = columns(scores)
    best = {key: max((s["summary"][key] for s in scores.values() if key in s["summary"]), default=None) for key in shown.values()}

    def cell(value: float | None, top: float | None) -> str:
        text = "-" if value is None else f"{value:.1f}"
        return f"<b>{text}</b>" if value is not None and value == top and len(scores) > 1 else text

    rows = [[escape(m), *(cell(s["summary"].get(k), best[k]) for k in shown.values())] for m, s in scores.items()]
    pair = [scores[m]["summary"] for m in ("distilled", "baseline") if m in scores]
    if len(pair) == 2:
        both = [k in pair[0] and k in pair[1] for k in shown.values()]
        gains = [f"{pair[0][k] - pair[1][k]:+.1f}" if b else "-" for k, b in zip(shown.values(), both, strict=True)]
        rows.append(["distilled − baseline", *gains])
    head = ["model", *(f"{name}<br><small>{UNITS[name]}</small>" for name in shown)]
    return table(head, rows, "delta" if len(pair) == 2 else "")


def _flat(result: dict) -> dict[str, float]:
    """Figures of one task in one level: {"OA": ..., "count: accuracy": ...}."""
    flat: dict[str, float] = {}
    for key, value in result.items():
        if key in ("categories", "size_groups"):
            flat |= {f"{name or '(no category)'}: {k}": v for name, figures in value.items() for k, v in figures.items()}
        elif key != "confusion":
            flat[key] = value
    return flat


def _details(scores: dict[str, dict]) -> str:
    """One collapsible table per task, every figure of every model."""
    blocks = []
    for task, title in TASKS.items():
        columns = {model: _flat(result[task]) for model, result in scores.items() if task in result}
        names = list(dict.fromkeys(name for column in columns.values() for name in column))
        values = [[column.get(name) for column in columns.values()] for name in names]
        cells = [["-" if v is None else str(v) if isinstance(v, int) else f"{v:.1f}" for v in row] for row in values]
        rows = [[escape(name.replace("_", " ")), *row] for name, row in zip(names, cells, strict=True)]
        if rows:
            figures = table(["figure", *map(escape, columns)], rows)
            blocks.append(f"<details><summary>{title}</summary>{figures}</details>")
    left_out = {model: result["not_scored"] for model, result in scores.items() if result.get("not_scored")}
    if left_out:
        model, counts = next(iter(left_out.items()))
        text = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        blocks.append(f'<p class="soft">Answered but without a metric ({escape(model)}): {escape(text)}.</p>')
    return "".join(blocks)


def verdict(
    question: str, truth: str, answer: str, counter_clockwise: bool = True, sides: Sides = SQUARE
) -> tuple[str, bool | None]:
    """How an answer stands to the truth: (text, right or wrong, or None for free text, which has a ROUGE-L only).

    A truth that is boxes alone: the rule of `metrics.grounding` at IoU 0.25; a short answer: equal after normalisation.
    """
    if truth.lstrip().startswith("{") and boxes_of(truth):
        weakest, mean = grounding_ious(answer, boxes_of(truth), counter_clockwise, sides)
        return f"IoU {mean:.2f}", weakest >= 0.25
    if SHORT_ANSWER in question:
        return "", is_right(answer, [truth])
    return f"ROUGE-L {rouge(answer, [truth])[1]:.0f}", None


def _card(sample: dict, names: list[str], counter_clockwise: bool) -> str:
    """One sample: the image with the boxes of question, truth and answers; below it the texts."""
    texts = {"question": sample["question"], "truth": sample["truth"], **sample["answers"]}
    looks = {"truth": 'stroke-width="4.5"', "teacher": 'stroke-width="2.5" stroke-dasharray="5 4"'}
    shapes = [(text, color_of(name, names), name, looks.get(name, 'stroke-width="2.5"')) for name, text in texts.items()]
    lines = []
    for name, text in texts.items():
        if name != "question":
            mark = ""
            if name != "truth":
                note, right = verdict(sample["question"], sample["truth"], text, counter_clockwise, sides_of(sample))
                word = {True: '<span class="right">✓ right</span> ', False: '<span class="wrong">✗ wrong</span> ', None: ""}[
                    right
                ]
                mark = f" · {word}{note}"
            lines.append(f"<dt>{_key(name, names)}{escape(name)}{mark}</dt><dd>{escape(text) or '(empty)'}</dd>")
    question = sample["question"].replace(SHORT_ANSWER, "").strip()
    return (
        f'<article class="card sample">{drawing(sample["image"], shapes, counter_clockwise)}'
        f'<p class="question">{escape(question)}</p>'
        f'<dl>{"".join(lines)}</dl><div class="soft">{escape(sample["id"])}</div></article>'
    )


def _key(name: str, names: list[str]) -> str:
    line = "dashed" if name == "teacher" else "solid"
    return f'<i class="key" style="border-color:{color_of(name, names)};border-top-style:{line}"></i>'


def _samples(samples: list[dict], counter_clockwise: bool) -> str:
    names = list(dict.fromkeys(["truth", *(model for s in samples for model in s["answers"]), "question"]))
    legend = " &ensp; ".join(f'<span class="one">{_key(name, names)}{escape(name)}</span>' for name in names)
    cards = "".join(_card(sample, names, counter_clockwise) for sample in samples)
    return (
        f'<p class="soft">Boxes: {legend}. Grounding is right if every box is matched at IoU ≥ 0.25; a short answer if it is '
        f'equal; free text is neither, it has a ROUGE-L F.</p><div class="grid" style="--min:256px">{cards}</div>'
    )


def _curves(histories: dict[str, list[dict]]) -> str:
    blocks = []
    comparison = validation_figure(histories)
    if comparison:
        caption = "Validation loss of baseline and distilled student, each point one pass over the validation split. "
        blocks.append(plot(comparison, caption + "The distilled student's steps run on from its warm start into the loop."))
    for name, rows in histories.items():
        figure = stage_figure(rows)
        if figure:
            caption = f"Stage {name}: every logged value over the steps of the stage ({len(rows)} rows)"
            averaged = "; where a thin line lies below a bold one, the bold one is the centred mean over 5 % of the values."
            blocks.append(f"<h3>{escape(name)}</h3>" + plot(figure, caption + averaged))
    return "".join(blocks)


def _metrics(scores: dict[str, dict]) -> str:
    text = (
        "Grounding counts an answer as right if all its boxes match at IoU ≥ 0.25. The mean is over unlike figures "
        "(accuracies and a ROUGE-L): good for comparing models here, not an accuracy. Bold: best of the column."
    )
    bars = plot(
        bars_figure(scores), "The four tasks by model, the figures of the table above; a minus sign: no sample of that task."
    )
    return f'<div class="card">{_summary(scores)}<p class="soft">{text}</p></div>{bars}{_details(scores)}'


def _confusions(scores: dict[str, dict]) -> str:
    found = {model: s["scene_classification"]["confusion"] for model, s in scores.items() if "scene_classification" in s}
    if not found:
        return ""
    widest = max(len(c["labels"]) for c in found.values())
    text = (
        "Percent of each true class (row) by prediction (column); the stronger the colour, the larger the share. A last column "
        f"{OTHER}, where there is one, holds answers that are no true class."
    )
    plots = [
        plot(
            confusion_figure(model, c), f"{model}: confusion of scene classes, {sum(map(sum, c['counts']))} samples", scroll=False
        )
        for model, c in found.items()
    ]
    return f'<p class="soft">{text}</p><div class="grid" style="--min:{340 if widest <= 16 else 620}px">{"".join(plots)}</div>'


def _again(run: str, scores: dict[str, dict]) -> str:
    command = f"python jobs/evaluate.py --config {run}/config.yaml"
    libraries = {library for s in scores.values() for library in s.get("libraries", {}).values()}
    made = f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by geodistill.evaluate.report"
    with_libraries = f", with {', '.join(sorted(libraries))}" if libraries else ""
    return f'<p><code>{escape(command)}</code></p><p class="soft">{escape(made + with_libraries)}.</p>'


def write_report(
    run: str,
    scores: dict[str, dict],
    histories: dict[str, list[dict]],
    samples: list[dict],
    notes: list[str],
    counter_clockwise: bool = True,
    sections: dict[str, list[Table]] | None = None,
) -> str:
    """Write `run`/report.html, in a local folder or an s3:// one, and return its address.

    scores: model -> `metrics.score`. histories: stage -> metric rows, each with its "step" from the start of the stage.
    samples: {"id", "image" (PNG or JPEG bytes), "width", "height" (pixels; None: a square), "question", "truth",
    "answers": {model: text}}.
    counter_clockwise: the sign of theta in the box text. sections: title -> tables, below the metrics.
    """
    with rc_context(RC):  # type: ignore[arg-type]
        parts = {
            "Metrics": _metrics(scores) if scores else "",
            **{title: "".join(table.html() for table in found) for title, found in (sections or {}).items()},
            "Scene confusion": _confusions(scores),
            "Training": _curves(histories),
            "Samples": _samples(samples, counter_clockwise) if samples else "",
        }
    parts["Make it again"] = _again(run, scores)
    html = page(run.rstrip("/").rpartition("/")[2], "GeoDistill report", notes, parts)
    write_text(open_folder(run, create=True), "report.html", html)
    return f"{run}/report.html"


STAGES = ("teacher", "baseline", "blind", "distill/warm", "distill")


def answers_of_run(config: Config) -> dict[str, list[dict]]:
    """Model -> its predictions below run/evaluate. Raises ValueError where there are none."""
    files = open_folder(f"{config.run}/evaluate")
    found = {name: rows for name in config.evaluate.models if (rows := read_lines(files, f"{name}.jsonl"))}
    if not found:
        raise ValueError(
            f"{config.run}/evaluate holds no answers of {', '.join(config.evaluate.models)}; run jobs/evaluate.py first"
        )
    return found


def comparisons(config: Config, answers: dict[str, list[dict]]) -> dict[str, list[Table]]:
    """The models of the run beside the paper's, and how sure their figures and differences are.

    Raises ValueError if two models that are compared did not answer the same questions.
    """
    models, counter_clockwise = config.evaluate.models, config.evaluate.angle_counter_clockwise
    scores = {
        name: {benchmark: score(found, counter_clockwise) for benchmark, found in by_benchmark(answers.get(name, [])).items()}
        for name in models
    }
    sizes = {name: size_of(folder) for name, folder in models.items() if (local(folder, False) / "config.json").is_file()}
    measured = {name: measure(found, counter_clockwise) for name, found in answers.items()}
    pairs = [("distilled", other) for other in ("baseline", "teacher") if {"distilled", other} <= measured.keys()]
    tests = [paired_table(pair, measured[pair[0]], measured[pair[1]]) for pair in pairs]
    return {"The paper's tables": tables(scores, sizes), "How sure": [intervals_table(measured), *tests]}


def report_of_run(config: Config, scores: dict[str, dict], sections: dict[str, list[Table]] | None = None) -> str:
    """The report of what a run folder holds: metrics of its stages, predictions of its models, samples of its test split.

    sections: `comparisons`; made where they are not given.
    """
    files = open_folder(config.run)
    histories = {stage: rows for stage in STAGES if (rows := read_lines(files, f"{stage}/metrics.jsonl"))}
    answers = {name: read_lines(files, f"evaluate/{name}.jsonl") for name in scores}
    sections = sections or comparisons(config, answers)
    samples, counter_clockwise = _drawn(config, answers), config.evaluate.angle_counter_clockwise
    return write_report(config.run, scores, histories, samples, _notes(config, scores), counter_clockwise, sections)


def _drawn(config: Config, answers: dict[str, list[dict]]) -> list[dict]:
    """Samples for the report: half of them with boxes, where the split has such questions; one question an image."""
    first = list(next(iter(answers.values()), []))
    random.Random(0).shuffle(first)  # the split is in order of its source: its head may be one class
    by_key = {name: {(p["id"], p["question"]): p["prediction"] for p in found} for name, found in answers.items()}
    wanted, seen = [], set()
    tasks = ["grounding", "region_captioning", "grounding", "captioning", "grounding", "vqa", "grounding", "scene_classification"]
    for number in range(config.evaluate.samples):
        for want in (tasks[number % len(tasks)], None):
            found = next((p for p in first if p["id"] not in seen and want in (p["task"], None)), None)
            if found:
                wanted.append(found)
                seen.add(found["id"])
                break
    manifest = load_manifest(config.data.shards)
    images: dict[str, bytes] = {}
    for group in groups(manifest, config.evaluate.split):
        if len(images) == len(seen):
            break
        images |= {r.id: r.image for r in read_group(config.data.shards, group) if r.id in seen}
    return [
        {
            "id": p["id"],
            "image": images[p["id"]],
            "width": p.get("width"),
            "height": p.get("height"),
            "question": p["question"],
            "truth": p["references"][0],
            "answers": {name: found.get((p["id"], p["question"]), "") for name, found in by_key.items()},
        }
        for p in wanted
        if p["id"] in images
    ]


def _notes(config: Config, scores: dict[str, dict]) -> list[str]:
    """What a reader must know to compare: updates of each student, and what the control shows."""
    distill = config.distill
    updates = distill.warm_start.steps + distill.train.steps * distill.loss.updates_per_rollout
    trained = [
        f"Updates of the student: baseline {config.student.train.steps} ({config.student.train.method}), distilled {updates} "
        f"({distill.warm_start.steps} warm start by {distill.warm_start.method}, the rest on-policy on the splits "
        f"{' and '.join(distill.train.splits)}).",
    ]
    notes = [
        *(trained if exists(open_folder(config.run), "distill/settings.json") else []),
        f"Test: {config.evaluate.split} split, greedy answers, sign of theta "
        f"{'counter-clockwise' if config.evaluate.angle_counter_clockwise else 'clockwise'} on the screen.",
    ]
    if any(name in config.evaluate.blind for name in scores):
        chance = read_json(open_folder(config.run), "metrics.json")["constant_answer"]
        most = ", ".join(f"{task.replace('_', ' ')} {value:.1f}" for task, value in chance.items())
        blind = ", ".join(n for n in scores if n in config.evaluate.blind)
        notes.append(f"{blind}: trained and tested without the image; always the most frequent answer of a kind gives {most}.")
    return notes
