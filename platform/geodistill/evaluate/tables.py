"""Tables 3-8 of the paper with the user's models below its rows, and a table as plain text or HTML.

Every number of PAPER: Zhang X Y, Feng S Y, Wang B. Lightweight remote sensing multimodal large language model based on
knowledge distillation. Tables 3 to 8. "Ours" is its distilled student, of the sizes of GeoChat-7B.
"""

import re
import textwrap
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import NamedTuple

from geodistill.evaluate import page

NOT_RUN, ABSENT = "not run", "-"


@dataclass(frozen=True)
class Table:
    """Cells are plain text. columns: (group above, name) of each column behind the label; rows: a label, then the cells."""

    title: str
    columns: list[tuple[str, str]]
    rows: list[list[str]]
    note: str = ""
    label: str = "model"
    empty: bool = False  # nothing of the user's in it: folded away in HTML

    def _groups(self) -> list[tuple[str, int]]:
        """(name, number of columns) of the groups; empty where no column has one."""
        groups = [(name, len(list(members))) for name, members in groupby(group for group, _ in self.columns)]
        return groups if any(name for name, _ in groups) else []

    def text(self) -> str:
        """Title, aligned columns, note."""
        lines = [[self.label, *(name for _, name in self.columns)], *self.rows]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        above, at = " " * widths[0], 1
        for name, count in self._groups():
            widths[at] += max(0, len(name) - sum(widths[at : at + count]) - 2 * (count - 1))
            above += "  " + name.center(sum(widths[at : at + count]) + 2 * (count - 1))
            at += count
        rows = ["  ".join([c[0].ljust(widths[0]), *map(str.rjust, c[1:], widths[1:])]) for c in lines]
        return "\n".join(filter(None, [self.title, above.rstrip(), *rows, textwrap.fill(self.note, 110)]))

    def html(self) -> str:
        """A block that folds; open unless it is empty."""
        head = [escape(self.label), *(escape(name) for _, name in self.columns)]
        groups = [(escape(name), count) for name, count in self._groups()]
        body = page.table(head, [[escape(cell) for cell in row] for row in self.rows], groups=groups)
        note = f'<p class="soft">{escape(self.note)}</p>' if self.note else ""
        folded, mark = ("", f" ({NOT_RUN})") if self.empty else (" open", "")
        return f"<details{folded}><summary>{escape(self.title)}{mark}</summary>{body}{note}</details>"


# The paper's benchmarks, and how the names of data sets tell them. HRBEN is the second test city of RSVQA HR.
BENCHMARKS = {
    "aid": r"(^|[^a-z])aid",
    "ucmerced": r"uc[ _-]?merced|(^|[^a-z])ucm",
    "hrben": r"hr[ _-]?ben|rsvqa[ _-]?hr|usgs_split_test_phili",
    "lrben": r"lr[ _-]?ben|rsvqa[ _-]?lr|lr_split_test",
    "referring": r"refer|grounding",
    "region": r"region",
    "size": r"size",
}


class Column(NamedTuple):
    """benchmark: a key of BENCHMARKS; key: the way to the figure in its `metrics.score`. a|b: a, else b."""

    group: str
    name: str
    benchmark: str
    key: tuple[str, ...]


class Published(NamedTuple):
    """One table of the paper. rows: model -> a number per column, None where the paper has none."""

    title: str
    columns: list[Column]
    rows: dict[str, tuple[float | None, ...]]
    digits: int = 2
    note: str = ""


def _scene(figure: str) -> list[Column]:
    return [Column("", name, name.lower(), ("scene_classification", figure)) for name in ("AID", "UCMerced")]


def _vqa(group: str, benchmark: str, **categories: str) -> list[Column]:
    asked = [Column(group, n.replace("_", "/"), benchmark, ("vqa", "categories", c, "accuracy")) for n, c in categories.items()]
    return [*asked, Column(group, "mOA", benchmark, ("vqa", "mOA"))]


_COMPARISON, _RURAL = "comparison|comp", "rural_urban|rural/urban"
PAPER = [
    Published(
        "Table 3. Zero-shot scene classification, OA (%)",
        _scene("OA"),
        {
            "MiniGPTv2": (12.90, 4.76),
            "LLaVA-1.5": (51.00, 68.00),
            "Qwen-VL": (52.60, 62.90),
            "GeoChat-7B": (67.20, 84.43),
            "GeoChat-13B": (69.53, 90.43),
            "Ours": (67.30, 91.24),
        },
    ),
    Published(
        "Table 4. Zero-shot scene classification, AA (%)",
        _scene("AA_all_labels"),
        {"GeoChat-7B": (55.88, 84.48), "GeoChat-13B": (56.59, 90.43), "Ours": (55.96, 91.24)},
        note="AA over every label that occurs in truth or answers: the paper's values on AID fit no other.",
    ),
    Published(
        "Table 5. RSVQA, accuracy (%)",
        _vqa("HRBEN", "hrben", presence="presence", comparison=_COMPARISON)
        + _vqa("LRBEN", "lrben", presence="presence", comparison=_COMPARISON, rural_urban="rural_urban|rural/urban"),
        {
            "MiniGPTv2": (40.79, 50.91, 46.46, 55.16, 55.22, 39.00, 54.96),
            "LLaVA-1.5": (69.83, 67.29, 68.40, 55.46, 68.20, 59.00, 62.77),
            "Qwen-VL": (66.44, 60.41, 63.06, 38.57, 67.59, 61.00, 55.35),
            "GeoChat-7B": (57.65, 80.84, 70.63, 90.86, 90.25, 94.00, 90.59),
            "GeoChat-13B": (56.05, 83.02, 71.15, 91.20, 91.75, 97.00, 91.60),
            "Ours": (60.03, 83.30, 73.06, 91.91, 92.88, 95.00, 92.50),
        },
        note="mOA is over all questions but counts and areas, every one counted alike.",
    ),
    Published(
        "Table 6. Visual grounding (%)",
        [Column("", f"acc@{at}", "referring", ("grounding", f"acc@{at}")) for at in ("0.5", "0.25")],
        {"MiniGPTv2": (10.8, 30.9), "GeoChat-7B": (11.2, 33.9), "GeoChat-13B": (14.1, 35.7), "Ours": (14.4, 35.9)},
        digits=1,
    ),
    Published(
        "Table 7. Region captioning",
        [Column("", figure, "region", ("region_captioning", figure)) for figure in ("ROUGE-1", "ROUGE-L", "METEOR")],
        {
            "MiniGPTv2": (32.10, 31.20, 10.00),
            "GeoChat-7B": (86.64, 86.59, 62.27),
            "GeoChat-13B": (87.10, 87.05, 63.18),
            "Ours": (87.80, 87.75, 63.55),
        },
    ),
    Published(
        "Table 8. Parameters and FLOPs",
        [
            Column("as the paper counts", "parameters, M", "size", ("parameters",)),
            Column("as the paper counts", "FLOPs, G", "size", ("flops",)),
            Column("all, with an image", "parameters, M", "size", ("all_parameters",)),
            Column("all, with an image", "FLOPs, G", "size", ("image_flops",)),
        ],
        {
            "GeoChat-7B": (6760.72, 6904.53, None, None),
            "GeoChat-13B": (13048.66, 13377.05, None, None),
            "Ours": (6760.72, 6904.53, None, None),
        },
        note="As the paper counts (found from its numbers): parameters of language model, projector and the vision tower's "
        "position embedding; FLOPs of the language model over 512 tokens without an image, two a multiply-add. "
        "With an image: tower, projector, and the language model over the image's tokens and 60 of text.",
    ),
]


def tables(scores: dict[str, dict[str, dict]], sizes: dict[str, dict[str, float]]) -> list[Table]:
    """Tables 3-8: the paper's rows, marked "(paper)", then the user's models.

    scores: model -> benchmark -> `metrics.score` of its predictions alone; sizes: model -> `models.cost.size_of`. A benchmark
    without a result of the table's task, or a model without a size, is "not run"; a figure that the result lacks is "-".
    """
    models = list(dict.fromkeys([*scores, *sizes]))
    measured = {model: {"size": sizes[model]} if model in sizes else {} for model in models}
    run = {model: scores.get(model, {}) for model in models}
    return [_beside(published, run) for published in PAPER[:-1]] + [_beside(PAPER[-1], measured)]


def _beside(published: Published, run: dict[str, dict[str, dict]]) -> Table:
    title, columns, rows, digits, note = published
    paper = [[f"{m} (paper)", *(ABSENT if v is None else f"{v:.{digits}f}" for v in values)] for m, values in rows.items()]
    user = [[model, *(_cell(results, column, digits) for column in columns)] for model, results in run.items()]
    empty = all(cell == NOT_RUN for row in user for cell in row[1:])
    return Table(title, [(c.group, c.name) for c in columns], paper + user, note, empty=empty)


def _cell(results: dict[str, dict], column: Column, digits: int) -> str:
    pattern = re.compile(BENCHMARKS[column.benchmark], re.IGNORECASE)
    found = next((result for name, result in results.items() if pattern.search(name) and column.key[0] in result), None)
    if found is None:
        return NOT_RUN
    for key in column.key:
        found = next((found[name] for name in key.split("|") if name in found), None)
        if found is None:
            return ABSENT
    return f"{found:.{digits}f}"
