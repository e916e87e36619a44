"""Does the data plane feed hundreds of workers? `python jobs/benchmark.py consumers`: real shards, real Ray Data, no training.

Consumer r of C drives `data.stream.stream` as worker r of C, and where a worker would train it sleeps for the time of a step.
Consumers are threads of a few actors, because so many Ray Train workers would need a cluster; everything else is as in a run,
on one machine: C streams at once, their data tasks, and the processes that a cluster has once (Ray's head, Ray Data's actors).
One machine decodes for all of them, so a step is as long as the images of all consumers take at DEMAND images a second:

    seconds of a step = C x images of a consumer's step / DEMAND

Units: seconds, bytes, CPU milliseconds an image.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import ray

from geodistill.benchmarks.data import Watch, prepared_photos
from geodistill.config import Config, TrainConfig
from geodistill.data.shards import groups, load_manifest, read_group
from geodistill.data.stream import PackerSpec, plan, stream
from geodistill.evaluate.tables import Table
from geodistill.language import IMAGE

CONSUMERS = (8, 64, 512)
PHOTOS = 12416  # of which 1 % are for validation: 6 steps of 512 consumers
MICRO, STEP = 2, 4  # images of a micro-batch (and of a row group), and of a consumer's step
SIZE = 168  # pixels that the model would see: photographs of 512 are decoded all the same, and windows of all consumers fit
WINDOW = 24  # micro-batches
DEMAND = 40.0  # images a second of all consumers; two cores decode three times as many, but also start a thousand executions
PROCESSES = 8  # actors that the consumers' threads are spread over


@dataclass
class Consumed:
    """What one consumer got. Seconds; begun: to the first micro-batch; waited: before each other one; took: all of those."""

    rank: int
    begun: float
    waited: list[float]
    took: float
    ids: list[list[str]]


def consume(config: Config, train: TrainConfig, spec: PackerSpec, rank: int, world: int, seconds: float) -> Consumed:
    """Iterate the stream of worker `rank` of `world`; sleep `seconds` after the images of each step."""
    micros = train.images_per_step // (train.images_per_micro_batch * world)
    found, start = Consumed(rank, 0.0, [], 0.0, []), time.perf_counter()
    batches = stream(config, train.splits, train, spec, config.seed, rank, world, start=0)
    for number in range(train.steps * micros):
        asked = time.perf_counter()
        found.ids.append(next(batches).ids)
        if number:
            found.waited.append(time.perf_counter() - asked)
        else:
            began = time.perf_counter()
            found.begun = began - start
        if number % micros == micros - 1:
            time.sleep(seconds)
    found.took = time.perf_counter() - began
    return found


class Host:
    """A process with a thread for each of its consumers."""

    def run(
        self, config: Config, train: TrainConfig, spec: PackerSpec, ranks: list[int], world: int, seconds: float
    ) -> list[Consumed]:
        with ThreadPoolExecutor(len(ranks)) as threads:
            return list(threads.map(lambda rank: consume(config, train, spec, rank, world, seconds), ranks))


class Cpu:
    """CPU seconds of the local Ray's processes by what they do, inside a `with`; sampled, because some end before it does."""

    KINDS = (
        ("ray::Map", "data tasks"),
        ("ray::Host", "streams in the consumers' processes"),
        ("ray::_Stats", "Ray Data's statistics"),
        ("ray::Autoscaling", "Ray Data's coordinator"),
        ("gcs_server", "Ray's head"),
        ("raylet", "Ray on the node"),
    )

    def __init__(self) -> None:
        self.session = ray.get_runtime_context().get_session_name()
        self.found: dict[int, tuple[str, float, float]] = {}  # pid -> what it does, CPU seconds at first, and at last
        self.end = threading.Event()

    def _sample(self) -> None:
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError, IndexError):
                line = process.cmdline()
                if not (line[0].startswith("ray::") or any(self.session in part for part in line)):
                    continue
                kind = next((kind for part, kind in self.KINDS if part in line[0]), "the rest of Ray")
                used = sum(process.cpu_times()[:2])
                was, first, _ = self.found.get(process.pid, (kind, used if self.first else 0.0, used))
                self.found[process.pid] = (kind if was == "the rest of Ray" else was, first, used)

    def _run(self) -> None:
        while not self.end.wait(1.0):
            self._sample()

    def __enter__(self) -> "Cpu":
        self.first = True
        self._sample()
        self.first = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end.set()
        self.thread.join()
        self._sample()

    def seconds(self) -> dict[str, float]:
        """What it does -> CPU seconds."""
        total: dict[str, float] = {}
        for kind, first, last in self.found.values():
            total[kind] = total.get(kind, 0.0) + last - first
        return total


def seen_once(config: Config, train: TrainConfig, found: list[Consumed]) -> bool:
    """Did all consumers together see every image of the first epoch exactly once?"""
    manifest = load_manifest(config.data.shards, train.splits)
    every = [group for split in train.splits for group in groups(manifest, split)]
    per_group, world = manifest["settings"]["images_per_group"], len(found)
    seen: Counter[str] = Counter()
    for one in found:
        for places, ids in zip(plan(train, per_group, one.rank, world, 0), one.ids, strict=True):
            if places[-1] < len(every):
                seen.update(ids)
    return seen == Counter(record.id for group in every for record in read_group(config.data.shards, group, ["id"]))


def run_consumers(config: Config, world: int, demand: float) -> dict[str, Any]:
    """One epoch of split train read by `world` consumers, which ask for `demand` images a second together."""
    images = load_manifest(config.data.shards, ["train"])["splits"]["train"]["images"]
    batch = world * STEP
    train = TrainConfig(steps=-(-images // batch), images_per_step=batch, images_per_micro_batch=MICRO)
    spec = PackerSpec(f"{config.data.shards}/tokenizer", IMAGE, 16, SIZE, train.max_response, train.questions_per_row)
    seconds = batch / demand
    config = replace(config, cluster=replace(config.cluster, window=WINDOW, data_tasks=1))
    print(
        f"[benchmark] {world} consumers, {train.steps} steps of {seconds:.2f} s, {demand:.0f} images/s asked for: "
        f"{train.steps * seconds:.0f} s if none waits",
        flush=True,
    )
    actor: Any = ray.remote(num_cpus=0)(Host)
    hosts = [actor.remote() for _ in range(min(PROCESSES, world))]
    ray.get([host.__ray_ready__.remote() for host in hosts])
    start = time.perf_counter()
    with Watch() as watch, Cpu() as cpu:
        runs = [
            host.run.remote(config, train, spec, [*range(i, world, len(hosts))], world, seconds) for i, host in enumerate(hosts)
        ]
        found: list[Consumed] = [one for ended in _with_progress(runs, start) for one in ended]
    wall = time.perf_counter() - start
    for host in hosts:
        ray.kill(host)
    waits = np.array([one.waited for one in found])  # [consumers, micro-batches but the first]
    shares = waits.sum(1) / np.array([one.took for one in found])
    total = sum(len(ids) for one in found for ids in one.ids)
    micros = STEP // MICRO
    by_step = waits[:, micros - 1 :].reshape(world, -1, micros).sum(2).max(0)  # the worst wait of each step but the first
    windows = sum(len(one.ids) - 4 for one in found) / WINDOW + world
    return {
        "consumers": world,
        "step_s": seconds,
        "asked_per_s": demand,
        "images": total,
        "wall_s": wall,
        "delivered_per_s": sum((len(one.waited) * MICRO) / one.took for one in found),
        "wait_mean": float(shares.mean()),
        "wait_worst": float(shares.max()),
        "wait_in_step": float(by_step.sum() / (by_step.sum() + seconds * len(by_step))),
        "first_s": [float(np.median([one.begun for one in found])), max(one.begun for one in found)],
        "once": seen_once(config, train, sorted(found, key=lambda one: one.rank)),
        "peak_mb": watch.peak / 1e6,
        "store_mb": watch.store / 1e6,
        "executions": windows,
        "cpu_s": cpu.seconds(),
        "cpu_ms": {kind: 1000 * used / total for kind, used in cpu.seconds().items()},
    }


def _with_progress(runs: list, start: float) -> Iterator[list[Consumed]]:
    """The results of `runs` as they come, with a line now and then."""
    left = list(runs)
    while left:
        done, left = ray.wait(left, timeout=30.0)
        for one in done:
            yield ray.get(one)
        if not done:
            used = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0)
            print(
                f"[benchmark] {time.perf_counter() - start:.0f} s, {len(left)} processes at work, {2 * used:.0f} data tasks",
                flush=True,
            )


def measure_consumers(config: Config, only: str = "") -> dict[str, Any]:
    """`run_consumers` for each of CONSUMERS, or `only` for so many, on the same shards, which are made in run/benchmark."""
    data = replace(config.data, images_per_group=MICRO)
    photos = prepared_photos(replace(config, data=data), PHOTOS)
    return {str(world): run_consumers(photos, world, DEMAND) for world in ([int(only)] if only else CONSUMERS)}


def consumers_table(found: dict[str, Any]) -> str:
    """`measure_consumers` in words."""
    rows: list[list[str]] = []

    def add(name: str, cells: list[str]) -> None:
        rows.append([name, *cells])

    every = list(found.values())
    add("seconds of a step", [f"{one['step_s']:.2f}" for one in every])
    add("images/s asked for", [f"{one['asked_per_s']:.0f}" for one in every])
    add("images/s delivered, while not starting", [f"{one['delivered_per_s']:.1f}" for one in every])
    add("share of waiting: mean of consumers", [f"{one['wait_mean']:.1%}" for one in every])
    add("the worst consumer", [f"{one['wait_worst']:.1%}" for one in every])
    add("of a step, if all wait for its slowest", [f"{one['wait_in_step']:.1%}" for one in every])
    add("first micro-batch, s: median; last", ["; ".join(f"{s:.1f}" for s in one["first_s"]) for one in every])
    add("every image once", ["yes" if one["once"] else "NO" for one in every])
    add("memory, MB", [f"{one['peak_mb']:.0f}" for one in every])
    add("of it object store, MB", [f"{one['store_mb']:.0f}" for one in every])
    add("executions of Ray Data", [f"{one['executions']:.0f}" for one in every])
    for kind in dict.fromkeys(kind for one in every for kind in one["cpu_ms"]):
        add(f"CPU ms an image: {kind}", [f"{one['cpu_ms'].get(kind, 0.0):.2f}" for one in every])
    note = (
        f"Consumers that sleep in place of training, {STEP} images a step in micro-batches of {MICRO}, {SIZE} pixels, one "
        f"epoch of {PHOTOS} JPEGs of 512 pixels, windows of {WINDOW} micro-batches, one machine. Waiting is counted after a "
        "consumer's first micro-batch."
    )
    return Table("The data plane", [("consumers", name) for name in found], rows, note, "").text()
