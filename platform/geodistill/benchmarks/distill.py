"""Our rollout and update beside two others', in turn: `python jobs/benchmark.py distill [quick|full] --config FILE`.

trl: TRL's DistillationTrainer as it comes (on-policy, images, beta=1), against ours without teacher-mixing, long-term, alignment
and pre-training terms: both minimise KL(student || teacher) on what the student writes, with one update a rollout. The time in
which TRL prepares images and words is taken off its step; the others get theirs made.
minillm: the procedure of MiniLLM's published code (minillm.py says what of it), against ours with preset=reference: the same
teacher-mixed sampling, terms and UPDATES of a rollout, without the pre-training corpus on either side.

Same for all: random weights from one seed, a frozen tower that teacher and student share, images, prompts, SAMPLES responses a
step of RESPONSE tokens exactly (special tokens are forbidden, so none can end), AdamW, clipping, threads. TRL's loss counts the
special tokens, which ours forbids. Each contestant is a process of its own, which waits while the others step.
Units: seconds, bytes; MiB = 2**20 bytes.
"""

import multiprocessing
import textwrap
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from geodistill.benchmarks.contestants import (
    MINILLM,
    NO_MEMORY,
    OURS,
    READY,
    RESPONSE,
    SAMPLES,
    TRL,
    UPDATES,
    Pair,
    Setting,
    contestant,
)
from geodistill.benchmarks.minillm import ALPHA
from geodistill.benchmarks.step import NO_GPU, device_of
from geodistill.config import Config, ModelConfig, VisionConfig
from geodistill.evaluate.plots import COLORS, RC
from geodistill.evaluate.tables import Table

MIB = 2**20
INSTALL = "pip install -c constraints.txt -e '.[bench]'"
NAMES = {
    (TRL, OURS): "ours, reverse KL alone",
    (TRL, TRL): "TRL",
    (MINILLM, OURS): "ours, as MiniLLM",
    (MINILLM, MINILLM): "MiniLLM",
}
# rival, image tokens, questions -> how many times as fast ours should be at least, with the small pair on a CPU
TARGETS = {
    (TRL, 64, 1): 1.0, (TRL, 256, 1): 1.0, (TRL, 1296, 1): 1.0, (TRL, 256, 8): 5.0, (TRL, 1296, 8): 8.0,
    (MINILLM, 256, 1): 2.0, (MINILLM, 256, 8): 4.0,
}  # fmt: skip
Order = tuple[str, int, str]  # of a step: contestant, n, and the rival with whose objective it is made

TOWER = VisionConfig(hidden=128, layers=5, heads=4, patch=8)
SMALL = Pair(
    "5 M / 30 M",
    ModelConfig(vision=TOWER, hidden=256, layers=4, heads=4, intermediate=688),
    ModelConfig(vision=TOWER, hidden=512, layers=8, heads=8, intermediate=1536),
)
CLIP_L = VisionConfig(hidden=1024, layers=24, heads=16, patch=14)


def _large(hidden: int, layers: int, heads: int, intermediate: int) -> ModelConfig:
    return ModelConfig(vision=CLIP_L, hidden=hidden, layers=layers, heads=heads, intermediate=intermediate)


LARGE = [
    Pair("1 B / 3 B", _large(2048, 22, 32, 5632), _large(3200, 26, 32, 8640), 32000, torch.bfloat16),
    Pair("7 B / 13 B", _large(4096, 32, 32, 11008), _large(5120, 40, 40, 13824), 32000, torch.bfloat16),
]


class Shape(NamedTuple):
    """What is measured at one number of image tokens.

    trl, minillm: n (questions of an image) of each comparison; repeats: counted rounds, behind one that is not. each: a round is
    of one n; else it is of all, with a single step of the rival, whose work n does not change: always SAMPLES sequences of one
    question behind one image.
    """

    image_tokens: int
    trl: tuple[int, ...]
    minillm: tuple[int, ...]
    repeats: int
    each: bool = False


ALL = (1, 4, 8, 16)
PLANS = {
    "quick": [Shape(256, (1, 8), (1, 8), 1)],
    "": [Shape(64, ALL, (), 5), Shape(256, ALL, ALL, 3), Shape(1296, ALL, (), 3)],
    "full": [Shape(64, ALL, ALL, 5, each=True), Shape(256, ALL, ALL, 5, each=True), Shape(1296, ALL, ALL, 3, each=True)],
}
GPU_PLAN = [Shape(256, (1, 8), (1, 8), 3), Shape(1296, (1, 8), (1, 8), 3)]


def process(**given: Any) -> Any:
    return multiprocessing.get_context("spawn").Process(daemon=True, **given)


def answer(name: str, pipe: Connection) -> Any:
    """What a contestant says next. Raises MemoryError where the device has too little, RuntimeError where it failed."""
    try:
        said = pipe.recv()
    except EOFError:
        raise RuntimeError(f"{name} was ended from outside; is there enough memory?") from None
    if isinstance(said, str) and said != READY:
        raise MemoryError(said) if said == NO_MEMORY else RuntimeError(f"{name}: {said}")
    return said


def take_turns(names: list[str], setting: Setting, orders: list[Order]) -> dict[Order, list[dict[str, float]]]:
    """Let the contestants `names` step as `orders` say, each when its turn comes: what Turn.end told of every step."""
    pipes: dict[str, Connection] = {}
    running: list[Any] = []
    found: dict[Order, list[dict[str, float]]] = {}
    mine = [order for order in orders if order[0] in names]
    try:
        for name in names:
            pipes[name], theirs = multiprocessing.Pipe()
            own = [(n, rival) for who, n, rival in mine if who == name]
            running.append(process(target=contestant, args=(name, setting, own, theirs)))
            running[-1].start()
            theirs.close()
            assert answer(name, pipes[name]) == READY
        for order in mine:
            name, n, rival = order
            with suppress(BrokenPipeError):  # it has ended, and said why
                pipes[name].send("step")
            told = answer(name, pipes[name])
            assert told["tokens"] == SAMPLES * RESPONSE, f"{NAMES[rival, name]} wrote {told['tokens']} tokens"
            found.setdefault(order, []).append(told)
            print(
                f"[benchmark] {setting.image_tokens} image tokens, n={n}: {NAMES[rival, name]} {told['seconds']:.2f} s",
                flush=True,
            )
    finally:
        for pipe in pipes.values():
            pipe.close()
        for one in running:
            one.join()
    return found


def orders_of(shape: Shape, rivals: list[str]) -> list[Order]:
    """Whose turn it is: in every round ours and its rival follow each other, in the next the other way round."""
    orders: list[Order] = []
    for rival in rivals:
        asked = getattr(shape, rival)
        for group in [(n,) for n in asked] if shape.each else [asked] * bool(asked):
            once = [*((OURS, n, rival) for n in group), (rival, group[0], rival)]
            for number in range(1 + shape.repeats):
                orders += once[::-1] if number % 2 else once
    return orders


def no_case(pair: str, image_tokens: int, n: int, rival: str, lacking: str = "") -> dict[str, Any]:
    """A case of which nothing is measured. lacking: why."""
    place = {"pair": pair, "image_tokens": image_tokens, "questions": n, "rival": rival, "lacking": lacking}
    return place | dict.fromkeys(("ours", "theirs", "ratio", "cpu_ratio", "target")) | {"ratios": [], "runs": {}}


def compare(setting: Setting, shape: Shape, rivals: list[str]) -> list[dict[str, Any]]:
    """A case for each n and rival of `shape`. On a GPU, which cannot hold all models at once, one contestant after another.

    ours, theirs: medians over the counted steps; ratio: time of the rival / ours, the median over the rounds; cpu_ratio: of the
    CPU time of their processes, which other work on the machine disturbs less.
    """
    orders = orders_of(shape, rivals)
    names = [name for name in (OURS, TRL, MINILLM) if any(who == name for who, *_ in orders)]
    found: dict[Order, list[dict[str, float]]] = {}
    lacking: dict[str, str] = {}
    for group in [names] if setting.device == "cpu" else [[name] for name in names]:
        try:
            found |= take_turns(group, setting, orders)
        except MemoryError as error:
            lacking[group[0]] = str(error)
    cases = []
    for rival in rivals:
        asked = getattr(shape, rival)
        for n in asked:
            steps = {OURS: (OURS, n, rival), rival: (rival, n if shape.each else asked[0], rival)}
            runs = {name: found.get(order, [])[1:] for name, order in steps.items()}
            medians = [{key: median(run[key] for run in told) for key in told[0]} if told else None for told in runs.values()]
            pairs = [*zip(runs[rival], runs[OURS], strict=True)] if all(runs.values()) else []
            case = no_case(setting.pair.name, setting.image_tokens, n, rival)
            case |= {"ours": medians[0], "theirs": medians[1], "runs": runs}
            if pairs:
                case["ratios"] = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
                case["ratio"] = median(case["ratios"])
                case["cpu_ratio"] = median(theirs["cpu"] / ours["cpu"] for theirs, ours in pairs)
            if setting.pair == SMALL:
                case["target"] = TARGETS.get((rival, setting.image_tokens, n))
            case["lacking"] = "; ".join(f"{NAMES[rival, name]}: {lacking[name]}" for name in runs if name in lacking)
            cases.append(case)
    return cases


def measure_distill(config: Config, plan: str = "") -> dict[str, Any]:
    """Every case of PLANS[plan] on the CPU, or of GPU_PLAN with cluster.use_gpu=true. Raises ValueError where there is no GPU."""
    device = device_of(config)
    gpu = device.type == "cuda"
    has_trl = find_spec("trl") is not None
    rivals = [TRL, MINILLM] if has_trl else [MINILLM]
    threads = config.cluster.threads_per_worker or 1
    cases: list[dict[str, Any]] = []
    for pair in LARGE if gpu else [SMALL]:
        for shape in GPU_PLAN if gpu else PLANS[plan]:
            cases += compare(Setting(pair, shape.image_tokens, device.type, threads), shape, rivals)
    if not gpu:
        cases += [
            no_case(pair.name, shape.image_tokens, n, rival, NO_GPU)
            for pair in LARGE
            for shape in GPU_PLAN
            for rival in rivals
            for n in getattr(shape, rival)
        ]
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "threads": threads,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "trl": version("trl") if has_trl else None,
        "samples": SAMPLES,
        "response_tokens": RESPONSE,
        "updates_per_rollout": {TRL: 1, MINILLM: UPDATES},
        "alpha": {TRL: 0.0, MINILLM: ALPHA},
        "cases": cases,
    }


def distill_table(found: dict[str, Any]) -> str:
    """`measure_distill` in words: seconds against the targets, memory, and the time of a question over n."""

    def cell(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def label(case: dict[str, Any]) -> str:
        return f"{case['pair']}, {case['image_tokens']} image tokens, n={case['questions']}"

    tables = [] if found["trl"] else [f"TRL: not measured; {INSTALL}"]
    for rival in (TRL, MINILLM):
        rows = []
        for case in (case for case in found["cases"] if case["rival"] == rival):
            both = [case["ours"], case["theirs"]]
            ratios = case["ratios"]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else case["lacking"] or "-"
            row = [cell(one and one[key]) for one in both for key in ("seconds", "rollout")]
            row += [cell(case["ratio"]), spread, cell(case["cpu_ratio"]), f">= {case['target']:.1f}" if case["target"] else ""]
            row += [cell(one and one[key] / MIB, 0) for one in both for key in ("extra", "peak")]
            rows.append([label(case), *row])
        what, their = ("as TRL: reverse KL alone, one update a rollout", "TRL") if rival == TRL else (
            f"as MiniLLM: alpha {ALPHA}, preset reference, {UPDATES} updates a rollout", "MiniLLM (port)"
        )  # fmt: skip
        columns = [(who, name) for who in ("ours, s", f"{their}, s") for name in ("step", "rollout")]
        columns += [(f"{their} / ours", name) for name in ("ratio", "rounds", "CPU", "target")]
        columns += [(who, name) for who in ("ours, MiB", f"{their}, MiB") for name in ("step", "peak")]
        if rows:
            tables.append(Table(f"A step on {found['device']}, {what}", columns, rows, label="").text())
    note = (
        f"{found['samples']} responses of {found['response_tokens']} tokens a step, of {found['samples']}/n images; medians; "
        f"threads of a contestant: {found['threads']}. Where a rival's time is the same for every n, it stepped once a round for "
        "all of them. CPU: the ratio of CPU times, which other work on the machine disturbs "
        "less. MiB: a step's own above what lay before it, and the most of the process."
    )
    return "\n\n".join([*tables, textwrap.fill(note, 110), growth_table(found)])


def lines_of(found: dict[str, Any]) -> dict[tuple[str, int], dict[str, dict[int, float]]]:
    """(pair, image tokens) -> contestant -> n -> milliseconds of a question, median of the steps."""
    lines: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    for case in found["cases"]:
        for name, one in ((OURS, case["ours"]), (case["rival"], case["theirs"])):
            if one:
                line = lines.setdefault((case["pair"], case["image_tokens"]), {}).setdefault(NAMES[case["rival"], name], {})
                line[case["questions"]] = 1000 * one["seconds"] / found["samples"]
    return lines


def growth_table(found: dict[str, Any]) -> str:
    """Milliseconds of a question over n."""
    lines = lines_of(found)
    counts = sorted({n for panel in lines.values() for line in panel.values() for n in line})
    rows = [
        [f"{pair}, {image_tokens} image tokens: {name}", *(f"{line[n]:.0f}" if n in line else "-" for n in counts)]
        for (pair, image_tokens), panel in lines.items()
        for name, line in panel.items()
    ]
    return Table("Time of a question, ms", [("questions of an image", f"n={n}") for n in counts], rows, label="").text()


def distill_figure(found: dict[str, Any]) -> Figure:
    """Time of a question over the questions of an image: a panel for each number of image tokens, a line for each contestant."""
    panels = lines_of(found)
    colors = dict(zip(NAMES.values(), (COLORS["distilled"], COLORS["baseline"], "#74add1", COLORS["question"]), strict=True))
    with rc_context(RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(3.4 * len(panels) + 0.4, 3.2), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
        for ax, ((pair, image_tokens), panel) in zip(grid.flat, panels.items(), strict=True):
            for name, line in panel.items():
                ax.plot([*line], [*line.values()], "o-", ms=3.5, color=colors[name], label=name)
            ax.set_title(f"{image_tokens} image tokens ({pair})")
            ax.set(xlabel="questions of an image (n)", ylabel="ms / question", yscale="log")
            ax.set_xticks(sorted({n for line in panel.values() for n in line}))
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
        handles = {text: line for ax in figure.axes for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4)
    return figure
