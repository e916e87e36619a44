"""Faults on a real local Ray: every run ends with the weights and figures of an unbroken one; other numbers of workers go on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.util.state import list_actors
from tiny import history, same, settings

from geodistill import cluster
from geodistill.benchmarks import faults
from geodistill.cli import JobStopped
from geodistill.train.stage import Stage, stages
from geodistill.train.trainer import fit

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
QUICK = ("worker killed in a checkpoint",)  # the others: make test-all
INSIDE = ("worker killed in a rollout", "worker killed in an update", "NaN gradient on one worker", "data task killed",
          "disk full in a checkpoint", "shards vanish")  # fmt: skip
OUTSIDE = ("driver killed", "SIGTERM", "Ctrl-C", "object store fails at times")


def of(first, *overrides: str):
    run = Path(first.run)
    return settings(
        run, f"data.shards={run.parent}/data", "distill.train.images_per_step=16", "cluster.max_failures=2", *overrides
    )


@pytest.fixture(scope="module")
def loop(first) -> Stage:
    return stages(first, "distill")[-1]


def measured(config, loop, names: tuple[str, ...], monkeypatch) -> dict:
    monkeypatch.setattr(faults, "ready", lambda config: loop)
    return faults.measure_faults(config, names)["faults"]


def check(found: dict) -> None:
    for name, one in found.items():
        assert one["difference"] == 0.0 and one["same"], name
        assert one["lost"] <= faults.INTERVAL, name
    assert all(name in faults.faults_table({"faults": found, "steps": 24, "interval": 4, "unbroken": 1.0}) for name in found)


@pytest.mark.long
def test_a_worker_that_is_killed_costs_an_interval_at_most(first, loop, monkeypatch):
    found = measured(of(first), loop, QUICK, monkeypatch)
    check(found)
    assert found[QUICK[0]]["lost"] > 0


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_faults_inside(first, loop, monkeypatch):
    found = measured(of(first), loop, INSIDE, monkeypatch)
    check(found)
    assert "No space left" in found["disk full in a checkpoint"]["said"]
    assert ".parquet cannot be read" in found["shards vanish"]["said"]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_faults_outside(first, loop, monkeypatch):
    found = measured(of(first), loop, OUTSIDE, monkeypatch)
    check(found)
    assert "exit code 3 after" in found["SIGTERM"]["said"] and "exit code 130 after" in found["Ctrl-C"]["said"]
    assert float(found["SIGTERM"]["said"].split()[-2]) < faults.NOTICE


def test_a_lost_folder_is_made_again_from_checkpoints_elsewhere(first, loop, capsys):
    """As on machines that go away with their disks. And no stage leaves a process behind."""
    train = replace(loop.train, steps=2, checkpoint_every=1, validate_every=1, log_every=1)
    stage = replace(loop, name="lost", folder=f"{first.run}/lost", train=train)
    config = of(first, f"checkpoints={first.run}/elsewhere")
    fit(config, stage)
    model = (Path(stage.folder) / "model/model.safetensors").read_bytes()
    shutil.rmtree(stage.folder)
    fit(config, stage)
    assert (Path(stage.folder) / "model/model.safetensors").read_bytes() == model
    assert "its model was gone: it is made again" in capsys.readouterr().out
    assert not list_actors(filters=[("class_name", "=", "Notice"), ("state", "=", "ALIVE")])


def until(step: int):
    """The loop, told to stop before `step`."""

    def work(job: dict) -> dict:
        from geodistill.train import loop

        class Told(loop.Run):
            def need_on(self) -> None:
                if self.at >= step:
                    raise loop.Stopped

        def one_step(run, batches, corpus, report, at) -> None:
            run.at = at
            before(run, batches, corpus, report, at)

        before, loop.one_step, loop.Run = loop.one_step, one_step, Told
        return loop.worker(job)

    return work


@pytest.mark.long
def test_a_run_of_two_workers_goes_on_with_one_and_with_two_again(first, loop):
    """The same global batch and images at every step, through interruptions between two lines of metrics and two checkpoints."""
    train = replace(loop.train, steps=6, images_per_step=16, log_every=2, checkpoint_every=4, validate_every=6)
    one, many = (replace(loop, name=name, folder=f"{first.run}/{name}", train=train) for name in ("elastic1", "elastic212"))
    fit(of(first), one)
    for workers, upto in ((2, 1), (1, 3), (2, None)):
        config = of(first, f"cluster.workers={workers}", "cluster.zero_stage=2")
        if upto is None:
            fit(config, many)
        else:
            with pytest.raises(JobStopped, match=f"stopped at step {upto} of 6; run the same command"):
                fit(config, many, until(upto))
    more = ("loss", "grad_norm", "validation_loss", "length", "reverse_kl", "align", "pretrain", "images", "set_aside")
    same(Path(one.folder), Path(many.folder), more)
    images = [[row["images"] for row in history(Path(stage.folder)) if "images" in row] for stage in (one, many)]
    assert images[0] == images[1] and len(set(images[0])) > 1


@pytest.mark.long
def test_a_lost_worker_is_made_up_for_by_fewer(first, loop):
    """cluster.min_workers: after a failure the run goes on with what there is."""
    train = replace(loop.train, steps=3, images_per_step=16)
    stage = replace(loop, name="fewer", folder=f"{first.run}/fewer", train=train)
    need = ray.cluster_resources()["CPU"] / 2 - 0.25  # two fit

    def work(job: dict) -> dict:
        from geodistill.train import loop

        if job["config"].cluster.workers == 2:
            raise RuntimeError("a node is lost")
        return loop.worker(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "answering", lambda: [{"CPU": need + 0.5}])
        fit(of(first, "cluster.workers=2", "cluster.min_workers=1", f"cluster.cpus_per_worker={need}"), stage, work)
    assert json.loads((Path(stage.folder) / "done.json").read_text())["settings"]
    assert [row["step"] for row in history(Path(stage.folder)) if "loss" in row] == [1, 2, 3]
