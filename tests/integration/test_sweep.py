"""Sweeps on a real local Ray: every trial a real Train run, stopped early, interrupted and resumed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file
from tiny import TINY, settings

from geodistill.cluster import ENVIRONMENT, free_port
from geodistill.sweep import sweep, sweep_table

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
JOB = Path(__file__).parents[2] / "jobs/sweep.py"
STEPS = ("distill.train.steps=4", "distill.train.validate_every=1", "distill.train.checkpoint_every=1", "sweep.grace=1")


def options(first, run: Path, *overrides: str) -> list[str]:
    data = Path(first.run).parent / "data"
    return [f"data.shards={data}", f"distill.teacher={first.distill.teacher}", *STEPS, *overrides]


@pytest.mark.long
def test_trials_share_a_warm_start_and_the_best_is_left(first):
    run = Path(first.run).parent / "sweep"
    config = settings(run, *options(first, run, "sweep.space={distill.loss.alpha: 0 | 0.5}", "sweep.scheduler=none"))
    found = sweep(config)
    assert [row["state"] for row in found["trials"]] == ["finished"] * 2
    assert len(list((run / "sweep/warm").iterdir())) == 1
    losses = [row["validation_loss"] for row in found["trials"]]
    assert losses == sorted(losses) and losses[0] != losses[1]
    best = load_file(run / "sweep/best/model/model.safetensors")
    trial = load_file(run / "sweep/trials" / found["trials"][0]["name"] / "model/model.safetensors")
    assert all((best[name] == trial[name]).all() for name in trial)
    assert "alpha" in sweep_table(found) and (run / "sweep/sweep.png").stat().st_size > 10_000
    assert all(row["figures"].keys() == {"reverse_kl", "agreement", "length"} for row in found["trials"])
    with pytest.raises(ValueError, match="and these settings differ; give the command of then"):
        sweep(replace(config, seed=1))
    again = sweep(config)  # the same command goes on, here with nothing
    assert again["trials"] == found["trials"] and again["seconds"] < found["seconds"]


def job(run: Path, arguments: list[str], **given) -> subprocess.Popen:
    command = [
        sys.executable,
        str(JOB),
        "--config",
        "configs/demo.yaml",
        f"run={run}",
        "teacher.model.init=",
        "student.model.tower=",
    ]
    environment = os.environ | ENVIRONMENT | {"RAY_ADDRESS": "local"}
    return subprocess.Popen([*command, *TINY, *arguments], cwd=JOB.parents[1], env=environment, **given)


def decisions(run: Path) -> dict:
    rows = [json.loads(line) for line in (run / "sweep/decisions.jsonl").read_text().splitlines()]
    return {(row["trial"], row["step"]): (row["action"], row["validation_loss"]) for row in rows}


@pytest.mark.long
@pytest.mark.parametrize("search", ["grid", "optuna"])
def test_a_killed_sweep_takes_the_decisions_of_an_unbroken_one(first, search):
    """One trial at a time, so that the order of results is the same; SIGKILL in the middle; the same command with resume=true."""
    if search == "grid":
        space = ["sweep.space={distill.loss.alpha: 0 | 0.9, distill.train.learning_rate: 0.003 | 1e-6}"]
    else:
        space = ["sweep.space={distill.train.learning_rate: 1e-6 .. 1e-2 log}", "sweep.search=optuna", "sweep.trials=4"]
    unbroken, killed = (Path(first.run).parent / f"{search}-{name}" for name in ("unbroken", "killed"))
    common = options(first, unbroken, *space, "sweep.at_once=1", "sweep.reduction=2", "cluster.workers=1")
    assert job(unbroken, common).wait(600) == 0
    process = job(killed, common, start_new_session=True)
    while len(decisions(killed) if (killed / "sweep/decisions.jsonl").exists() else ()) < 5 and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 5 <= len(decisions(killed)) < len(decisions(unbroken))
    assert job(killed, [*common, "resume=true"]).wait(600) == 0
    assert decisions(killed) == decisions(unbroken)
    tables = [json.loads((run / "sweep/sweep.json").read_text())["trials"] for run in (unbroken, killed)]
    assert [(row["name"], row["state"], row["validation_loss"]) for row in tables[0]] == [
        (row["name"], row["state"], row["validation_loss"]) for row in tables[1]
    ]
    assert any(row["state"] == "stopped early" for row in tables[0])


@pytest.mark.long
def test_one_command_goes_on_to_the_served_student(first):
    run, port = Path(first.run).parent / "served", free_port()
    given = options(first, run, "sweep.space={distill.loss.alpha: '0.2'}", "sweep.serve=true", f"sweep.port={port}")
    with open(run.with_suffix(".log"), "w") as said:
        process = job(run, given, stdout=said, stderr=subprocess.STDOUT)
        end = time.time() + 400
        while time.time() < end and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=10).status_code == 200:
                    break
            time.sleep(1)
        found = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10).json()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    assert [one["id"] for one in found["data"]] == ["student", "teacher"]
    assert (run / "sweep/best/model/model.safetensors").is_file()
