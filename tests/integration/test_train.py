"""Ray Train + DeepSpeed + Ray Data for real: one and two workers, ZeRO 0-2, all methods, NaN, evaluation and report."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from geodistill.config import Config, load

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

TINY = [
    "data.train=64", "data.unlabelled=32", "data.val=8", "data.test=16", "data.images_per_shard=32",
    "teacher.model.hidden=32", "teacher.model.layers=2", "teacher.model.heads=2", "teacher.model.intermediate=64",
    "student.model.hidden=16", "student.model.layers=1", "student.model.heads=2", "student.model.intermediate=32",
    *(f"{role}.model.vision.{k}" for role in ("teacher", "student")
      for k in ("hidden=16", "layers=2", "heads=2", "patch=16")),
    *(f"{t}.{k}" for t in ("teacher.train", "student.train", "distill.warm_start", "distill.train")
      for k in ("steps=3", "log_every=1", "validate_every=3", "checkpoint_every=3", "questions_per_row=12",
                "images_per_micro_batch=8", "learning_rate=0.003")),
    "distill.loss.align=0.1", "evaluate.images_per_batch=8", "evaluate.samples=4",
]  # fmt: skip


def settings(run: Path, *overrides: str) -> Config:
    return load(None, [f"run={run}", f"data.shards={run.parent}/data", *TINY, *overrides])


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(config: Config, job: str) -> None:
    from geodistill.train.trainer import fit, stages

    for stage in stages(config, job):
        fit(config, stage)


@pytest.fixture(scope="session")
def first(ray_cluster, tmp_path_factory) -> Config:
    """A prepared data set, a teacher, and a baseline trained by one worker with accumulation over two micro-batches."""
    from geodistill.data.shards import prepare

    config = settings(tmp_path_factory.mktemp("train") / "one")
    prepare(config, parallel=True)
    train(settings(Path(config.run), "role=teacher"), "finetune")
    train(config, "finetune")
    return config


@pytest.mark.parametrize(("workers", "stage"), [(2, 0), (2, 1), (2, 2)])
def test_two_workers_learn_what_one_learns(first, workers, stage):
    """Same global batch, same losses, gradient norms and weights, with every ZeRO stage."""
    run = Path(first.run).parent / f"workers{workers}zero{stage}"
    train(settings(run, f"cluster.workers={workers}", f"cluster.zero_stage={stage}"), "finetune")
    one, two = history(Path(first.run) / "baseline"), history(run / "baseline")
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "validation_loss"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
    a, b = (load_file(Path(f) / "baseline/model/model.safetensors") for f in (first.run, run))
    assert a.keys() == b.keys()
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 2e-4


def test_bf16(first):
    run = Path(first.run).parent / "bf16"
    train(settings(run, "cluster.precision=bf16"), "finetune")
    losses = [row["loss"] for row in history(run / "baseline") if "loss" in row]
    exact = [row["loss"] for row in history(Path(first.run) / "baseline") if "loss" in row]
    assert losses == pytest.approx(exact, rel=0.03)


def test_distil_evaluate_report(first):
    """Two workers distil through the warm start and the loop; everything a user looks for is written."""
    from geodistill.evaluate.benchmarks import evaluate
    from geodistill.evaluate.report import report_of_run

    config = settings(Path(first.run), "cluster.workers=2", "distill.train.splits=[train,unlabelled]")
    train(config, "distill")
    rows = [row for row in history(Path(first.run) / "distill") if "loss" in row]
    for key in ("single", "long", "align", "pretrain", "reverse_kl", "reward", "length", "agreement", "learning_rate"):
        assert all(key in row for row in rows), key
    assert not list(Path(first.run).glob("distill/checkpoints/**/*teacher*"))
    saved = load_file(Path(first.run) / "distill/model/model.safetensors")
    assert not any("align" in name for name in saved)
    checkpoint = next(Path(first.run).glob("distill/checkpoints/step-*"))
    assert sum(f.stat().st_size for f in checkpoint.rglob("*")) < 3 * 4 * sum(t.numel() for t in saved.values()) + 200_000
    scores = evaluate(config)
    written = json.loads((Path(config.run) / "metrics.json").read_text())
    assert set(written) == {"teacher", "baseline", "distilled", "constant_answer"}
    assert {"scene_classification", "vqa", "grounding", "captioning", "mean"} <= set(scores["distilled"]["summary"])
    assert report_of_run(config, scores).stat().st_size > 50_000
    assert list((Path(config.run) / "distill/tensorboard").glob("events*"))


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(first):
    from geodistill.train.trainer import TrainingFailed

    run = Path(first.run).parent / "nan"
    config = settings(run, "student.train.learning_rate=1e30", "student.train.warmup=0", "student.train.checkpoint_every=1",
                      "student.train.steps=6")  # fmt: skip
    with pytest.raises(TrainingFailed, match=r"not finite at step \d; the checkpoint of step \d+ is kept"):
        train(config, "finetune")
    assert list((run / "baseline/checkpoints").glob("step-00000*/engine"))


def test_a_finished_stage_is_skipped_and_other_settings_are_refused(first, capsys):
    train(first, "finetune")
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"finished with other settings.*learning_rate"):
        train(settings(Path(first.run), "student.train.learning_rate=0.5"), "finetune")


def test_an_interrupted_stage_goes_on(first):
    """A run that broke after step 2 of 3 goes on there, and learns what the unbroken one learned."""
    from geodistill.train.trainer import TrainingFailed, fit, stages

    run = Path(first.run).parent / "broken"
    config = settings(run, "student.train.checkpoint_every=1")
    (stage,) = stages(config, "finetune")
    (run / "baseline").mkdir(parents=True)
    (run / "baseline/model.partial").write_text("in the way")  # the model cannot be saved at the last step
    with pytest.raises(TrainingFailed):
        fit(config, stage)
    (run / "baseline/model.partial").unlink()
    fit(config, stage)
    one, again = history(Path(first.run) / "baseline"), history(run / "baseline")
    assert [r["step"] for r in one] == [r["step"] for r in again]
    for a, b in zip(one, again, strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)
