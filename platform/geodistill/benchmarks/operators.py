"""Where the time of a rollout and of an update goes: `python jobs/benchmark.py operators`, by torch's profiler."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from geodistill.benchmarks.step import Step, alone, device_of, now
from geodistill.config import Config
from geodistill.evaluate.tables import Table

OPERATORS = 10
NO_OPERATOR = "no operator"


def measure_operators(config: Config) -> dict[str, list[dict[str, Any]]]:
    """The OPERATORS that take most of a rollout and of an update: "rollout", "update" -> [{name, share (0-1), calls}].

    Shares are of the time by the clock; what is left, when the device waits for Python, comes last, under NO_OPERATOR.
    Raises ValueError where there is no GPU for cluster.use_gpu=true.
    """
    device = device_of(config)
    step = Step(alone(config))
    step.run()
    found = {}
    rows, pixels = step.rows(), step.images()
    item: Any = None

    def rollout() -> None:
        nonlocal item
        item = step.distiller.rollout(rows, pixels, torch.Generator(device).manual_seed(0))

    def update() -> None:
        step.distiller.on_policy_pass(step.student, item, 1.0, 1.0)[0].backward()

    gpu = device.type == "cuda"
    for name, part in (("rollout", rollout), ("update", update)):
        with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as prof:
            start = now(device)
            part()
            wall = 1e6 * (now(device) - start)
        events = [(e.key, e.self_device_time_total if gpu else e.self_cpu_time_total, e.count) for e in prof.key_averages()]
        first = sorted(events, key=lambda event: -event[1])[:OPERATORS]
        found[name] = [{"name": key, "share": time / wall, "calls": count} for key, time, count in first]
        found[name].append({"name": NO_OPERATOR, "share": 1 - sum(time for _, time, _ in events) / wall, "calls": 0})
    return found


def operators_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """`measure_operators` in words."""
    columns = [(part, head) for part in found for head in ("operator", "share", "calls")]
    rows = [
        [
            "",
            *(
                cell
                for part in found.values()
                for cell in (part[i]["name"][:40], f"{part[i]['share']:.1%}", str(part[i]["calls"]))
            ),
        ]
        for i in range(min(len(part) for part in found.values()))
    ]
    return Table("The heaviest operators of a step", columns, rows, "", label="").text()
