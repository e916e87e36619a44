"""Checkpoints without Ray: exact at every ZeRO stage, for any number of workers, and nothing damaged or foreign is loaded."""

import concurrent.futures
import json
import multiprocessing
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from geodistill.config import ClusterConfig, TrainConfig
from geodistill.train import checkpoint, engine
from geodistill.train.checkpoint import CheckpointFailed, Checkpoints, Progress, newest_step

KINDS = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]


def begin(store: Path, rank: int, world: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.set_num_threads(1)


def learner(stage: int = 1, precision: str = "fp32", hidden: int = 65):
    """An engine around a small model of odd sizes, a part of which is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, hidden), nn.Tanh(), nn.Linear(hidden, 33), nn.LayerNorm(33), nn.Linear(33, 5))
    model[0].bias.requires_grad_(False)
    model = model.bfloat16() if precision == "bf16" else model
    return engine.start(model, TrainConfig(learning_rate=1e-2), ClusterConfig(zero_stage=stage, precision=precision), passes=1)


def learn(run, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        loss = run(torch.randn(4, 7, generator=generator).to(run.module[0].weight.dtype)).float().pow(2).mean()
        run.backward(loss)
        run.step()


def state(run) -> dict[str, torch.Tensor]:
    """Every weight and moment."""
    found = {name: engine.read_state(run, parameter) for name, parameter in engine.trainable(run).items()}
    return {f"{key}/{name}": value.float().clone() for name, parts in found.items() for key, value in parts.items()}


def difference(one: dict, two: dict) -> float:
    assert one.keys() == two.keys()
    return max((one[key] - two[key]).abs().max().item() for key in one)


def keeper(folder: Path, identity: str = "this", keep: int = 2) -> Checkpoints:
    return Checkpoints(str(folder), identity, "stage", dist.get_rank(), dist.get_world_size(), torch.device("cpu"), keep)


def save(run, folder: Path, step: int, last: float = 1.0, **options) -> Checkpoints:
    kept = keeper(folder, **options)
    kept.save(run, Progress(step=step, last=last), {"sums": {"loss": [float(dist.get_rank() + 1), 2.0]}, "images": 5})
    kept.wait()
    return kept


def one_of_two(rank: int, folder: Path) -> None:
    """Save, go on; restore in the same stage and in another one, go on: what is left is how far apart they end."""
    begin(folder / "store", rank, 2)
    found = {}
    for stage, precision in KINDS:
        here = folder / f"{stage}{precision}"
        run = learner(stage, precision)
        learn(run, range(3))
        save(run, here, 3)
        saved = state(run)
        learn(run, range(3, 6))
        again = learner(stage, precision)
        resumed = keeper(here).restore(again)
        assert resumed.progress.step == 3 and resumed.metrics["sums"]["loss"] == [rank + 1.0, 2.0]
        other = learner((stage + 1) % 4, precision)
        keeper(here).restore(other)
        found[f"{stage}{precision}"] = {
            "at once": difference(saved, state(again)),
            "other stage": difference(saved, state(other)),
        }
        learn(again, range(3, 6))
        found[f"{stage}{precision}"]["three steps on"] = difference(state(run), state(again))
        if rank == 0:
            torch.save(saved, here / "state.pt")
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> Path:
    """The folder of what two workers have saved, trained and compared."""
    folder = tmp_path_factory.mktemp("two")
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=one_of_two, args=(rank, folder)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200)
        assert worker.exitcode == 0
    return folder


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_nothing_is_lost_at_any_zero_stage(by_two, stage, precision):
    for rank in range(2):
        found = json.loads((by_two / f"{rank}.json").read_text())[f"{stage}{precision}"]
        assert found == {"at once": 0.0, "other stage": 0.0, "three steps on": 0.0}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("now", [0, 1, 2])  # 3 would replace torch's linear for the tests behind this one
@pytest.mark.parametrize("stage", [1, 3])
def test_one_worker_goes_on_from_the_checkpoint_of_two(by_two, alone, stage, now):
    run = learner(now)
    resumed = keeper(by_two / f"{stage}fp32").restore(run)
    assert difference(torch.load(by_two / f"{stage}fp32/state.pt"), state(run)) == 0.0
    assert resumed.metrics == {"sums": {"loss": [3.0, 4.0]}, "images": 10}  # of both workers
    assert engine.steps_of(run) == 3


def test_the_last_ones_are_kept_and_the_best(alone, tmp_path):
    run = learner()
    kept = keeper(tmp_path)
    for step, last in enumerate([3.0, 1.0, 2.0, 2.5, 4.0], 1):
        kept.save(run, Progress(step=step, last=last), {})
    assert newest_step(str(tmp_path)) in (4, 5)  # the last may be on its way
    kept.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000004", "step-000005"]
    assert newest_step(str(tmp_path)) == 5
    again = keeper(tmp_path)
    again.restore(run)
    again.save(run, Progress(step=6, last=9.0), {})
    again.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000005", "step-000006"]


@pytest.mark.parametrize("damage", ["a byte", "cut", "gone", "json", "a figure"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(alone, tmp_path, capsys, damage):
    run = learner()
    save(run, tmp_path, 1)
    before = state(run)
    learn(run, range(1))
    save(run, tmp_path, 2)
    hurt(tmp_path / "step-000002", damage)
    again = learner()
    assert keeper(tmp_path).restore(again).progress.step == 1
    assert difference(before, state(again)) == 0.0
    assert "damaged" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    hurt(tmp_path / "step-000001", damage)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read .*part-00000.*bring a copy back"):
        keeper(tmp_path).restore(learner())


def hurt(folder: Path, damage: str) -> None:
    tensors, about = folder / "part-00000.safetensors", folder / "part-00000.json"
    if damage == "a byte":
        data = bytearray(tensors.read_bytes())
        data[-5] ^= 1
        tensors.write_bytes(data)
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:100])
    elif damage == "gone":
        tensors.unlink()
    elif damage == "a figure":
        about.write_text(re.sub(r'"optimizer_steps": \d', '"optimizer_steps": 7', about.read_text()))
    else:
        about.write_text(about.read_text()[:50])


def test_what_was_not_finished_does_not_count(alone, tmp_path):
    run = learner()
    assert keeper(tmp_path).restore(run).progress.step == 0
    save(run, tmp_path, 1)
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002/part-00000.safetensors").write_bytes(b"half")
    about = json.loads((tmp_path / "step-000001/part-00000.json").read_text())
    (tmp_path / "step-000003").mkdir()
    about = {**about, "world": 2}  # the other part is missing
    del about["digest"]
    (tmp_path / "step-000003/part-00000.json").write_text(json.dumps({**about, "digest": checkpoint._digest(about)}))
    (tmp_path / "step-000001/part-00000.json").write_text(json.dumps(about | {"world": 1}))  # of a version without digests
    assert keeper(tmp_path).restore(run).progress.step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_missing_and_surplus_keys_and_other_settings_are_errors(alone, tmp_path):
    save(learner(), tmp_path, 1)
    with pytest.raises(ValueError, match=r"does not hold the weights that this run trains: \d+ of another shape, such as"):
        keeper(tmp_path).restore(learner(hidden=64))
    more = learner()
    more.module[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 missing, such as 0\.bias"):
        checkpoint._need_same(contents(tmp_path), engine.trainable(more), "here")
    fewer = {name: p for name, p in engine.trainable(learner()).items() if not name.startswith("4.")}
    with pytest.raises(ValueError, match=r"2 surplus, such as 4\.bias"):
        checkpoint._need_same(contents(tmp_path), fewer, "here")
    with pytest.raises(ValueError, match="is of a run with other settings"):
        keeper(tmp_path, identity="that").restore(learner())


def contents(folder: Path) -> dict:
    return json.loads((folder / "step-000001/part-00000.json").read_text())["contents"]


def test_a_full_disk_is_told_and_the_checkpoint_before_it_kept(alone, tmp_path, monkeypatch):
    run = learner()
    save(run, tmp_path, 1)
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002/part-00000.json.tmp").symlink_to("/dev/full")  # ENOSPC on writing
    kept = keeper(tmp_path)
    kept.restore(run)
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002/part-00000.json.tmp").symlink_to("/dev/full")
    kept.save(run, Progress(step=2), {})
    concurrent.futures.wait([kept.under_way[1]])
    assert kept.failed  # known before the next checkpoint is due
    with pytest.raises(CheckpointFailed, match=r"step 2 could not be written .*No space left.* that of step 1 is kept"):
        kept.wait()
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(CheckpointFailed, match=r"step 3 could not be written .*has 0 MiB left, and 0 are needed"):
        kept.save(run, Progress(step=3), {})  # before training goes on
    monkeypatch.undo()
    assert not kept.failed
    assert keeper(tmp_path).restore(run).progress.step == 1
