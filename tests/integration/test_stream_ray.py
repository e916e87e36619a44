"""The stream through Ray Data: every conversation once an epoch, in the order of the seed, whatever the workers; resumable."""

from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import ray

from geodistill.config import Config, TrainConfig, load
from geodistill.data.prepare import prepare
from geodistill.data.shards import groups, read_group
from geodistill.data.stream import MicroBatch, PackerSpec, stream
from geodistill.language import IMAGE

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
SMALL = [
    "data.train=48", "data.val=4", "data.test=4", "data.images_per_shard=16", "data.images_per_group=4", "data.vocabulary=500",
    "cluster.window=3",
]  # fmt: skip
TRAIN = TrainConfig(steps=4, images_per_step=24, images_per_micro_batch=4)  # 6 micro-batches a step, 2 steps an epoch
EPOCH = 12  # micro-batches


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[Config, Counter]:
    """Prepared settings, and how often each (image, question) is in split train."""
    config = load(None, [f"run={tmp_path_factory.mktemp('stream')}", *SMALL])
    found = groups(prepare(config, parallel=False), "train")
    records = [record for group in found for record in read_group(config.data.shards, group)]
    return config, Counter((r.id, question) for r in records for c in r.conversations for question, _ in c.turns)


def read(config: Config, world: int = 1, seed: int = 0, start: int = 0, train: TrainConfig = TRAIN) -> list[MicroBatch]:
    """What all workers read, in the order in which they would train on it side by side."""
    spec = PackerSpec(f"{config.data.shards}/tokenizer", IMAGE, 16, 32, 200, 8)
    parts = [list(stream(config, ["train"], train, spec, seed, rank, world, start)) for rank in range(world)]
    return list(chain.from_iterable(zip(*parts, strict=True)))


def ids(batches: list[MicroBatch]) -> list[list[str]]:
    return [batch.ids for batch in batches]


@pytest.fixture(scope="module")
def unbroken(ray_cluster, shards) -> list[MicroBatch]:
    return read(shards[0])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_conversation_once_an_epoch_in_the_same_order_for_any_number_of_workers(unbroken, shards, world):
    config, conversations = shards
    found = unbroken if world == 1 else read(config, world)
    assert len(found) == 2 * EPOCH and ids(found) == ids(unbroken)
    for epoch in (found[:EPOCH], found[EPOCH:]):
        pairs = [(id, asked) for batch in epoch for id, asked in zip(batch.ids, batch.questions, strict=True)]
        assert Counter((id, question.text) for id, asked in pairs for question in asked) == conversations
    assert ids(found[:EPOCH]) != ids(found[EPOCH:])


def test_the_order_depends_on_the_seed_alone(unbroken, shards):
    assert ids(read(shards[0])) == ids(unbroken) != ids(read(shards[0], seed=1))


@pytest.mark.parametrize(("world", "start"), [(1, 1), (2, 1), (3, 3)])
def test_a_stream_begun_in_mid_epoch_yields_what_the_unbroken_one_yields_from_there_on(unbroken, shards, world, start):
    config, train = shards[0], replace(TRAIN, augment=True)
    found, whole = read(config, world, start=start, train=train), read(config, train=train)
    assert ids(found) == ids(unbroken)[6 * start :] and len(found) == 6 * (4 - start)
    for one, other in zip(found, whole[6 * start :], strict=True):
        assert one.questions == other.questions and np.array_equal(one.pixels, other.pixels)
        assert one.pixels.flags.writeable


def test_windows_do_not_pile_up_in_ray(unbroken, shards):
    """Ray keeps every figure of every data set by its id, in the agent of the node: a stream of many windows is one to it."""
    from ray.data._internal.stats import get_or_create_stats_actor

    known = set(ray.get(get_or_create_stats_actor().get_datasets.remote()))
    read(replace(shards[0], cluster=replace(shards[0].cluster, window=1)))
    assert len(set(ray.get(get_or_create_stats_actor().get_datasets.remote())) - known) == 1
