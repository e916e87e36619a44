"""Measure this machine: `python jobs/benchmark.py NAME --config FILE [key=value ...]`; writes run/benchmark/NAME.json.

data: the stream against a plain PIL loop, its memory, and (from a finished run) the share of a step that waits for data.
step: memory, time and rates of a worker's share of a step of distill.train on one device, with random weights, beside plan.py's.
operators: the heaviest operators of such a step.
loss: time and memory of the losses on [responses, vocabulary] against a dense one and, where installed, TRL's.
distill [quick|full]: rollout and update against TRL's DistillationTrainer (where installed) and MiniLLM's published procedure;
random weights: small models on one thread (or cluster.threads_per_worker), large ones with cluster.use_gpu=true; and a plot.
scaling: images/s of distill.train with one worker and with two, and the rates that plan.py's table of more workers uses.
consumers [N]: the data plane under 8, 64 and 512 streams at once (or N), which sleep in place of training.
faults: what a killed worker, data task or driver, SIGTERM, a full disk ... cost a run, and whether it ends like an unbroken one.
soak [MINUTES]: a long distillation with a fault every two minutes, beside the same one without.
serve: answers/s of the endpoint with distill's student, beside transformers' generate one request at a time.
load [MINUTES]: the endpoint with 32 clients, a replica killed every 30 s, and another student half way.
scene: memory and rate of predict.py on a scene of 10,000 x 10,000 pixels.
compare: the ratios of all that were measured beside those of README's Results; ends with 1 where one has fallen.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

from geodistill.cli import main
from geodistill.config import Config

NAMES = (
    "data",
    "step",
    "operators",
    "loss",
    "distill",
    "scaling",
    "consumers",
    "faults",
    "soak",
    "serve",
    "load",
    "scene",
    "compare",
)
WITH_RAY = ("data", "scaling", "consumers", "faults", "soak", "serve", "load", "scene")


def benchmark(config: Config, name: str, *words: str) -> None:
    """Measure, write the figures, and print them (benchmarks/NAME.py: measure_NAME, NAME_table and perhaps NAME_figure)."""
    if "://" in config.run:
        raise ValueError(f"run={config.run}: a benchmark measures this machine, and writes to a local folder")
    module = import_module(f"geodistill.benchmarks.{name}")
    found = getattr(module, f"measure_{name}")(config, *words)
    file = Path(config.run) / f"benchmark/{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1))
    if figure := getattr(module, f"{name}_figure", None):
        figure(found).savefig(file.with_suffix(".png"), dpi=150)
    print(f"\n{getattr(module, f'{name}_table')(found)}\n\nfigures: {file}")


if __name__ == "__main__":
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name in ("--help", "-h"):
        print(__doc__)
        raise SystemExit(0)
    if name not in NAMES:
        print(f"benchmark: cannot measure {name!r}; the first argument is one of: {', '.join(NAMES)}", file=sys.stderr)
        raise SystemExit(2)
    more = {"distill": ("quick", "full").__contains__, "soak": str.isdigit, "load": str.isdigit, "consumers": str.isdigit}.get(
        name, lambda word: False
    )
    words = [sys.argv.pop(1)] if sys.argv[1:2] and more(sys.argv[1]) else []
    main("benchmark", lambda config: benchmark(config, name, *words), needs_ray=lambda config: name in WITH_RAY)
