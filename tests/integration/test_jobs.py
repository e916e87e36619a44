"""The jobs as a user runs them: processes with a Ray of their own, killed and run again (test_cluster.py: submitted to one)."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import pytest
from tiny import TINY, history, same

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
JOIN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # what would join the Ray of another test


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in JOIN}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", **more}


def start(job: str, said: IO[str], *overrides: str) -> subprocess.Popen:
    command = [sys.executable, f"jobs/{job}.py", "--config", "configs/demo.yaml", "teacher.model.init=", "student.model.tower="]
    return subprocess.Popen([*command, *TINY, *overrides], cwd=ROOT, env=environment(RAY_ADDRESS="local"),
                            stdout=said, stderr=subprocess.STDOUT)  # fmt: skip


def run_job(job: str, *overrides: str) -> str:
    with tempfile.TemporaryFile("w+") as said:
        process = start(job, said, *overrides)
        try:
            process.wait(timeout=280)
        finally:
            process.kill()
        said.seek(0)
        text = said.read()
    assert process.returncode == 0, text[-3000:]
    return text


def whole_way(run: Path) -> list[str]:
    models = {"teacher": "teacher", "baseline": "baseline", "distilled": "distill"}
    shown = ", ".join(f"{name}: {run}/{folder}/model" for name, folder in models.items())
    return [f"run={run}", "cluster.workers=1", "distill.warm_start.steps=0", f"evaluate.models={{{shown}}}", "evaluate.blind=[]"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> tuple[Path, str]:
    """The run folder of a whole pipeline, and what it printed."""
    run = tmp_path_factory.mktemp("pipeline") / "run"
    return run, run_job("pipeline", *whole_way(run))


def test_the_pipeline_goes_all_the_way_and_is_skipped_the_second_time(pipeline):
    run, said = pipeline
    metrics = json.loads((run / "metrics.json").read_text())
    for model in ("teacher", "baseline", "distilled"):
        assert {"mean", "scene_classification", "vqa", "grounding", "captioning"} <= metrics[model].keys()
        assert 0 <= metrics[model]["mean"] <= 100
    assert "left" in said and "images/s" in said and f"{run}/report.html" in said
    before = {f: f.stat().st_mtime for f in run.rglob("*.safetensors")}
    again = run_job("pipeline", *whole_way(run))
    assert again.count("finished before") == 3
    assert before and all(f.stat().st_mtime == t for f, t in before.items())


@pytest.mark.long
def test_a_killed_on_policy_loop_goes_on_where_it_was(pipeline):
    """SIGKILL between two checkpoints; the same command goes on and ends with the figures and weights of an unbroken run."""
    run, _ = pipeline
    common = ["data.shards=" + str(run / "data"), f"distill.teacher={run}/teacher/model", "distill.warm_start.steps=0",
              "distill.train.steps=16", "distill.train.checkpoint_every=4", "distill.train.validate_every=16"]  # fmt: skip
    unbroken, killed = run.parent / "unbroken", run.parent / "killed"
    run_job("distill", f"run={unbroken}", *common)
    with tempfile.TemporaryFile("w+") as said:
        process = start("distill", said, f"run={killed}", *common)
        second = killed / "distill/checkpoints/step-000008"  # once it is there, Ray knows of the first
        while not second.exists() and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.wait(timeout=60)
    assert second.exists() and not (killed / "distill/done.json").exists(), "the job had ended before it could be killed"
    before = [row for row in history(killed / "distill") if row["step"] <= 4]
    run_job("distill", f"run={killed}", *common)
    assert history(killed / "distill")[: len(before)] == before  # seconds included: these steps were not made again
    same(unbroken / "distill", killed / "distill")
