"""Ray Train + DeepSpeed + Ray Data for real: one worker and two, all methods, NaN, evaluation and report; test_zero.py: ZeRO."""

import json
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file
from tiny import history, same, settings, train

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.mark.long
@pytest.mark.parametrize(("workers", "stage"), [(2, 2)])
def test_workers_and_zero_stages_learn_the_same(first, workers, stage):
    """Same global batch, same losses, gradient norms and weights as one worker with ZeRO 1 and accumulation."""
    run = Path(first.run).parent / f"workers{workers}zero{stage}"
    train(settings(run, f"cluster.workers={workers}", f"cluster.zero_stage={stage}"), "finetune")
    same(Path(first.run) / "baseline", run / "baseline")


@pytest.mark.parametrize(("workers", "stage"), [(2, 3)])
def test_workers_and_zero_stages_distil_the_same(first, workers, stage):
    """kd and the on-policy loop: the sampled responses follow from seed and step alone, so even they are the same."""
    run = Path(first.run).parent / f"distil{workers}zero{stage}"
    teacher = f"distill.teacher={first.distill.teacher}"
    train(settings(run, teacher, f"cluster.workers={workers}", f"cluster.zero_stage={stage}"), "distill")
    same(Path(first.run) / "distill/warm", run / "distill/warm")
    more = ("loss", "grad_norm", "validation_loss", "length", "reverse_kl", "long", "align", "pretrain", "reward")
    same(Path(first.run) / "distill", run / "distill", more)


def test_a_baseline_with_a_corpus_of_its_own(first):
    """gkd in the loop, and D_PT from prepared data that are not those of the prompts."""
    from geodistill.data.prepare import prepare

    run = Path(first.run).parent / "gkd"
    corpus = settings(run, f"data.shards={run}/corpus", "data.seed=1", "data.unlabelled=0")
    start = [f"student.model.init={first.run}/distill/warm/model", "distill.warm_start.steps=0", "distill.train.steps=2",
             f"distill.teacher={first.distill.teacher}", "distill.loss.preset=gkd", "distill.loss.alpha=0.5"]  # fmt: skip
    with pytest.raises(ValueError, match=rf"{run}/corpus.*prepare"):
        train(settings(run, *start, f"distill.pretrain_shards={run}/corpus"), "distill")
    prepare(corpus, parallel=True)
    train(settings(run, *start, f"distill.pretrain_shards={run}/corpus"), "distill")
    row, other = history(run / "distill")[0], history(Path(first.run) / "distill")[0]
    assert row["long"] == 0 and 0 < row["single"] < 0.6931  # JSD is at most ln 2
    assert row["pretrain"] != pytest.approx(other["pretrain"], rel=1e-4)
    with pytest.raises(ValueError, match=r"finished with other settings.*pretrain_shards"):
        train(settings(run, *start), "distill")


@pytest.mark.long
def test_bf16(first):
    run = Path(first.run).parent / "bf16"
    config = settings(run, "cluster.precision=bf16", f"distill.teacher={first.distill.teacher}")
    train(config, "finetune")
    train(config, "distill")
    for folder in ("baseline", "distill/warm", "distill"):
        found, exact = ([r["loss"] for r in history(Path(c.run) / folder) if "loss" in r] for c in (config, first))
        assert found == pytest.approx(exact, rel=0.03), folder


def test_distil_evaluate_report(first):
    """Two workers distil, unlabelled images too; everything a user looks for is written."""
    from geodistill.evaluate.benchmarks import evaluate
    from geodistill.evaluate.report import report_of_run

    run = Path(first.run).parent / "two"
    config = settings(run, "cluster.workers=2", "distill.train.splits=[train,unlabelled]", "distill.warm_start.steps=0",
                      f"distill.teacher={first.distill.teacher}", f"evaluate.models.teacher={first.distill.teacher}",
                      f"evaluate.models.baseline={first.run}/baseline/model",
                      f"mlflow=sqlite:///{run.parent}/mlflow.db")  # fmt: skip
    train(config, "distill")
    check_mlflow(f"sqlite:///{run.parent}/mlflow.db", history(run / "distill"))
    check_prometheus(history(run / "distill"))
    rows = [row for row in history(run / "distill") if "loss" in row]
    for key in ("single", "long", "align", "pretrain", "reverse_kl", "reward", "length", "agreement", "learning_rate"):
        assert all(key in row for row in rows), key
    assert not list(run.glob("distill/checkpoints/**/*teacher*"))
    saved = load_file(run / "distill/model/model.safetensors")
    assert not any("align" in name for name in saved)
    checkpoint = next(run.glob("distill/checkpoints/step-*"))
    assert sum(f.stat().st_size for f in checkpoint.rglob("*")) < 3 * 4 * sum(t.numel() for t in saved.values()) + 200_000
    scores = evaluate(config)
    written = json.loads((run / "metrics.json").read_text())
    assert set(written) == {"teacher", "baseline", "distilled", "constant_answer"}
    assert {"scene_classification", "vqa", "grounding", "captioning", "mean"} <= set(scores["distilled"]["summary"])
    assert Path(report_of_run(config, scores)).stat().st_size > 50_000
    assert list((run / "distill/tensorboard").glob("events*"))


def check_mlflow(uri: str, rows: list[dict]) -> None:
    """Every line of metrics.jsonl is in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("geodistill").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["method"] == "distill"
    for key in ("reverse_kl", "validation_loss"):
        logged = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, key)}
        assert logged == {row["step"]: row[key] for row in rows if key in row}


def check_prometheus(rows: list[dict]) -> None:
    """Ray exports the last figures of the stage."""
    port, wanted = ray.nodes()[0]["MetricsExportPort"], {}
    until = time.time() + 30
    while not wanted and time.time() < until:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        wanted = {line for line in lines if line.startswith("ray_geodistill_reverse_kl{") and 'stage="distill"' in line}
        time.sleep(0.5)
    assert any(float(line.rsplit(" ", 1)[1]) == pytest.approx(rows[-2]["reverse_kl"]) for line in wanted), wanted


@pytest.mark.long
def test_nan_stops_the_run_and_keeps_the_last_checkpoint(first):
    from geodistill.train.trainer import TrainingFailed

    run = Path(first.run).parent / "nan"
    config = settings(run, "student.train.learning_rate=1e30", "student.train.warmup=0", "student.train.checkpoint_every=1",
                      "student.train.steps=6")  # fmt: skip
    with pytest.raises(TrainingFailed, match=r"not finite at step \d; the checkpoint of step \d+ is kept"):
        train(config, "finetune")
    assert list((run / "baseline/checkpoints").glob("step-00000*/part-00000.json"))


def test_a_finished_stage_is_skipped_and_other_settings_are_refused(first, capsys):
    train(first, "finetune")
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"finished with other settings.*learning_rate"):
        train(settings(Path(first.run), "student.train.learning_rate=0.5"), "finetune")


def test_an_interrupted_stage_goes_on(first):
    """A run that broke after step 2 of 3 goes on there, and learns what the unbroken one learned."""
    from geodistill.train.stage import stages
    from geodistill.train.trainer import TrainingFailed, fit

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
