"""preview.html beside the shards: what is in the data, to look at before anything is trained on it."""

import random
from collections import Counter
from html import escape

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from geodistill.data.duplicates import Copy
from geodistill.data.files import open_folder, writing
from geodistill.data.record import ImageRecord
from geodistill.data.shards import Group, groups, read_group
from geodistill.evaluate.metrics import boxes_of
from geodistill.evaluate.page import drawing, page, plot, table
from geodistill.evaluate.plots import RC

SAMPLES = 50
WITHOUT_IMAGE = ["id", "width", "height", "sensor", "conversations"]
MOST_READ = 4000  # images whose text is counted; a larger split is sampled by row groups
ASKED, ANSWERED = "#e69f00", "#1a9641"


def _counts(manifest: dict) -> str:
    """Images and conversations of every split, by task."""
    tasks = sorted({task for part in manifest["splits"].values() for task in part["tasks"]})
    rows = [
        [escape(split), f"{part['images']:,}", f"{part['conversations']:,}", *(f"{part['tasks'].get(t, 0):,}" for t in tasks)]
        for split, part in manifest["splits"].items()
    ]
    return f'<div class="card">{table(["split", "images", "conversations", *(t.replace("_", " ") for t in tasks)], rows)}</div>'


def _histograms(values: dict[str, list[float]], unit: str) -> Figure:
    """A panel for each name."""
    figure = Figure(figsize=(9, 1.9 * -(-len(values) // 4)), layout="constrained")
    for i, (name, found) in enumerate(values.items()):
        ax = figure.add_subplot(-(-len(values) // 4), 4, i + 1)
        ax.hist(found, bins=min(30, max(5, len(set(found)))), color="#2166ac")
        ax.set_title(name.replace("_", " "))
        ax.set_xlabel(unit)
        ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


def _lengths(records: list[ImageRecord]) -> str:
    """Words of an answer by task, or its boxes where it is nothing else."""
    lengths: dict[str, list[float]] = {}
    boxes = set()
    for record in records:
        for c in record.conversations:
            for answer in (answer for _, answer in c.turns if answer is not None):
                if answer.startswith("{"):
                    boxes.add(c.task)
                found = boxes_of(answer) if answer.startswith("{") else answer.split()
                lengths.setdefault(c.task, []).append(len(found))
    if not lengths:
        return ""
    figure = _histograms({task: lengths[task] for task in sorted(lengths)}, "words")
    for ax, task in zip(figure.axes, sorted(lengths), strict=True):
        ax.set_xlabel("boxes" if task in boxes else "words")
    return plot(
        figure, "Length of an answer, by task: how many answers have how many words, or boxes where they are boxes alone."
    )


def _boxes(records: list[ImageRecord]) -> str:
    """Sizes, places and angles of all boxes, in percent of the image and degrees."""
    boxes = [b for r in records for c in r.conversations for q, a in c.turns for b in boxes_of(q) + boxes_of(a or "")]
    if not boxes:
        return '<p class="soft">No boxes in this data set.</p>'
    width, height = (np.array([getattr(b, hi) - getattr(b, lo) for b in boxes]) for lo, hi in (("x1", "x2"), ("y1", "y2")))
    found = {
        "width": list(width), "height": list(height), "angle": [b.theta for b in boxes],
        "area": list(width * height / 100),
    }  # fmt: skip
    figure = _histograms(found, "")
    for ax, unit in zip(figure.axes, ("% of the image", "% of the image", "degrees", "% of the image"), strict=True):
        ax.set_xlabel(unit)
    small = 100 * np.mean(width * height / 100 < 1)
    return plot(figure, f"{len(boxes):,} boxes; {small:.0f} % of them cover less than a hundredth of their image.")


def _rejected(rejected: list[dict]) -> str:
    """What was set aside, by file's field and reason."""
    if not rejected:
        return '<p class="soft">Nothing was set aside.</p>'
    counts = Counter((bad["field"], bad["reason"]) for bad in rejected)
    rows = [[escape(field), escape(reason), f"{n:,}"] for (field, reason), n in counts.most_common(30)]
    return f'<div class="card">{table(["field", "reason", "records"], rows)}</div>'


def _samples(records: list[ImageRecord], counter_clockwise: bool) -> str:
    """One question of each image, with the boxes of question and answer."""
    cards = []
    for i, record in enumerate(records):
        with_boxes = [c for c in record.conversations if any(boxes_of(q) + boxes_of(a or "") for q, a in c.turns)]
        choices = with_boxes if with_boxes and i % 2 == 0 else record.conversations
        chosen = choices[i % len(choices)]
        question, answer = chosen.turns[0]
        shapes = [(question, ASKED, "question", 'stroke-width="2.5"'), (answer or "", ANSWERED, "answer", 'stroke-width="2.5"')]
        said = escape(answer) if answer is not None else "<i>no answer: unlabelled</i>"
        below = escape(" · ".join([chosen.task.replace("_", " "), record.sensor, record.id]))
        cards.append(
            f'<article class="card sample">{drawing(record.image, shapes, counter_clockwise)}'
            f'<p class="question">{escape(question)}</p><p>{said}</p><div class="soft">{below}</div></article>'
        )
    legend = '<p class="soft">Boxes of the question are orange, those of the answer green.</p>'
    return f'{legend}<div class="grid" style="--min:220px">{"".join(cards)}</div>'


def read_some(folder: str, chosen: list[Group], most: int, seed: int = 0) -> list[tuple[Group, int, ImageRecord]]:
    """(row group, place in it, record without its image) of randomly drawn row groups, `most` at most."""
    found: list[tuple[Group, int, ImageRecord]] = []
    for group in random.Random(seed).sample(chosen, len(chosen)):
        if len(found) >= most:
            break
        found += [(group, place, record) for place, record in enumerate(read_group(folder, group, WITHOUT_IMAGE))]
    return found[:most]


def _duplicates(manifest: dict, copies: list[Copy]) -> str:
    """How many images are there twice, and which of them are held out as well."""
    if not copies:
        return '<p class="soft">No image is there twice.</p>'
    counts = table(["image", "copies"], [[escape(what), f"{n:,}"] for what, n in manifest["duplicates"].items()])
    leaks = [[escape(c.split), escape(c.id), escape(c.also_in), escape(c.also_as), str(c.bits)] for c in copies if c.leaks]
    shown = table(["split", "image", "also in", "as", "bits that differ"], leaks[:200])
    more = "" if len(leaks) <= 200 else ", the first 200; all are in duplicates.parquet"
    listed = f"<details><summary>Which ones{more}</summary>{shown}</details>" if leaks else ""
    fate = "They were left out." if manifest["left_out"] else "data.duplicates=remove leaves them out."
    text = f'<p class="soft">{len(leaks):,} images are held out as well. {fate}</p>' if leaks else ""
    return f'<div class="card">{counts}{text}{listed}</div>'


def write_preview(folder: str, manifest: dict, rejected: list[dict], copies: list[Copy], counter_clockwise: bool = True) -> str:
    """Write folder/preview.html and return its path.

    manifest: of the finished shards; rejected: {"field", "reason"} of what was set aside; copies: images that are there twice;
    counter_clockwise: the sign of theta in the box text. SAMPLES images are drawn.
    """
    everything = [g for split in manifest["splits"] for g in groups(manifest, split)]
    drawn = read_some(folder, everything, MOST_READ)
    records = [record for *_, record in drawn]
    samples = random.Random(1).sample(drawn, min(SAMPLES, len(drawn)))
    shown = [read_group(folder, group)[place] for group, place, _ in samples]
    read = sum(part["images"] for part in manifest["splits"].values())
    with rc_context(RC):  # type: ignore[arg-type]
        sections = {
            "What is in it": _counts(manifest),
            "Answers": _lengths(records),
            "Boxes": _boxes(records),
            "Set aside": _rejected(rejected),
            "Images that are there twice": _duplicates(manifest, copies),
            "Samples": _samples(shown, counter_clockwise),
        }
    notes = [f"source {manifest['source']}; lengths and boxes are of {len(records):,} images of {read:,}, drawn at random."]
    made_with = manifest["settings"]
    name = made_with.get("name") or made_with["root"].rstrip("/").rpartition("/")[2] or manifest["source"]
    html = page(name, "GeoDistill data", notes, sections)
    with writing(open_folder(folder), "preview.html") as stream:
        stream.write(html.encode())
    return f"{folder}/preview.html"
