"""A long distillation with a fault every few minutes, and the same one without: `python jobs/benchmark.py soak [MINUTES]`.

Both make the same steps of distill.train, side by side, each with a Ray of its own and about half of the cores. In one a worker
or a process that decodes is killed, in turn, every PAUSE seconds. Memory is that of the process that calls `fit` and of all
that came from it, files that they have mapped left out, in all and by kind of process.
"""

import re
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median

import psutil

from geodistill.benchmarks.data import raylet
from geodistill.benchmarks.faults import ending, faulty, running, stage_of, started, trace
from geodistill.benchmarks.scaling import ready
from geodistill.config import Config, changed
from geodistill.evaluate.tables import Table
from geodistill.train.stage import Stage
from geodistill.train.trainer import fit

PAUSE = 120.0  # seconds between two faults
EVERY = 5.0  # seconds between two looks at the memory
VICTIMS = ("ray::RayTrainWorker", "ray::MapBatches")


def measure_soak(config: Config, minutes: str = "20") -> dict:
    """{"steps", "made": steps that were made, "seconds": from the first step to the last, "memory": what each kind of process has
    in every quarter of the time, MiB (all three: [with faults, without]), "killed": by kind, "difference", "same"}.

    minutes: about how long the two take.
    """
    loop = ready(config)
    config = changed(config, ["cluster.workers=2", "cluster.threads_per_worker=1", "cluster.window=4"])
    folder = Path(config.run) / "benchmark/soak"
    shutil.rmtree(folder, ignore_errors=True)
    first = stage_of(loop, folder / "rate")
    fit(config, first, faulty("none"))
    rows = trace(Path(first.folder))
    rate = (len(rows) - 5) / (rows[-1]["time"] - rows[4]["time"]) / 2
    steps = max(first.train.steps, round(60 * float(minutes) * rate))
    stages = []
    for name in ("faults", "none"):
        stage = stage_of(loop, folder / name)
        train = replace(stage.train, steps=steps, checkpoint_every=max(1, round(20 * rate)), log_every=20, validate_every=steps)
        stages.append(replace(stage, train=train))
    killed, *memory = soaked(config, *stages)
    traces = [trace(Path(stage.folder)) for stage in stages]
    return {
        "steps": steps,
        "made": [len(rows) for rows in traces],
        "seconds": [rows[-1]["time"] - rows[0]["time"] for rows in traces],
        "killed": killed,
        "memory": [quarters(looks) for looks in memory],
    } | ending(Path(stages[1].folder), Path(stages[0].folder))


def quarters(looks: list[dict[str, float]]) -> dict[str, list[float]]:
    """Of every kind of process, and "all", the median memory in each quarter of the looks; 0 where it was not there."""
    kinds = sorted({kind for look in looks for kind in look})
    parts = [looks[i * len(looks) // 4 : (i + 1) * len(looks) // 4] for i in range(4)]
    found = {kind: [median(look.get(kind, 0) for look in part) for part in parts] for kind in kinds}
    return {"all": [median(sum(look.values()) for look in part) for part in parts], **found}


def kind_of(process: psutil.Process) -> str:
    """What a process is for, such as "ray::RayTrainWorker", "raylet" or "gcs_server"."""
    name = process.cmdline()[0]
    return re.split(r"[.(\[ ]", name if name.startswith("ray::") else Path(name).name)[0]


def memory_of(processes: set[psutil.Process]) -> dict[str, float]:
    """MiB of each kind of process, files that they have mapped left out."""
    seen = dict[str, float]()
    for process in processes:
        try:
            info, kind = process.memory_info(), kind_of(process)
            seen[kind] = seen.get(kind, 0) + (info.rss - info.shared) / 2**20
        except (psutil.Error, IndexError):
            continue
    return seen


def soaked(config: Config, stage: Stage, quiet: Stage) -> tuple[dict[str, int], list[dict[str, float]], list[dict[str, float]]]:
    """Run `stage` with a fault every PAUSE seconds, and `quiet` beside it without: how many of each kind were killed, and
    `memory_of` the first and of the second every few seconds while they run.

    Raises RuntimeError where `quiet` fails.
    """
    done, killed = threading.Event(), dict.fromkeys(VICTIMS, 0)
    looks: tuple[list, list] = [], []

    def attack() -> None:
        turn = 0
        while not done.wait(PAUSE):
            title = VICTIMS[turn % 2]
            until = time.time() + PAUSE / 2
            while time.time() < until and not done.is_set():  # a decoding process lives for moments
                with suppress(psutil.NoSuchProcess):
                    if found := running(title):
                        found[-1].kill()
                        killed[title] += 1
                        break
            turn += 1

    def look(beside: subprocess.Popen) -> None:
        this, other, parent = psutil.Process(), psutil.Process(beside.pid), raylet()
        while not done.wait(EVERY):
            theirs = set[psutil.Process]()
            with suppress(psutil.NoSuchProcess):
                theirs = {other, *other.children(recursive=True)} if beside.poll() is None else theirs
            ours = {this, *this.children(recursive=True), parent, *parent.children(recursive=True)} - theirs
            for seen, processes in zip(looks, (ours, theirs), strict=True):
                seen += [memory_of(processes)] if processes else []

    with started(config, quiet) as beside:
        threads = [threading.Thread(target=attack), threading.Thread(target=look, args=(beside,))]
        for thread in threads:
            thread.start()
        try:
            fit(config, stage, faulty("none"))
        finally:
            done.set()
            for thread in threads:
                thread.join()
        if beside.wait():
            raise RuntimeError(f"{quiet.name} failed: see {quiet.folder}/output.txt")
    return killed, *looks


def soak_table(found: dict) -> str:
    """The table that is printed."""
    result = "the same" if found["same"] and found["difference"] == 0 else f"differs by {found['difference']:.1e}"
    rows = []
    for name, seconds, made, memory, end in zip(
        ("with faults", "without"), found["seconds"], found["made"], found["memory"], (result, ""), strict=True
    ):
        shares = [f"{value:.0f}" for kind in ("all", VICTIMS[0]) for value in memory[kind]]
        rows.append([name, f"{seconds:.0f}", str(made), *shares, end])
    places = [(kind, str(i + 1)) for kind in ("MiB in quarter", "of it trainers") for i in range(4)]
    columns = [("", "s"), ("", "steps made"), *places, ("", "weights and figures")]
    note = ", ".join(f"{count} x {title}" for title, count in found["killed"].items())
    return Table("Soak", columns, rows, f"Killed: {note}.", "run").text()
