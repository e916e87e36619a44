"""The figures of a report: curves of a stage, validation losses, bars of the tasks, confusion matrices."""

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from geodistill.evaluate.metrics import OTHER, SUMMARY, columns

UNITS = {
    "scene": "OA, %",
    "VQA": "mOA, %",
    "grounding": "acc@0.25, %",
    "captioning": "ROUGE-L F",
    "detection": "mAP@0.5 OBB, %",
    "mean": "of the tasks",
}
# metric -> (title, unit) of its panel, in the order of the panels
CURVES = {
    "loss": ("total loss", "objective"),
    "validation_loss": ("validation loss", "nats / token"),
    "cross_entropy": ("cross-entropy", "nats / token"),
    "single": ("single-step term", "nats / token"),
    "long": ("long-term term", "per token"),
    "align": ("alignment", "½ dist² / image token"),
    "pretrain": ("pre-training term", "nats / token"),
    "reverse_kl": ("reverse KL, student to teacher", "nats / token"),
    "reward": ("reward, log p − log q", "nats / token"),
    "agreement": ("top-1 agreement with teacher", "share of tokens"),
    "entropy": ("entropy of the student", "nats / token"),
    "importance": ("importance weight", "mean"),
    "length": ("response length", "tokens"),
    "repetition": ("repeated pairs of tokens", "share"),
    "grad_norm": ("gradient norm", "L2"),
    "learning_rate": ("learning rate", ""),
    "images_per_second": ("throughput", "images / s"),
    "tokens_per_second": ("response tokens learned from", "tokens / s"),
    "data_wait": ("wait for data", "share of the time"),
    "set_aside": ("answers and images set aside", "records"),
    "finished": ("responses that ended by themselves", "share"),
    "peak_memory_gib": ("peak memory of a worker", "GiB"),
    "seconds": ("time", "s"),
}
COLORS = {"truth": "#1a9641", "teacher": "#7b818a", "baseline": "#d7301f", "distilled": "#2166ac", "question": "#e69f00"}
SPARE = ("#8e5bb5", "#00868b", "#b8860b", "#c2508f")
RC = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a9099", "axes.labelcolor": "#4a5058",
    "axes.axisbelow": True, "grid.color": "#8a9099", "grid.alpha": 0.22,
    "text.color": "#1f2328", "text.parse_math": False, "xtick.color": "#4a5058", "ytick.color": "#4a5058",
    "legend.frameon": False, "figure.constrained_layout.w_pad": 0.08, "svg.hashsalt": "geodistill",
}  # fmt: skip


def color_of(name: str, names: list[str]) -> str:
    others = [n for n in names if n not in COLORS]
    return COLORS[name] if name in COLORS else SPARE[others.index(name) % len(SPARE)]


def _points(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """The finite values of one metric and their steps."""
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
    return [step for step, _ in found], [value for _, value in found]


def stage_figure(rows: list[dict]) -> Figure | None:
    """Small multiples of one stage: a panel per metric that occurs. None if there is nothing to draw."""
    keys = [*CURVES, *sorted({k for row in rows for k in row} - set(CURVES) - {"step", "images"})]
    panels = [(key, *points) for key in keys if (points := _points(rows, key))[0]]
    if not panels:
        return None
    lines = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(10, 1.75 * lines + 0.25), layout="constrained")
    grid = figure.subplots(lines, 3, squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.axis("off")
    for i, (ax, (key, steps, values)) in enumerate(zip(grid.flat, panels, strict=False)):
        title, unit = CURVES.get(key, (key, ""))
        missing = sum(key in row for row in rows) - len(values)
        ax.set_title(title + (f" ({missing} not finite)" if missing else ""))
        ax.set_ylabel(unit, fontsize=8)
        window = len(values) // 20
        ax.plot(steps, values, color="#2166ac", lw=1.5 if window < 2 else 0.7, alpha=1 if window < 2 else 0.4)
        if len(values) <= 20:
            ax.plot(steps, values, "o", color="#2166ac", ms=3)
        if window >= 2:
            mean = np.convolve(values, np.ones(window) / window, "valid")
            ax.plot(steps[(window - 1) // 2 :][: len(mean)], mean, color="#2166ac", lw=1.7)
        ax.locator_params(axis="x", nbins=5, integer=True)
        ax.locator_params(axis="y", nbins=4)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if i + 3 >= len(panels):
            ax.set_xlabel("step", fontsize=8)
    return figure


def validation_figure(histories: dict[str, list[dict]]) -> Figure | None:
    """Validation loss of baseline and distilled student over the steps. None unless both have one."""
    base = _points(histories.get("baseline", []), "validation_loss")
    warm = _points(histories.get("distill/warm", []), "validation_loss")
    loop = _points(histories.get("distill", []), "validation_loss")
    if not base[0] or not (loop[0] or warm[0]):
        return None
    start = max((row["step"] for row in histories.get("distill/warm", [])), default=0)
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    ax = figure.subplots()
    ax.plot(*base, "o-", ms=3.5, color=COLORS["baseline"], label="baseline")
    steps = warm[0] + [start + step for step in loop[0]]
    ax.plot(steps, warm[1] + loop[1], "o-", ms=3.5, color=COLORS["distilled"], label="distilled")
    if start and loop[0]:
        ax.axvline(start, color=COLORS["teacher"], ls=":", lw=1.5, label="start of the loop")
    ax.set(xlabel="step", ylabel="nats / token")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)
    return figure


def bars_figure(scores: dict[str, dict]) -> Figure:
    """The tasks as groups of bars, one bar per model."""
    tasks = [name for name in columns(scores) if name != "mean"]
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / len(scores)
    for i, (model, result) in enumerate(scores.items()):
        values = [result["summary"].get(SUMMARY[task]) for task in tasks]
        x = np.arange(len(tasks)) - 0.4 + width * (i + 0.5)
        bars = ax.bar(x, [v or 0 for v in values], 0.92 * width, color=color_of(model, list(scores)), label=model)
        ax.bar_label(bars, ["-" if v is None else f"{v:.1f}" for v in values], padding=2, fontsize=8 if len(scores) < 6 else 6)
    ax.set_xticks(range(len(tasks)), [f"{task}\n{UNITS[task]}" for task in tasks])
    ax.set_xlim(-0.5, len(tasks) - 0.5)
    ax.set_ylim(0, 108)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="x", visible=False)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, borderaxespad=0)
    return figure


def heat_map(axes: dict[str, tuple], points: list[tuple[dict, float]], metric: str) -> Figure:
    """`metric` over two swept settings. axes: key -> its values; points: (key -> value, metric) of each trial."""
    (across, columns_), (down, rows) = axes.items()
    cells = np.full((len(rows), len(columns_)), np.nan)
    for values, value in points:
        cells[rows.index(values[down]), columns_.index(values[across])] = value
    figure = Figure(figsize=(1.1 * len(columns_) + 2.2, 0.7 * len(rows) + 1.4), layout="constrained")
    ax = figure.subplots()
    mesh = ax.pcolormesh(cells, cmap="viridis")
    ax.set_xticks(np.arange(len(columns_)) + 0.5, [f"{v}" for v in columns_])
    ax.set_yticks(np.arange(len(rows)) + 0.5, [f"{v}" for v in rows])
    ax.set(xlabel=across, ylabel=down)
    ax.tick_params(length=0)
    ax.grid(False)
    middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
    for (i, j), value in np.ndenumerate(cells):
        if math.isfinite(value):
            ax.text(j + 0.5, i + 0.5, f"{value:.4g}", ha="center", va="center", color="white" if value < middle else "black")
    figure.colorbar(mesh, ax=ax, label=metric)
    return figure


def parallel_coordinates(axes: list[tuple[str, bool]], points: list[tuple[dict, float]], metric: str) -> Figure:
    """A line for each trial over its settings and, last, `metric`. axes: (key, is its scale logarithmic?)."""
    columns_ = [([values[key] for values, _ in points], log) for key, log in axes] + [([value for _, value in points], False)]
    figure = Figure(figsize=(2.2 * len(columns_) + 1, 3.6), layout="constrained")
    ax = figure.subplots()
    heights = []
    for place, (values, log) in enumerate(columns_):
        names = sorted(set(values), key=str) if any(isinstance(v, str | bool) for v in values) else []
        numbers = np.array([names.index(v) for v in values] if names else values, float)
        scaled = np.log(numbers) if log else numbers
        low, high = scaled.min(), scaled.max()
        heights.append((scaled - low) / (high - low) if high > low else np.full(len(values), 0.5))
        ax.axvline(place, color="#8a9099", lw=1)
        ends = (
            ((names[0], -0.06), (names[-1], 1.03)) if names else ((f"{numbers.min():.4g}", -0.06), (f"{numbers.max():.4g}", 1.03))
        )
        for text, y in ends:
            ax.text(place, y, text, ha="center", fontsize=8)
    best_first = np.argsort(heights[-1])
    colors = colormaps["viridis_r"](np.linspace(0.05, 1, max(2, len(points))))
    for rank, i in reversed(list(enumerate(best_first))):
        ax.plot(range(len(columns_)), [h[i] for h in heights], color=colors[-1 - rank], lw=1.6, alpha=0.85)
    ax.set_xticks(range(len(columns_)), [*(key.rsplit(".", 1)[-1] for key, _ in axes), metric])
    ax.set_yticks([])
    ax.set_ylim(-0.1, 1.1)
    ax.grid(False)
    return figure


def confusion_figure(model: str, confusion: dict) -> Figure:
    """Confusion matrix in percent of each true class; rows truth, columns prediction."""
    counts = np.array(confusion["counts"], float)
    columns = [*confusion["labels"], OTHER]
    if not counts[:, -1].any():
        counts, columns = counts[:, :-1], columns[:-1]
    share = 100 * counts / counts.sum(axis=1, keepdims=True)
    small = len(columns) <= 16
    side, font = (0.24, 8.5) if small else (0.2, 7)
    figure = Figure(figsize=(side * len(columns) + 1.2, side * len(share) + 1.5), layout="constrained")
    ax = figure.subplots()
    mesh = ax.pcolormesh(share, cmap="Blues", vmin=0, vmax=100)
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90, fontsize=font)
    ax.set_yticks(np.arange(len(share)) + 0.5, confusion["labels"], fontsize=font)
    ax.tick_params(length=0)
    ax.invert_yaxis()
    ax.set_aspect("equal")
    ax.grid(False)
    ax.set(xlabel="predicted", ylabel="true")
    if small:
        for (i, j), value in np.ndenumerate(share):
            if value:
                ink = "white" if value > 55 else "#1f2328"
                ax.text(j + 0.5, i + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink)
    else:
        figure.colorbar(mesh, ax=ax, label="% of the true class", shrink=0.6)
    return figure
