"""Are the ratios of a run's measurements still those that were committed? `python jobs/benchmark.py compare`, `make bench`.

Ratios within one run, because the speed of machines differs. BASELINE holds those of README's Results; a ratio has fallen when it
is less than KEPT of its committed value.
"""

import json
from pathlib import Path
from typing import Any

from geodistill.cli import JobFailed
from geodistill.config import Config
from geodistill.evaluate.tables import Table

BASELINE = Path(__file__).parents[3] / "docs/benchmarks.json"
KEPT = 0.8


def ratios(name: str, found: dict[str, Any]) -> dict[str, float]:
    """The ratios among the figures of one measurement, by name; more is better."""
    if name == "data":
        return {f"data: stream / plain PIL, {size} px": one["ratio"] for size, one in found["stream"].items()}
    if name == "loss":
        return found["ratios"]
    if name == "distill":
        return {
            f"distill: {case['rival']} / ours, {case['image_tokens']} image tokens, n={case['questions']}": case["ratio"]
            for case in found["cases"]
            if case["ratio"]
        }
    if name == "scaling":
        return {f"scaling: efficiency of {w} workers": one["efficiency"] for w, one in found["workers"].items() if w != "1"}
    return {}


def measure_compare(config: Config) -> dict[str, Any]:
    """All ratios of run/benchmark beside the committed ones. Raises ValueError where nothing was measured."""
    now: dict[str, float] = {}
    for file in sorted((Path(config.run) / "benchmark").glob("*.json")):
        now |= ratios(file.stem, json.loads(file.read_text()))
    if not now:
        raise ValueError(f"{config.run}/benchmark holds no ratios yet: run `make bench`, or jobs/benchmark.py distill and loss")
    return {"now": now, "committed": json.loads(BASELINE.read_text()), "kept": KEPT}


def fallen(found: dict[str, Any]) -> list[str]:
    """The names of those that have fallen."""
    now, before = found["now"], found["committed"]
    return [name for name, value in now.items() if name in before and value < found["kept"] * before[name]]


def compare_table(found: dict[str, Any]) -> str:
    """`measure_compare` in words. Raises JobFailed, with the table, where a ratio has fallen."""
    now, before, down = found["now"], found["committed"], fallen(found)
    rows = [
        [name, f"{before[name]:.2f}" if name in before else "-", f"{value:.2f}", "fallen" if name in down else ""]
        for name, value in now.items()
    ]
    note = f"Fallen: below {found['kept']:.0%} of the committed ratio (docs/{BASELINE.name})."
    text = Table("Ratios", [("", "committed"), ("", "now"), ("", "")], rows, note, label="").text()
    if down:
        raise JobFailed(f"{text}\n{len(down)} of {len(now)} ratios have fallen: {'; '.join(down)}")
    return text
