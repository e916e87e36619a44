"""Before a worker starts: pairs and data that cannot work are refused; stages, skip and learning rate."""

import json
import signal
import threading
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from ray.train import TrainingFailedError

from geodistill import cluster
from geodistill.cli import JobStopped
from geodistill.config import ClusterConfig, TrainConfig, load
from geodistill.data.prepare import prepare
from geodistill.models import assemble
from geodistill.train import trainer
from geodistill.train.checkpoint import CheckpointFailed
from geodistill.train.loop import NotFinite, learning_rate
from geodistill.train.notice import _sigterm
from geodistill.train.stage import stages
from geodistill.train.trainer import (
    TrainingFailed,
    check_stage,
    is_finished,
    reason_of,
    retries,
    settings_of,
    workers_of,
    workers_that_fit,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A prepared run folder with a tiny teacher of 16 image tokens over the run's tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    config = settings(folder)
    prepare(config, parallel=False)
    save_model(config, folder / "data" / "tokenizer", folder / "teacher" / "model")
    return folder


def settings(run, *overrides):
    sizes = [f"{r}.model.vision.{k}" for r in ("teacher", "student") for k in ("patch=16", "hidden=16", "heads=2", "layers=2")]
    small = ["data.train=16", "data.val=8", "data.test=8", "student.model.hidden=16", "student.model.heads=2"]
    return load(None, [f"run={run}", *small, *sizes, *overrides])


def save_model(config, tokenizer, folder):
    tokenizer = assemble.load_tokenizer(tokenizer)
    vision = config.student.model.vision
    model = assemble.new_model(config.student.model, tokenizer)
    assemble.save(model, assemble.new_processor(tokenizer, vision.image_size, vision.patch), folder)


def test_a_pair_that_fits(run):
    for stage in stages(settings(run), "distill")[:1]:
        check_stage(settings(run), stage)


def test_other_image_tokens_are_refused(run):
    config = settings(run, "student.model.vision.patch=8")
    with pytest.raises(ValueError, match=r"teacher: 16 image tokens, .*student: 64 image tokens, .*student\.model\.vision"):
        check_stage(config, stages(config, "distill")[0])


def test_other_vocabulary_is_refused(run, tmp_path):
    other = assemble.new_tokenizer(["quite another text"], 300, "system")
    other.save_pretrained(tmp_path / "tokenizer")
    save_model(settings(run), tmp_path / "tokenizer", tmp_path / "student")
    config = settings(run, f"student.model.init={tmp_path}/student")
    with pytest.raises(ValueError, match="different vocabularies"):
        check_stage(config, stages(config, "distill")[0])


def test_missing_teacher_data_or_split_are_named(run, tmp_path):
    config = settings(run, f"distill.teacher={tmp_path}/nowhere")
    with pytest.raises(ValueError, match=r"nowhere holds no"):
        check_stage(config, stages(config, "distill")[0])
    config = settings(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"manifest\.json does not exist.*prepare"):
        check_stage(config, stages(config, "finetune")[0])
    config = settings(run, "distill.train.splits=[train,unlabelled]", "distill.warm_start.steps=0")
    with pytest.raises(ValueError, match=r"no image in split 'unlabelled'"):
        check_stage(config, stages(config, "distill")[0])


def test_stages_of_the_jobs(run):
    assert [s.name for s in stages(settings(run), "distill")] == ["distill/warm", "distill"]
    assert [s.name for s in stages(settings(run, "distill.warm_start.steps=0"), "distill")] == ["distill"]
    assert stages(settings(run, "role=teacher"), "finetune")[0].folder == f"{run}/teacher"
    assert stages(settings(run, "role=blind"), "finetune")[0].train.blind
    assert not stages(settings(run), "finetune")[0].train.blind


def test_a_finished_stage_remembers_its_settings(run, tmp_path, capsys):
    config = settings(run)
    (stage,) = stages(config, "finetune")
    assert not is_finished(str(tmp_path), settings_of(config, stage))
    (tmp_path / "done.json").write_text(json.dumps({"settings": settings_of(config, stage)}))
    assert not is_finished(str(tmp_path), settings_of(config, stage))  # its model is gone
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert is_finished(str(tmp_path), settings_of(config, stage))
    config = settings(run, "seed=3")
    with pytest.raises(ValueError, match=r"seed: 0 -> 3"):
        is_finished(str(tmp_path), settings_of(config, stage))
    (tmp_path / "done.json").rename(tmp_path / "settings.json")
    (tmp_path / "settings.json").write_text(json.dumps(settings_of(settings(run), stage)))
    (tmp_path / "ray").mkdir()
    (slower,) = stages(settings(run, "student.train.learning_rate=0.5"), "finetune")
    assert not is_finished(str(tmp_path), settings_of(settings(run), slower))
    assert "goes on with another learning_rate" in capsys.readouterr().out  # a remedy, but not in silence


def test_learning_rate_rises_and_falls(run):
    train = settings(run, "student.train.steps=100", "student.train.warmup=0.1", "student.train.learning_rate=1").student.train
    rates = [learning_rate(train, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1
    assert all(a >= b for a, b in pairwise(rates[10:])) and rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("cpus", "least", "found"),
    [(8, 0, 4), (4.5, 0, 4), (4.4, 0, 0), (4.4, 1, 2), (1.5, 1, 1), (1.4, 1, 0), (2.5, 2, 2), (2.4, 2, 0)],
)
def test_workers_that_fit(cpus, least, found):
    """Sixteen images in micro-batches of four: four, two or one workers can share a step, three cannot."""
    cluster = ClusterConfig(workers=4, min_workers=least)
    train = TrainConfig(images_per_step=16, images_per_micro_batch=4)
    assert workers_that_fit(cluster, train, [{"CPU": cpus}]) == found


def test_no_worker_lies_on_two_nodes():
    """Two nodes of 16 CPUs have room for two workers of ten, one with cards and few CPUs for as many as it has CPUs."""
    train = TrainConfig(images_per_step=12, images_per_micro_batch=4)
    cluster = ClusterConfig(workers=3, min_workers=1, cpus_per_worker=10)
    assert workers_that_fit(cluster, replace(train, images_per_step=24), [{"CPU": 16.0}, {"CPU": 16.0}]) == 2
    cards = ClusterConfig(workers=3, min_workers=1, cpus_per_worker=2, use_gpu=True)
    assert workers_that_fit(cards, train, [{"CPU": 2.0, "GPU": 8.0}, {"CPU": 64.0}]) == 1
    assert workers_that_fit(cards, train, [{"CPU": 8.0, "GPU": 8.0}]) == 3


def test_every_worker_needs_a_gpu():
    cluster = ClusterConfig(workers=4, min_workers=1, use_gpu=True)
    train = TrainConfig(images_per_step=16, images_per_micro_batch=4)
    assert [workers_that_fit(cluster, train, [{"CPU": 64, "GPU": gpus}]) for gpus in (4, 3, 1, 0)] == [4, 2, 1, 0]


def test_what_is_tried_again():
    """A lost worker as often as asked, a figure that is not finite once, and never what would come back."""
    assert retries(RuntimeError("connection closed by peer"), 3) == retries(ConnectionResetError("peer"), 3) == 3
    assert retries(NotFinite("the loss"), 3) == 1 and retries(NotFinite("the loss"), 0) == 0
    assert retries(ValueError("a shard"), 3) == retries(CheckpointFailed("a full disk"), 3) == 0


def test_of_several_errors_the_one_that_explains_the_others():
    class Failed(Exception):
        worker_failures = {0: RuntimeError("connection closed by peer"), 1: ValueError("shard 3 cannot be read")}  # noqa: RUF012

    assert "shard 3" in str(reason_of(Failed()))
    assert "alone" in str(reason_of(RuntimeError("alone")))


def test_a_cluster_that_is_too_small_is_waited_for_a_local_ray_is_not(run, monkeypatch, capsys):
    """A cluster of a head without work, as infra/kuberay/cluster.yaml has it before a job comes; two looks later it has grown."""
    small = [f"{role}.train.images_per_micro_batch=8" for role in ("teacher", "student")]
    small += ["distill.warm_start.images_per_micro_batch=8", "distill.train.images_per_micro_batch=8"]
    config, asked = settings(run, *small, "cluster.workers=2", "cluster.wait=30"), []
    (stage,) = stages(config, "finetune")
    have = iter([[{}], [{"CPU": 2.0}], [{"CPU": 2.0}, {"CPU": 2.0}]])
    monkeypatch.setattr(cluster, "_started", False)
    monkeypatch.setattr(cluster, "nodes", lambda: [{"memory": 1.0}])
    monkeypatch.setattr(cluster, "answering", lambda: next(have))
    monkeypatch.setattr(cluster, "placement_group", lambda bundles: asked.append(bundles) or "group")
    monkeypatch.setattr(cluster, "remove_placement_group", asked.append)
    told = threading.Event()
    assert workers_of(config, stage, told) == 2
    assert asked == [[{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 0.5}], "group"]
    assert "until then it waits, up to 30 s, for nodes that join" in capsys.readouterr().out
    monkeypatch.setattr(cluster, "answering", list)
    with pytest.raises(ValueError, match=r"but this Ray has 0 CPUs .* lower cluster\.workers"):
        workers_of(replace(config, cluster=replace(config.cluster, wait=1.0)), stage, told)
    told.set()
    with pytest.raises(JobStopped, match="stopped while it waited for nodes"):
        workers_of(config, stage, told)
    assert asked[-1] == "group"  # what was asked for is given back, however the wait ends
    monkeypatch.setattr(cluster, "_started", True)
    with pytest.raises(ValueError, match=r"needs at least 2.5 CPUs .* but this Ray has 0 CPUs"):
        workers_of(config, stage, threading.Event())


def test_ctrl_c_is_what_it_was_when_ray_train_has_ended():
    """Ray Train leaves a handler behind that asks an ended run to stop: an evaluation after it could not be interrupted."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with _sigterm(None) as told:
        with trainer._ctrl_c_kept():
            signal.signal(signal.SIGINT, lambda *_: None)
        assert signal.getsignal(signal.SIGINT) == before[1]  # while a stage waits for nodes too
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before and not told.is_set()


def test_ray_trains_exit_after_ctrl_c_is_a_ctrl_c(run, monkeypatch):
    def ends(_):
        raise SystemExit(0)

    monkeypatch.setattr(trainer.TorchTrainer, "fit", ends)
    config = settings(run)
    (stage,) = stages(config, "finetune")
    with pytest.raises(KeyboardInterrupt):
        trainer._attempt(config, stage, "", 1, print, SimpleNamespace(wait=SimpleNamespace(remote=list)), ())


@pytest.mark.parametrize(
    ("reason", "told", "ends", "said"),
    [
        (RuntimeError("connection closed by peer"), True, JobStopped, "stopped at step 8 of"),
        (CheckpointFailed("no space left"), True, TrainingFailed, "no space left"),
        (CheckpointFailed("no space left"), False, TrainingFailed, "no space left"),
    ],
)
def test_what_ends_a_stage_that_fails_while_it_is_told_to_stop(run, tmp_path, monkeypatch, reason, told, ends, said):
    """A worker that is lost then is no reason to begin again; one that could not write its checkpoint is named."""
    config, given = settings(run), threading.Event()
    (stage,) = stages(config, "finetune")

    class Failed(TrainingFailedError):
        worker_failures = {0: reason}  # noqa: RUF012

        def __init__(self) -> None: ...

    def attempt(*_):
        if told:
            given.set()
        raise Failed

    for name, value in {"notice_of_sigterm": lambda: nullcontext((None, given)), "workers_of": lambda *_, **__: 1,
                        "newest_step": lambda _: 8, "_attempt": attempt}.items():  # fmt: skip
        monkeypatch.setattr(trainer, name, value)
    with pytest.raises(ends, match=said):
        trainer.fit(config, replace(stage, folder=str(tmp_path / "stage")))
