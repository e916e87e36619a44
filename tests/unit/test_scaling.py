"""What more workers are said to cost, against numbers worked out by hand; and what the measurements make of their lines."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from geodistill.config import Config, ConfigError, changed, load
from geodistill.data.shards import Group
from geodistill.train import scaling
from geodistill.train.plan import load_of, shapes, work
from geodistill.train.stage import Stage, stages

GEOCHAT = str(Path(__file__).parents[2] / "configs/geochat-13b-to-7b.yaml")


def geochat(*overrides: str) -> tuple[Config, Stage]:
    config = load(GEOCHAT, ["run=/nowhere", *overrides])
    return config, stages(config, "distill")[-1]


def test_lengths_are_geometric_up_to_the_limit():
    assert scaling.length_chances(1.5, 2) == pytest.approx([0.5, 0.5])
    # p = 1/2: 1, 2, 3 tokens by 1/2, 1/4, 1/4, and 1.75 on average
    assert scaling.length_chances(1.75, 3) == pytest.approx([0.5, 0.25, 0.25])
    assert scaling.length_chances(4, 4) == pytest.approx([0, 0, 0, 1], abs=1e-12)
    found = scaling.length_chances(64, 256)
    assert found.sum() == pytest.approx(1) and found @ np.arange(1, 257) == pytest.approx(64)


def test_a_step_waits_for_the_longest_response_of_the_slowest_worker():
    # one or two tokens, by a half each
    assert scaling.decode_steps(1.5, 2, responses=1, micros=1, workers=1) == pytest.approx(1.5)
    assert scaling.decode_steps(1.5, 2, responses=2, micros=1, workers=1) == pytest.approx(1.75)  # 1/4 and 3/4
    assert scaling.decode_steps(1.5, 2, responses=2, micros=2, workers=1) == pytest.approx(3.5)
    # two micro-batches: 2, 3, 4 by 1/4, 1/2, 1/4; the larger of two such: 1/16, 8/16, 7/16
    assert scaling.decode_steps(1.5, 2, responses=1, micros=2, workers=2) == pytest.approx((2 + 24 + 28) / 16)
    assert scaling.decode_steps(256, 256, responses=24, micros=3, workers=512) == pytest.approx(768)  # all at their limit
    rng, p = np.random.default_rng(0), 1 / 20
    drawn = np.minimum(rng.geometric(p, (2000, 6, 3, 8)), 64).max(3).sum(2).max(1)
    mean = (1 - (1 - p) ** 64) / p
    assert scaling.decode_steps(mean, 64, responses=8, micros=3, workers=6) == pytest.approx(drawn.mean(), rel=0.01)


def test_an_all_reduce_goes_at_the_pace_of_its_slowest_link():
    config, stage = geochat()
    trained = shapes(config, stage)[1].trained
    for workers, rate in ((8, 300 * 0.7), (16, 25 * 0.7)):
        many = scaling.shared(config, stage, workers, 3)
        ring = (workers - 1) / workers * 2 * trained * (2 * 6 + 1)  # 6 passes at ZeRO 2 and the weights, in bf16
        assert work(*many)["all-reduce"].sent == pytest.approx(ring)
        hops = 2 * (workers - 1) * 6 * 1e-5
        assert scaling.all_reduce(*many, 300 * 0.7) == pytest.approx(ring / (1e9 * rate) + hops)
    assert scaling.all_reduce(*scaling.shared(config, stage, 1, 3), 210.0) == 0


def test_what_a_node_must_prepare():
    config, stage = geochat("plan.node_store=2", "plan.storage=5", "plan.decode_ms=10", "plan.image_kilobytes=200")
    found = scaling.rates(config, stage)
    assert (found.decode, found.store, found.image) == (0.010, 2.0, 200_000)
    # 8 workers a node, 3 micro-batches of 8 images and as many of the corpus; 8 x 2 data tasks
    data = scaling.data_seconds(*scaling.shared(config, stage, 512, 3), found)
    assert data["decoding"] == pytest.approx(8 * 48 * 0.010 / 16)
    assert data["object store"] == pytest.approx(8 * 48 * 3 * 504**2 / 2e9)
    assert data["shards"] == pytest.approx(512 * 48 * 200e3 / 5e9)
    few = changed(config, ["plan.node_cores=20"])  # of which the workers take 16
    assert scaling.data_seconds(*scaling.shared(few, stage, 512, 3), found)["decoding"] == pytest.approx(8 * 48 * 0.010 / 4)


def test_weak_and_strong_scaling_and_what_bounds_them():
    config, stage = geochat()
    found = scaling.rates(config, stage)
    assert found.source == "estimated, A100-80" and found.link == pytest.approx(210)
    six, cost = scaling.scaled(config, stage, found, 6, 3), work(config, stage)
    for part in ("tower", "prefill", "decode", "update"):
        assert six.parts[part] == pytest.approx(cost[part].seconds(config))
    assert six.parts["waiting for the slowest"] == pytest.approx(0, abs=1e-6) and six.images == 144 and six.bound == "update"
    assert six.seconds == pytest.approx(sum(cost[part].seconds(config) for part in cost), rel=1e-4)
    one, many = (scaling.scaled(config, stage, found, workers, 3) for workers in (1, 512))
    assert many.images == 512 * 24 and 0.99 < many.rate / (512 * one.rate) < 1
    strong = scaling.scaled(config, stage, found, 18, 1)
    assert strong.images == 144 and 1 < strong.rate / six.rate < 3
    short, varied = geochat("plan.response_tokens=32")
    slow = scaling.scaled(short, varied, scaling.rates(short, varied), 512, 3).parts
    assert 0 < slow["waiting for the slowest"] < slow["decode"] and slow["decode"] < six.parts["decode"]


def test_data_starves_where_the_storage_gives_less_than_all_workers_need():
    config, stage = geochat()
    found = scaling.rates(config, stage)
    step = scaling.scaled(config, stage, found, 8, 3).seconds
    most = step * 10e9 / (48 * 100e3)  # workers that 10 GB/s feed: 157,000
    assert scaling.starving(config, stage, found, 3) == 2 ** int(np.ceil(np.log2(most)))
    hungry = scaling.scaled(config, stage, found, 2**18, 3)
    assert hungry.bound == "shards" and hungry.seconds == hungry.data["shards"]
    assert scaling.starving(config, stage, found._replace(decode=100.0), 3) == 1
    assert scaling.starving(config, stage, found._replace(image=1.0), 3) is None


def small(run: Path) -> tuple[Config, Stage]:
    config = load(None, [f"run={run}", "data.images_per_group=2", "distill.train.images_per_micro_batch=2"])
    (run / "benchmark").mkdir(parents=True)
    return config, stages(config, "distill")[-1]


def test_measured_compute_and_rates_take_the_place_of_the_estimate(tmp_path: Path):
    config, stage = small(tmp_path / "run")
    found = {
        "device": "cpu", "trained": shapes(config, stage)[1].trained, "images": 2,
        "micro_batch_s": 0.25, "all_reduce_gb_s": 0.5, "store_gb_s": 1.5, "decode_ms": 3.0,
    }  # fmt: skip
    file = tmp_path / "run/benchmark/scaling.json"
    file.write_text(json.dumps(found))
    rates = scaling.rates(config, stage)
    assert sum(rates.parts.values()) == pytest.approx(0.25) and "scaling.json" in rates.source
    assert (rates.link, rates.store, rates.decode) == (0.5, 1.5, 0.003)
    assert sum(scaling.scaled(config, stage, rates, 1, 8).parts.values()) == pytest.approx(2.0, rel=1e-6)
    for other in ({"images": 4}, {"trained": 7}, {"device": "NVIDIA A100-SXM4-80GB"}):  # of another run, or another device
        file.write_text(json.dumps(found | other))
        assert scaling.rates(config, stage).source.startswith("estimated")


def test_a_measured_step_gives_the_compute_of_a_micro_batch(tmp_path: Path):
    config, stage = small(tmp_path / "run")
    config = changed(config, ["plan.response_tokens=64"])  # all at their limit, as in that measurement
    one = replace(stage, train=replace(stage.train, images_per_step=2))
    figures = {"tower and prefill": 1.0, "decode": 2.0, "update": 3.0, "optimizer's step": 0.5}
    load = load_of(config, one, shapes(config, one)[1].patches)._replace(micros=2)
    found = {"device": "cpu", "load": load._asdict(), "figures": {k: {"measured": v} for k, v in figures.items()}}
    (tmp_path / "run/benchmark/step.json").write_text(json.dumps(found))
    parts = scaling.scaled(config, stage, scaling.rates(config, stage), 1, 4).parts
    expected = {"tower and prefill": 2.0, "decode": 4.0, "update": 6.0, "optimizer's step": 0.5}
    assert {k: parts[k] for k in expected} == pytest.approx(expected)


@pytest.mark.parametrize("key", ["workers_per_node", "node_network", "node_cores", "node_store", "storage", "decode_ms"])
def test_a_rate_of_nothing_is_refused(key: str):
    with pytest.raises(ConfigError, match=f"plan.{key}=0"):
        load(None, [f"plan.{key}=0"])


def test_the_job_tells_it(monkeypatch, capsys):
    import runpy

    monkeypatch.setattr("sys.argv", ["plan.py", "--config", GEOCHAT, "run=/nowhere"])
    runpy.run_path(str(Path(__file__).parents[2] / "jobs/plan.py"), run_name="__main__")
    text = capsys.readouterr().out
    table = text[text.index("Scaling: distill") :].split("\n\n")[0]
    assert "144 images a step" in table and "bound by" in table and "from 262,144 workers on" in " ".join(table.split())
    workers = next(line for line in table.splitlines() if line.startswith("workers "))
    assert workers.split()[1:] == ["1", "6", "64", "512", "6", "18"]


def test_every_image_once_is_seen_and_told(monkeypatch):
    """Four groups of two images, two consumers with one group in each of three steps: the last is of the second epoch."""
    from geodistill.benchmarks import consumers as data
    from geodistill.config import TrainConfig

    every = [Group("a", i, 2) for i in range(4)]
    ids = {i: [f"{i}a", f"{i}b"] for i in range(4)}
    monkeypatch.setattr(data, "load_manifest", lambda *_: {"settings": {"images_per_group": 2}})
    monkeypatch.setattr(data, "groups", lambda *_: every)
    monkeypatch.setattr(data, "read_group", lambda _, group, __: [type("Record", (), {"id": i}) for i in ids[group.index]])
    train = TrainConfig(steps=3, images_per_step=4, images_per_micro_batch=2)

    def read(rank: int, *groups: int) -> data.Consumed:
        return data.Consumed(rank, 0.0, [], 0.0, [ids[group] for group in groups])

    config = load(None, [])
    assert data.seen_once(config, train, [read(0, 2, 1, 0), read(1, 0, 3, 2)])
    assert not data.seen_once(config, train, [read(0, 2, 1, 0), read(1, 0, 1, 3)])  # twice, in the first epoch


def test_what_is_measured_is_what_the_model_reads(tmp_path: Path, monkeypatch):
    """Two lines of each run behind the first: 16 images a step at 8 and 12 images/s with one worker and with two."""
    from geodistill.benchmarks import scaling as bench

    config, stage = small(tmp_path / "run")
    lines = {1: [{"images_per_second": 8.0, "data_wait": 0.25}], 2: [{"images_per_second": 12.0, "data_wait": 0.5}]}
    delivered = {"images": 48, "images_per_s": 100.0, "gb_s": 0.2, "questions": 3.0, "decode_ms": 4.0}
    monkeypatch.setattr(bench, "ready", lambda _: stage)
    monkeypatch.setattr(bench, "train_with", lambda _, __, workers: (stage, lines[workers]))
    monkeypatch.setattr(bench, "measure_all_reduce", lambda _, size, __: size / 1e9)  # ring: 2 (W - 1) / W = 1
    monkeypatch.setattr(bench, "measure_store", lambda _: 2e9)
    monkeypatch.setattr(bench, "measure_delivery", lambda *_: dict(delivered))
    found = bench.measure_scaling(config)
    assert found["workers"]["2"]["efficiency"] == pytest.approx(12 / 16)
    assert found["workers"]["2"]["responses_per_s"] == pytest.approx(36) and found["workers"]["1"]["step_s"] == 2
    assert found["micro_batch_s"] == pytest.approx(2 * 0.75 / 8) and found["all_reduce_gb_s"] == pytest.approx(1)
    text = bench.scaling_table(found)
    assert "0.75" in text and "75.0%" not in text and "one worker needs 16" in " ".join(text.split())
    (tmp_path / "run/benchmark/scaling.json").write_text(json.dumps(found))
    rates = scaling.rates(config, stage)
    assert sum(rates.parts.values()) == pytest.approx(found["micro_batch_s"]) and (rates.store, rates.decode) == (2.0, 0.004)


def test_a_consumer_waits_for_its_micro_batches_and_sleeps_after_each_step(monkeypatch):
    import time

    from geodistill.benchmarks import consumers as data
    from geodistill.config import TrainConfig
    from geodistill.data.stream import PackerSpec

    def slow(*_, start):
        for number in range(4):
            time.sleep(0.05 if number == 2 else 0.0)
            yield type("Batch", (), {"ids": [str(number)]})

    monkeypatch.setattr(data, "stream", slow)
    train = TrainConfig(steps=2, images_per_step=8, images_per_micro_batch=2)
    found = data.consume(load(None, []), train, PackerSpec("", "", 1, 8, 8, 8), rank=1, world=2, seconds=0.1)
    assert found.ids == [["0"], ["1"], ["2"], ["3"]] and len(found.waited) == 3
    assert found.waited[1] >= 0.05 > max(found.waited[0], found.waited[2]) and found.took >= 0.25
