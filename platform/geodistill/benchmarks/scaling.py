"""What a second worker brings here, and the rates that train/scaling.py reckons with: `python jobs/benchmark.py scaling`.

The stage is distill.train as jobs/distill.py runs it, through Ray Train, DeepSpeed and Ray Data, for a few steps: with one worker
and with two, of one thread each, at the same global batch. Its data, teacher and warm start are the run's; what is not there
yet is made first, as the jobs make it. Units: seconds, bytes; GB = 1e9 bytes.
"""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from geodistill.benchmarks.data import Watch, timed
from geodistill.config import Config, changed
from geodistill.data.prepare import prepare
from geodistill.data.stream import PackerSpec, stream
from geodistill.evaluate.tables import Table
from geodistill.language import IMAGE
from geodistill.train.plan import load_of, shapes, work
from geodistill.train.scaling import draws, image_bytes
from geodistill.train.stage import Stage, stages
from geodistill.train.trainer import fit

WORKERS = (1, 2)
STEPS, LINE = 60, 10  # steps of a run, and of a line of metrics.jsonl; the first line holds the start and is left out
REPEATS = 20  # of an all-reduce, and of an array through the object store; medians
PIXELS = (8, 504, 504, 3)  # GeoChat's micro-batch


def ready(config: Config) -> Stage:
    """distill.train, once what it starts from is there: finished parts are skipped, the others are made as the jobs make them."""
    teacher = Path(config.distill.teacher)
    own = stages(replace(config, role="teacher"), "finetune")
    if not (teacher / "config.json").is_file() and teacher != Path(own[-1].folder) / "model":
        raise ValueError(f"distill.teacher={teacher} holds no model: convert one with jobs/convert.py, or leave the key out")
    prepare(config, parallel=True)
    if not (teacher / "config.json").is_file():
        for stage in own:
            fit(replace(config, role="teacher"), stage)
    *warm, loop = stages(config, "distill")
    for stage in warm:
        fit(config, stage)
    return loop


def train_with(config: Config, loop: Stage, workers: int) -> tuple[Stage, list[dict[str, float]]]:
    """The stage and its lines of metrics.jsonl but the first, of a fresh run of STEPS steps."""
    folder = Path(config.run) / f"benchmark/scaling-{workers}"
    shutil.rmtree(folder, ignore_errors=True)
    train = replace(loop.train, steps=STEPS, log_every=LINE, validate_every=STEPS, checkpoint_every=STEPS)
    stage = replace(loop, name=f"{workers}-worker{'s' * (workers > 1)}", folder=str(folder), train=train)
    fit(changed(config, [f"cluster.workers={workers}", "cluster.threads_per_worker=1"]), stage)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return stage, [line for line in lines if "images_per_second" in line][1:]


def _reduce(job: dict) -> None:
    """Write to job["file"] the seconds of an all-reduce of job["bytes"] between the workers: the median of REPEATS."""
    torch.set_num_threads(1)
    device = ray.train.torch.get_device()
    gradient = torch.ones(job["bytes"] // 4, device=device)
    found = []
    for _ in range(REPEATS + 3):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradient)
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
        gradient.fill_(1.0)
    if dist.get_rank() == 0:
        Path(job["file"]).write_text(json.dumps(median(found[3:])))


def measure_all_reduce(config: Config, size: int, workers: int) -> float:
    """Seconds of an all-reduce of `size` bytes between `workers` Ray Train workers that do nothing else."""
    folder = Path(config.run) / "benchmark"
    shutil.rmtree(folder / "all-reduce", ignore_errors=True)
    cluster = config.cluster
    needs = {"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.use_gpu else {})}
    trainer = TorchTrainer(
        _reduce,
        train_loop_config={"bytes": size, "file": str(folder / "all-reduce.json")},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=cluster.use_gpu, resources_per_worker=needs),
        run_config=RunConfig(name="all-reduce", storage_path=str(folder)),
    )
    trainer.fit()
    return json.loads((folder / "all-reduce.json").read_text())


def measure_store(shape: tuple[int, ...]) -> float:
    """Bytes a second of a micro-batch's pixels through the object store: put, then copied out, as a task and a worker do."""
    pixels, seconds = np.zeros(shape, np.uint8), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        np.array(ray.get(ray.put(pixels)))
        seconds.append(time.perf_counter() - start)
    return pixels.size / median(seconds)


def measure_delivery(config: Config, stage: Stage, pixels: int) -> dict[str, float]:
    """What the stage's stream delivers to one worker that does nothing with it, after the first micro-batch.

    questions: of an image; decode_ms: CPU time of the data processes an image, everything that Ray does in them included.
    """
    windows = 3 * config.cluster.window * stage.train.images_per_micro_batch
    train = replace(stage.train, steps=max(1, windows // stage.train.images_per_step))
    spec = PackerSpec(f"{stage.folder}/tokenizer", IMAGE, 16, pixels, train.max_response, train.questions_per_row)
    with Watch() as watch:
        batches = stream(config, train.splits, train, spec, config.seed, rank=0, world=1, start=0)
        first = next(batches)
        rest, wall, _ = timed(lambda: [(len(b.ids), sum(map(len, b.questions)), b.pixels.nbytes) for b in batches])
    images, questions, size = (sum(column) for column in zip(*rest, strict=True))
    return {
        "images": images,
        "images_per_s": images / wall,
        "gb_s": size / wall / 1e9,
        "questions": questions / images,
        "decode_ms": 1000 * watch.worker_cpu / (images + len(first.ids)),
    }


def measure_scaling(config: Config) -> dict[str, Any]:
    """Rates of the stage with one worker and with two, and what they share. Raises ValueError where something is missing.

    micro_batch_s: a worker's time of a micro-batch (and of the pre-training corpus's beside it) without waiting for data, from
    the run with one worker. all_reduce_gb_s: what a worker sends a second in a ring, 2 (W - 1) / W of the gradient over its time.
    """
    loop = ready(config)
    # in turns, there and back, because the speed of a shared machine drifts: medians of the lines are told
    lines: dict[int, list[dict[str, float]]] = {workers: [] for workers in WORKERS}
    for workers in (*WORKERS, *WORKERS[::-1]):
        stage, found = train_with(config, loop, workers)
        lines[workers] += found
    most, images = WORKERS[-1], stage.train.images_per_step
    one = replace(config, cluster=replace(config.cluster, workers=1))
    two = replace(config, cluster=replace(config.cluster, workers=most))
    student = shapes(one, stage)[1]
    load, size = load_of(one, stage, student.patches), 4 * student.trained
    print(f"[benchmark] all-reduce of {size / 1e6:.1f} MB, object store, stream", flush=True)
    reduced = measure_all_reduce(config, size, most)
    rate = 2 * (most - 1) / most * size / reduced / 1e9
    sent = work(two, stage)["all-reduce"].sent
    delivered = measure_delivery(one, stage, student.pixels)
    rates, waits = (
        {workers: median(line[key] for line in lines[workers]) for workers in WORKERS}
        for key in ("images_per_second", "data_wait")
    )
    gpu = config.cluster.use_gpu
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "cores": os.cpu_count(),
        "images": load.images,
        "images_per_step": images,
        "trained": student.trained,
        "lines": {str(workers): [line["images_per_second"] for line in lines[workers]] for workers in WORKERS},
        "workers": {
            str(workers): {
                "images_per_s": rates[workers],
                "responses_per_s": rates[workers] * delivered["questions"],
                "step_s": images / rates[workers],
                "data_wait": waits[workers],
                "efficiency": rates[workers] / (workers * rates[1]),
            }
            for workers in WORKERS
        },
        "micro_batch_s": images / rates[1] * (1 - waits[1]) / load.micros,
        "all_reduce_bytes": size,
        "all_reduce_s": reduced,
        "all_reduce_gb_s": rate,
        "sent_per_step": sent,
        "sent_s": sent / rate / 1e9,
        "store_gb_s": measure_store(PIXELS) / 1e9,
        "store_own_gb_s": measure_store((load.images, student.pixels, student.pixels, 3)) / 1e9,
        "image_kilobytes": image_bytes(one) / 1000,
        "drawn_per_step": draws(one, stage) * load.images,
        "decode_ms": delivered.pop("decode_ms"),
        "delivered": delivered,
    }


def scaling_table(found: dict[str, Any]) -> str:
    """`measure_scaling` in words."""
    columns, rows = [("workers of one thread", workers) for workers in found["workers"]], []
    for key, name, shape in (
        ("images_per_s", "images/s", ".1f"),
        ("responses_per_s", "responses/s", ".1f"),
        ("step_s", "a step, s", ".3f"),
        ("data_wait", "share of it that waits for data", ".1%"),
        ("efficiency", "efficiency", ".2f"),
    ):
        rows.append([name, *(format(one[key], shape) for one in found["workers"].values())])
    spread = [f"{min(lines):.1f} to {max(lines):.1f}" for lines in found["lines"].values()]
    rows.insert(1, ["its range over the lines", *spread])
    delivered, one = found["delivered"], found["workers"]["1"]
    note = (
        f"{found['images_per_step']} images a step on {found['device']}, {found['cores']} cores, which Ray's processes and the "
        f"decoding of images share: so two workers stay below twice one. A step of two sends {found['sent_per_step'] / 1e6:.2f} "
        f"MB a worker, about {1000 * found['sent_s']:.1f} ms (all-reduce of {found['all_reduce_bytes'] / 1e6:.2f} MB alone: "
        f"{1000 * found['all_reduce_s']:.1f} ms, {found['all_reduce_gb_s']:.2f} GB/s). Object store: {found['store_gb_s']:.2f} "
        f"GB/s in arrays of a micro-batch at 504 pixels, {found['store_own_gb_s']:.2f} at the run's own size. A stream alone "
        f"delivers {delivered['images_per_s']:.0f} images/s ({1000 * delivered['gb_s']:.1f} MB/s of pixels, "
        f"{found['decode_ms']:.2f} CPU ms an image); one worker needs {found['drawn_per_step'] / one['step_s']:.0f}."
    )
    return Table("A second worker", columns, rows, note, "").text()
