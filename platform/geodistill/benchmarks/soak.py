"""A long distillation with a fault every few minutes, against the same one without: `python jobs/benchmark.py soak [MINUTES]`.

Both make the same steps of distill.train; in the first a worker or a process that decodes is killed, in turn, every PAUSE
seconds. Memory is that of this process and of all processes of Ray, files that they have mapped left out, in all and by kind of
process.
"""

import os
import re
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
    """{"seconds": [with faults, without], "steps", "made": steps that were made, "killed": by kind, "memory": for both runs what
    each kind of process has in every quarter of the time, MiB, "difference", "same"}. minutes: of the run without faults."""
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
    killed, *memory = soaked(config, stages[0], PAUSE)
    between = time.time()
    _, *without = soaked(config, stages[1], float("inf"))
    return {
        "seconds": [between - start, time.time() - between],
        "steps": steps,
        "made": len(trace(Path(stages[0].folder))),
        "killed": killed,
        "memory": [quarters(*memory), quarters(*without)],
    } | ending(Path(stages[1].folder), Path(stages[0].folder))


def quarters(looks: list[dict[str, float]]) -> dict[str, list[float]]:
    """Of every kind of process, and "all", the median memory in each quarter of the looks; 0 where it was not there."""
    kinds = sorted({kind for look in looks for kind in look})
    parts = [looks[i * len(looks) // 4 : (i + 1) * len(looks) // 4] for i in range(4)]
    found = {kind: [median(look.get(kind, 0) for look in part) for part in parts] for kind in kinds}
    return {"all": [median(sum(look.values()) for look in part) for part in parts], **found}


def kind_of(process: psutil.Process) -> str:
    """What a process is for, such as "ray::RayTrainWorker", "raylet", "gcs_server" or "driver"."""
    if process.pid == os.getpid():
        return "driver"
    name = process.cmdline()[0]
    return re.split(r"[.(\[ ]", name if name.startswith("ray::") else Path(name).name)[0]


def soaked(config: Config, stage: Stage, pause: float) -> tuple[dict[str, int], list[dict[str, float]]]:
    """Run `stage`, with a fault every `pause` seconds: (how many of each kind were killed, MiB of each kind of process every few
    seconds)."""
    done, killed = threading.Event(), dict.fromkeys(VICTIMS, 0)
    looks = list[dict[str, float]]()

    def attack() -> None:
        turn = 0
        while not done.wait(None if pause == float("inf") else pause):
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
            seen = dict[str, float]()
            for process in (psutil.Process(), parent, *parent.children(recursive=True)):
                try:
                    info, kind = process.memory_info(), kind_of(process)
                    seen[kind] = seen.get(kind, 0) + (info.rss - info.shared) / 2**20
                except (psutil.Error, IndexError):
                    continue
            looks.append(seen)

    threads = [threading.Thread(target=work) for work in (attack, look)]
    for thread in threads:
        thread.start()
    try:
        fit(config, stage, faulty("none"))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    return killed, looks


def soak_table(found: dict) -> str:
    """The table that is printed."""
    shares = [[f"{value:.0f}" for kind in ("all", VICTIMS[0]) for value in memory[kind]] for memory in found["memory"]]
    result = "the same" if found["same"] and found["difference"] == 0 else f"differs by {found['difference']:.1e}"
    rows = [
        ["with faults", f"{found['seconds'][0]:.0f}", str(found["made"]), *shares[0], result],
        ["without", f"{found['seconds'][1]:.0f}", str(found["steps"]), *shares[1], ""],
    ]
    places = [(kind, str(i + 1)) for kind in ("MiB in quarter", "of it trainers") for i in range(4)]
    columns = [("", "s"), ("", "steps made"), *places, ("", "weights and figures")]
    note = ", ".join(f"{count} x {title}" for title, count in found["killed"].items())
    return Table("Soak", columns, rows, f"Killed: {note}.", "run").text()
