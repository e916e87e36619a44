"""What a step of the on-policy loop costs on W workers, beside one: compute, all-reduce, waiting for the slowest, and data.

A step is what follows one another, or the data that is prepared beside it where that takes longer:

    seconds = max(compute + slowest + all-reduce, data)        efficiency = images/s of W / (W x images/s of one worker)

Weak scaling: every worker keeps its micro-batches and the global batch grows. Strong scaling: the global batch stays. Compute is
train/plan.py's estimate, or what jobs/benchmark.py measured in the same run on the planned device (on a CPU: on this machine);
then its rates of all-reduce, object store and decoding hold too. Nothing overlaps but data, as in train/loop.py with DeepSpeed's
defaults at ZeRO 0 to 2. Left out: validation, checkpoints, failures, a network or storage that others share, and workers that are
slow for another reason than long responses in decoding.
Units: seconds, bytes; GB = 1e9 bytes. Shapes as in data/rows.py: R rows, n questions, T tokens of a response.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from geodistill.config import Config
from geodistill.data.shards import load_manifest
from geodistill.train.plan import BUCKET, CARDS, Load, load_of, shapes, work
from geodistill.train.stage import Stage

WORKERS = (6, 64, 512)
HOP = 1e-5  # seconds that a message takes from one worker to the next: what a ring costs however little it sends
MOST = 2**20  # workers up to which `starving` looks


class Rates(NamedTuple):
    """What is reckoned with beside train/plan.py. source: where compute comes from."""

    source: str
    parts: dict[str, float]  # seconds of a micro-batch on one worker, by part
    once: dict[str, float]  # seconds of a step on one worker that do not grow with its micro-batches
    link: float  # GB/s of a ring inside a node
    store: float  # GB/s of a node's object store
    decode: float  # CPU seconds an image
    image: float  # bytes of an encoded image


class Step(NamedTuple):
    """A step of `workers` workers. parts follow one another; data are limits of what is prepared meanwhile."""

    workers: int
    images: int  # of the global batch
    parts: dict[str, float]
    data: dict[str, float]

    @property
    def seconds(self) -> float:
        return max(sum(self.parts.values()), *self.data.values())

    @property
    def bound(self) -> str:
        """The largest of what follows one another, or the data, where the step waits for it."""
        starved = max(self.data.values()) > sum(self.parts.values())
        found = self.data if starved else self.parts
        return max(found, key=lambda part: found[part])

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds


def length_chances(mean: float, limit: int) -> np.ndarray:
    """Chances that a response has 1, 2, ..., `limit` tokens, when each token is the last with the same chance p, up to the limit.

    P(t) = p (1 - p)^(t - 1) for t < limit, and (1 - p)^(limit - 1) at the limit. The mean is sum over t < limit of (1 - p)^t,
    from which p follows by bisection. mean = limit: p = 0, all responses are at their limit.
    """
    low, high, t = 0.0, 1.0, np.arange(limit)
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if ((1 - p) ** t).sum() > mean else (low, p)
    left = (1 - low) ** t  # the chance that a response is longer than t
    return left - np.append(left[1:], 0.0)


def largest(chances: np.ndarray, many: int) -> np.ndarray:
    """Chances of the largest of `many` independent draws: its distribution function is theirs to the power `many`."""
    return np.diff(np.minimum(np.cumsum(chances), 1.0) ** many, prepend=0.0)


def decode_steps(mean: float, limit: int, responses: int, micros: int, workers: int) -> float:
    """Decode steps that a step waits for, expected: those of the slowest worker.

    A micro-batch is decoded until the longest of its `responses` ends, a worker decodes `micros` of them one after the other,
    and all workers wait for each other once, before they count the step's tokens:
    E[max over workers of sum over micro-batches of max over responses of T]. Lengths are independent, as `length_chances` says.
    """
    one = largest(length_chances(min(mean, limit), limit), responses)
    worker = one
    for _ in range(micros - 1):
        worker = np.convolve(worker, one)
    return float(largest(worker, workers) @ (np.arange(len(worker)) + micros))


def shared(config: Config, stage: Stage, workers: int, micros: int) -> tuple[Config, Stage]:
    """The same stage on `workers` workers with `micros` micro-batches each. Not validated: other stages play no part."""
    train = replace(stage.train, images_per_step=workers * micros * stage.train.images_per_micro_batch)
    return replace(config, cluster=replace(config.cluster, workers=workers)), replace(stage, train=train)


def own_steps(config: Config, stage: Stage, micros: int = 1, workers: int = 1) -> float:
    """`decode_steps` of a stage."""
    load = load_of(config, stage, 0)
    return decode_steps(load.tokens, max(load.tokens, stage.train.max_response), load.rows * load.questions, micros, workers)


def _measured(config: Config, name: str) -> dict[str, Any] | None:
    """What `jobs/benchmark.py NAME` wrote for this run on the planned device, or None."""
    file = Path(config.run) / f"benchmark/{name}.json"
    found = json.loads(file.read_text()) if file.is_file() else {"device": ""}
    planned = config.plan.gpu.split("-")[0] if config.cluster.use_gpu else "cpu"
    return found if planned in found["device"].replace(" ", "") else None


def rates(config: Config, stage: Stage) -> Rates:
    """Those of a stage: the settings' and train/plan.py's, and in their place what was measured with the same micro-batch."""
    plan, card = config.plan, CARDS[config.plan.gpu]
    one, alone = shared(config, stage, 1, 1)
    _, student = shapes(one, alone)
    load = load_of(one, alone, student.patches)
    steps = own_steps(one, alone) if stage.train.method == "distill" else 0.0
    cost = {part: value.seconds(one) for part, value in work(one, alone).items() if part != "all-reduce"}
    cost["decode"] *= steps / load.tokens
    source, once = f"estimated, {plan.gpu}", {}
    link, store, decode = plan.network or card.link * plan.bandwidth_share, plan.node_store, plan.decode_ms / 1000
    step, scaling = _measured(config, "step"), _measured(config, "scaling")
    if scaling and (scaling["trained"], scaling["images"]) == (student.trained, load.images):
        source = "measured: benchmark/scaling.json"
        cost = {part: value * scaling["micro_batch_s"] / sum(cost.values()) for part, value in cost.items()}
        link, store, decode = plan.network or scaling["all_reduce_gb_s"], scaling["store_gb_s"], scaling["decode_ms"] / 1000
    elif step and Load(**step["load"])._replace(micros=1) == load:
        source, found = "measured: benchmark/step.json", {k: v["measured"] for k, v in step["figures"].items()}
        cost = {k: found[k] / step["load"]["micros"] for k in ("tower and prefill", "decode", "update")}
        cost["decode"] *= steps / load.tokens
        once = {"optimizer's step": found["optimizer's step"]}
    return Rates(source, cost, once, link, store, decode, image_bytes(config))


def image_bytes(config: Config) -> float:
    """Bytes of an encoded image: those of the shards, where they are there, or plan.image_kilobytes."""
    try:
        splits = load_manifest(config.data.shards)["splits"].values()
    except (ValueError, OSError):
        return 1000 * config.plan.image_kilobytes
    return sum(shard["bytes"] for split in splits for shard in split["shards"]) / sum(split["images"] for split in splits)


def all_reduce(config: Config, stage: Stage, link: float) -> float:
    """Seconds of a step's collectives on the gradients: a ring over all workers goes at the pace of its slowest link.

    t = sent / min(link, network of a node) + 2 (W - 1) HOP x collectives, the network only where there are several nodes. `sent`
    is plan.work's, 2 (W - 1) / W of the gradients and ZeRO's gathering; the ring enters and leaves a node once, so its cards
    use the network together. A collective a bucket of `BUCKET` elements, at every pass from ZeRO 2 on.
    """
    plan, workers = config.plan, config.cluster.workers
    if workers > plan.workers_per_node:
        link = min(link, plan.node_network * plan.bandwidth_share)
    trained = shapes(config, stage)[1].trained
    passes = draws(config, stage) if config.cluster.zero_stage >= 2 else 1
    hops = 2 * (workers - 1) * passes * math.ceil(trained / BUCKET)
    return work(config, stage)["all-reduce"].sent / (1e9 * link) + HOP * hops


def draws(config: Config, stage: Stage) -> int:
    """Micro-batches that a worker draws in a step: those of the prompts, and as many of the pre-training corpus."""
    train = stage.train
    pretrain = train.method == "distill" and config.distill.loss.pretrain > 0
    return train.images_per_step // (train.images_per_micro_batch * config.cluster.workers) * (1 + pretrain)


def data_seconds(config: Config, stage: Stage, found: Rates) -> dict[str, float]:
    """Seconds that a step's images take to be prepared, by what limits it; D = draws x micro-batch is what a worker needs.

    decoding: g D c / cores on a node of g workers, c CPU seconds an image; its cores are those of the node without the workers'
    own, and cluster.data_tasks of each worker at most. object store: g D 3 S^2 bytes of pixels / its rate.
    shards: W D encoded images / what their storage gives to all nodes together: the only one of them that grows with W.
    """
    plan, cluster, (_, student) = config.plan, config.cluster, shapes(config, stage)
    here = min(cluster.workers, plan.workers_per_node)
    needs = draws(config, stage) * stage.train.images_per_micro_batch
    cores = min(max(1.0, plan.node_cores - here * cluster.cpus_per_worker), here * cluster.data_tasks)
    return {
        "decoding": here * needs * found.decode / cores,
        "object store": here * needs * 3 * student.pixels**2 / (1e9 * found.store),
        "shards": cluster.workers * needs * found.image / (1e9 * plan.storage),
    }


def scaled(config: Config, stage: Stage, found: Rates, workers: int, micros: int) -> Step:
    """A step of `workers` workers with `micros` micro-batches each."""
    config, stage = shared(config, stage, workers, micros)
    parts = {part: micros * seconds for part, seconds in found.parts.items() if seconds} | found.once
    if "decode" in parts:
        one = shared(config, stage, 1, 1)
        first = own_steps(*one)
        parts["waiting for the slowest"] = found.parts["decode"] / first * (own_steps(*one, micros, workers) - micros * first)
    parts["all-reduce"] = all_reduce(config, stage, found.link)
    return Step(workers, stage.train.images_per_step, parts, data_seconds(config, stage, found))


def starving(config: Config, stage: Stage, found: Rates, micros: int) -> int | None:
    """The first power of two of workers, each with `micros` micro-batches, that wait for data; None: not up to `MOST`."""
    for workers in (2**k for k in range(MOST.bit_length())):
        step = scaled(config, stage, found, workers, micros)
        if step.bound in step.data:
            return workers
    return None
