"""Measure this machine: `python jobs/benchmark.py data|step --config FILE [key=value ...]`; writes run/benchmark/NAME.json.

data: the stream against a plain PIL loop, its memory, and (from a finished run) the share of a step that waits for data.
step: memory, time and rates of a worker's share of a step of distill.train on one device, with random weights, beside plan.py's.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from geodistill.cli import main
from geodistill.config import Config


def data(config: Config) -> None:
    from geodistill.benchmark import data_table, measure_data

    found = measure_data(config)
    file = Path(config.run) / "benchmark/data.json"
    file.write_text(json.dumps(found, indent=1))
    print(f"\n{data_table(found)}\n\nfigures: {file}")


def step(config: Config) -> None:
    from geodistill.step_benchmark import measure_step, step_table

    found = measure_step(config)
    file = Path(config.run) / "benchmark/step.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1))
    print(f"\n{step_table(found)}\n\nfigures: {file}")


BENCHMARKS: dict[str, Callable[[Config], None]] = {"data": data, "step": step}

if __name__ == "__main__":
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name in ("--help", "-h"):
        print(__doc__)
        raise SystemExit(0)
    if name not in BENCHMARKS:
        print(f"benchmark: cannot measure {name!r}; the first argument is one of: {', '.join(BENCHMARKS)}", file=sys.stderr)
        raise SystemExit(2)
    main("benchmark", BENCHMARKS[name], needs_ray=lambda config: name == "data")
