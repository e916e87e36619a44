"""The jobs as a user runs them: as processes with a Ray of their own, killed and run again, and submitted to a cluster."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest
from tiny import TINY, history, same

from geodistill.train.checkpoint import newest_step

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


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> tuple[Path, str]:
    """The run folder of a whole pipeline, and what it printed."""
    run = tmp_path_factory.mktemp("pipeline") / "run"
    return run, run_job("pipeline", f"run={run}", "student.blind_steps=2")


def test_the_pipeline_goes_all_the_way_and_is_skipped_the_second_time(pipeline):
    run, said = pipeline
    metrics = json.loads((run / "metrics.json").read_text())
    for model in ("teacher", "baseline", "distilled"):
        assert {"mean", "scene_classification", "vqa", "grounding", "captioning"} <= metrics[model].keys()
        assert 0 <= metrics[model]["mean"] <= 100
    assert "left" in said and "images/s" in said and f"{run}/report.html" in said
    before = {f: f.stat().st_mtime for f in run.rglob("*.safetensors")}
    again = run_job("pipeline", f"run={run}", "student.blind_steps=2")
    assert again.count("finished before") == 5
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


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@contextlib.contextmanager
def node(folder: str, *options: str) -> Iterator[subprocess.Popen]:
    """`ray start --block` with these options, ended with all that it has started."""
    command = ["ray", "start", "--block", f"--temp-dir={folder}", "--disable-usage-stats", *options]
    process = subprocess.Popen(command, env=environment(RAY_AUTH_MODE="disabled"), stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in [*started, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def cluster():
    """A head node such as `ray start --head` makes, with ports and a folder of its own; yields the dashboard's address."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ports = free_ports(4)
        head = ["--head", f"--port={ports[0]}", f"--dashboard-port={ports[1]}", "--num-cpus=4", "--dashboard-host=127.0.0.1",
                f"--ray-client-server-port={ports[2]}", f"--dashboard-agent-listen-port={ports[3]}"]  # fmt: skip
        address = f"http://127.0.0.1:{ports[1]}"
        with node(folder, *head) as process:
            for _ in range(120):
                listed = subprocess.run(["ray", "job", "list", "--address", address], env=environment(RAY_AUTH_MODE="disabled"),
                                        capture_output=True, check=False)  # fmt: skip
                if listed.returncode == 0 or process.poll() is not None:
                    break
                time.sleep(0.5)
            assert listed.returncode == 0, f"ray start did not come up: {listed.stderr.decode()[-1000:]}"
            yield address


def test_submitted_jobs(cluster, tmp_path):
    """README's command: the working directory travels, the job joins the cluster, and its exit code is the job's."""

    def submit(job: str, *overrides: str) -> subprocess.CompletedProcess:
        command = ["ray", "job", "submit", "--address", cluster, "--working-dir", ".", "--runtime-env", "runtime-env.yaml", "--"]
        entry = ["python", f"jobs/{job}.py", "--config", "configs/demo.yaml", "teacher.model.init=", "student.model.tower="]
        return subprocess.run([*command, *entry, f"run={tmp_path}/run", *TINY, *overrides], cwd=ROOT, capture_output=True,
                              text=True, env=environment(RAY_AUTH_MODE="disabled"), check=False)  # fmt: skip

    assert submit("prepare").returncode == 0
    assert json.loads((tmp_path / "run/data/manifest.json").read_text())["splits"]["train"]["images"] == 64
    refused = submit("finetune", "role=teacher", "teacher.train.learning_rat=1")
    assert refused.returncode != 0 and "did you mean 'teacher.train.learning_rate'" in refused.stdout + refused.stderr
    trained = submit("finetune", "role=teacher")
    assert trained.returncode == 0, trained.stdout[-3000:]
    assert (tmp_path / "run/teacher/model/model.safetensors").exists()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_node_that_gets_notice_costs_nothing(tmp_path):
    """The node of the only worker is drained, as spot machines are, and then lost: the checkpoint is that of the notice, and the
    stage goes on with a node that joins later."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as nodes:
        port, dashboard, client, agent = free_ports(4)
        gcs, address = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=1", "--dashboard-host=127.0.0.1",
                f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]  # fmt: skip
        nodes.enter_context(node(folder, *head))

        def worker_node() -> subprocess.Popen:
            (agent,) = free_ports(1)
            return nodes.enter_context(node(folder, f"--address={gcs}", "--num-cpus=2", f"--dashboard-agent-listen-port={agent}"))

        def ray(*words: str) -> subprocess.CompletedProcess:
            return subprocess.run(["ray", *words], env=environment(RAY_AUTH_MODE="disabled"), capture_output=True, text=True,
                                  cwd=ROOT, check=False)  # fmt: skip

        for _ in range(60):
            if ray("job", "list", "--address", address).returncode == 0:
                break
            time.sleep(1)
        spot = worker_node()
        entry = ["python", "jobs/prepare.py", "--config", "configs/demo.yaml", "teacher.model.init=", "student.model.tower="]
        submit = ["job", "submit", "--address", address, "--working-dir", ".", "--runtime-env", "runtime-env.yaml", "--"]
        run = [f"run={tmp_path}/run", *TINY]
        prepared = ray(*submit, *entry, *run)
        assert prepared.returncode == 0, prepared.stdout[-3000:]
        entry[1] = "jobs/finetune.py"
        rare = [f"teacher.train.{key}=400" for key in ("steps", "checkpoint_every", "validate_every")]
        more = ["role=teacher", *rare, "cluster.cpus_per_worker=1.5", "cluster.wait=120"]
        with tempfile.TemporaryFile("w+") as said:
            job = subprocess.Popen(["ray", *submit, *entry, *run, *more], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT,
                                   env=environment(RAY_AUTH_MODE="disabled"))  # fmt: skip
            teacher = tmp_path / "run/teacher"

            def wait_for(what: Callable[[], bool], seconds: float) -> None:
                end = time.time() + seconds
                while not what():
                    assert job.poll() is None and time.time() < end, (said.seek(0), said.read()[-3000:])
                    time.sleep(0.2)

            wait_for(lambda: (teacher / "metrics.jsonl").is_file() and len(history(teacher)) > 5, 120)
            nodes_of = json.loads(ray("list", "nodes", "--address", address, "--format", "json").stdout)
            (leaves,) = [one["node_id"] for one in nodes_of if not one["is_head_node"]]
            drained = ray("drain-node", "--address", gcs, "--node-id", leaves, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
                          "--reason-message", "spot", "--deadline-remaining-seconds", "60")  # fmt: skip
            assert drained.returncode == 0, drained.stderr
            wait_for(lambda: newest_step(str(teacher / "checkpoints")) > 0, 60)
            kept = newest_step(str(teacher / "checkpoints"))
            assert 0 < kept < 400
            for one in [*psutil.Process(spot.pid).children(recursive=True), psutil.Process(spot.pid)]:
                one.kill()
            worker_node()
            job.wait(timeout=300)
            said.seek(0)
            text = said.read()
    assert job.returncode == 0, text[-3000:]
    assert f"goes on from step {kept}" in text and (teacher / "done.json").is_file()
    steps = [row["step"] for row in history(teacher) if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 400
