"""A long distillation with a fault every few minutes, against the same one without: `python jobs/benchmark.py soak [MINUTES]`.

Both make the same steps of distill.train; in the first a worker or a process that decodes is killed, in turn, every PAUSE
seconds. Memory is that of this process and of all processes of Ray, files that they have mapped left out; and of it that of the
trainers.
"""

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import psutil

from geodistill.benchmarks.data import raylet
from geodistill.benchmarks.faults import ending, faulty, running, stage_of, trace
from geodistill.benchmarks.scaling import ready
from geodistill.config import Config, changed
from geodistill.evaluate.tables import Table
from geodistill.train.stage import Stage
from geodistill.train.trainer import fit

PAUSE = 120.0  # seconds between two faults
EVERY = 5.0  # seconds between two looks at the memory
VICTIMS = ("ray::RayTrainWorker", "ray::MapBatches")


def measure_soak(config: Config, minutes: str = "20") -> dict:
    """{"seconds": [with faults, without], "steps", "made": steps that were made, "killed": by kind, "memory", "trainers": MiB by
    quarter of the time, "difference", "same"}. minutes: what the run without faults shall take, about."""
    loop = ready(config)
    config = changed(config, ["cluster.workers=2", "cluster.threads_per_worker=1", "cluster.window=4", "cluster.max_failures=10"])
    folder = Path(config.run) / "benchmark/soak"
    shutil.rmtree(folder, ignore_errors=True)
    first = stage_of(loop, folder / "rate")
    fit(config, first, faulty("none"))
    rows = trace(Path(first.folder))
    rate = (len(rows) - 5) / (rows[-1]["time"] - rows[4]["time"])
    steps = max(first.train.steps, round(60 * float(minutes) * rate))
    stages = []
    for name in ("faults", "none"):
        stage = stage_of(loop, folder / name)
        train = replace(stage.train, steps=steps, checkpoint_every=max(1, round(20 * rate)), log_every=20, validate_every=steps)
        stages.append(replace(stage, train=train))
    start = time.time()
    killed, memory, trainers = soaked(config, stages[0])

    def quarters(values: list[float]) -> list[float]:
        return [median(values[i * len(values) // 4 : (i + 1) * len(values) // 4]) / 2**20 for i in range(4)]

    between = time.time()
    fit(config, stages[1], faulty("none"))
    return {
        "seconds": [between - start, time.time() - between],
        "steps": steps,
        "made": len(trace(Path(stages[0].folder))),
        "killed": killed,
        "memory": quarters(memory),
        "trainers": quarters(trainers),
    } | ending(Path(stages[1].folder), Path(stages[0].folder))


def soaked(config: Config, stage: Stage) -> tuple[dict[str, int], list[float], list[float]]:
    """Run `stage` under faults: (how many of each kind were killed, bytes of memory every few seconds, those of the trainers)."""
    done, killed = threading.Event(), dict.fromkeys(VICTIMS, 0)
    memory, trainers = list[float](), list[float]()

    def attack() -> None:
        turn = 0
        while not done.wait(PAUSE):
            title = VICTIMS[turn % 2]
            until = time.time() + PAUSE / 2
            while time.time() < until and not done.is_set():  # a decoding process lives for moments
                if found := running(title):
                    found[-1].kill()
                    killed[title] += 1
                    break
            turn += 1

    def look() -> None:
        parent = raylet()
        while not done.wait(EVERY):
            total = train = 0
            for process in (psutil.Process(), parent, *parent.children(recursive=True)):
                try:
                    info = process.memory_info()
                    total += info.rss - info.shared
                    if process.cmdline()[0].startswith(VICTIMS[0]):
                        train += info.rss - info.shared
                except (psutil.Error, IndexError):
                    continue
            memory.append(total)
            if train:  # none while they start
                trainers.append(train)

    threads = [threading.Thread(target=work) for work in (attack, look)]
    for thread in threads:
        thread.start()
    try:
        fit(config, stage, faulty("none"))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    return killed, memory, trainers


def soak_table(found: dict) -> str:
    """The table that is printed."""
    quarters = [f"{value:.0f}" for value in found["memory"] + found["trainers"]]
    result = "the same" if found["same"] and found["difference"] == 0 else f"differs by {found['difference']:.1e}"
    rows = [
        ["with faults", f"{found['seconds'][0]:.0f}", str(found["made"]), *quarters, result],
        ["without", f"{found['seconds'][1]:.0f}", str(found["steps"]), *["-"] * 8, ""],
    ]
    places = [(kind, str(i + 1)) for kind in ("MiB in quarter", "of it trainers") for i in range(4)]
    columns = [("", "s"), ("", "steps made"), *places, ("", "weights and figures")]
    note = ", ".join(f"{count} x {title}" for title, count in found["killed"].items())
    return Table("Soak", columns, rows, f"Killed: {note}.", "run").text()
