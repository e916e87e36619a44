"""Two workers at every ZeRO stage, for twenty steps of the on-policy loop: the same figures, and the same after a restore."""

import shutil
from pathlib import Path

import pytest
from tiny import history, same, settings, train

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
MORE = ("loss", "grad_norm", "validation_loss", "length", "reverse_kl", "align", "pretrain")
# what each stage is run with beside: it must not change a figure either
STAGES = {
    0: (),
    1: (),
    2: ("cluster.gradient_checkpointing=true", "cluster.loss_chunk=600000"),
    3: ("cluster.shard_teacher=true", "cluster.gradient_checkpointing=true", "cluster.loss_chunk=600000"),
}


def rewind(folder: Path, step: int) -> None:
    """Leave a finished stage as if it had been killed behind the checkpoint of `step`."""
    (folder / "done.json").unlink()
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def adapters(first, run: Path, stage: int, *overrides: str) -> Path:
    steps = ("steps=20", "checkpoint_every=10", "validate_every=20", "tuning=lora", "lora.rank=4", "images_per_step=16")
    config = settings(run, f"distill.teacher={first.distill.teacher}", "cluster.workers=2", f"cluster.zero_stage={stage}",
                      "distill.warm_start.steps=0", *(f"distill.train.{key}" for key in steps), *overrides)  # fmt: skip
    train(config, "distill")
    return run / "distill"


@pytest.fixture(scope="module")
def whole(first) -> Path:
    """ZeRO 0, with LoRA and its dropout."""
    return adapters(first, Path(first.run).parent / "zero0", 0)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_zero_stage_learns_what_stage_0_does_and_goes_on_from_its_checkpoint(first, whole, stage):
    run = Path(first.run).parent / f"zero{stage}"
    folder = adapters(first, run, stage, *STAGES[stage])
    assert [row["step"] for row in history(folder) if "loss" in row] == [*range(1, 21)]
    same(whole, folder, MORE)
    kept = run / "kept"
    shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("checkpoints"))
    rewind(folder, 10)
    adapters(first, run, stage, *STAGES[stage])
    same(kept, folder, MORE)
