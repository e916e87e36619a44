"""`prepare` through Ray Data: the same shards as in one process, from S3 as from a disk, killed as unbroken; its exit codes."""

import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from geodistill.config import load
from geodistill.data.prepare import prepare
from geodistill.data.shards import groups, load_manifest, read_group
from geodistill.models.assemble import load_tokenizer

pytestmark = pytest.mark.integration
JOB = str(Path(__file__).parents[2] / "jobs" / "prepare.py")
SMALL = [
    "data.train=20",
    "data.val=4",
    "data.test=4",
    "data.images_per_shard=8",
    "data.images_per_group=4",
    "data.vocabulary=500",
]


def sums(manifest: dict) -> dict[str, str]:
    return {shard["file"]: shard["sha256"] for split in manifest["splits"].values() for shard in split["shards"]}


def run_job(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [JOB, *arguments])
    try:
        runpy.run_path(JOB, run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


def test_parallel_equals_serial_and_resumes(ray_cluster, tmp_path, capsys):
    serial = prepare(load(None, [f"run={tmp_path / 'serial'}", *SMALL]), parallel=False)
    config = load(None, [f"run={tmp_path / 'parallel'}", *SMALL])
    parallel = prepare(config, parallel=True)
    assert sums(parallel) == sums(serial) and parallel["splits"] == serial["splits"]
    folder = tmp_path / "parallel" / "data"
    assert 300 < len(load_tokenizer(folder / "tokenizer")) <= 500
    (folder / "manifest.json").unlink()
    (folder / "train-00001.parquet").unlink()
    capsys.readouterr()
    assert sums(prepare(config, parallel=True)) == sums(serial)
    assert capsys.readouterr().out.count("kept from an earlier run") == 4


def test_job(ray_cluster, tmp_path, monkeypatch, capsys):
    file = tmp_path / "small.yaml"
    file.write_text(f"run: {tmp_path / 'run'}\n")
    assert run_job(monkeypatch, "--config", str(file), *SMALL) == 0
    assert json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())["splits"]["train"]["images"] == 20
    gone = ["data.source=class_folders", f"data.root={tmp_path}/gone", f"run={tmp_path}/other"]
    assert run_job(monkeypatch, "--config", str(file), *gone) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare: ")]
    assert len(said) == 1 and "data.root=" in said[0] and "is not a folder" in said[0]


def start_job(*arguments: str, **environment: str) -> subprocess.Popen:
    """The job as a process with a Ray of its own."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    return subprocess.Popen([sys.executable, JOB, *arguments], env={**kept, "RAY_ADDRESS": "local", **environment},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


@pytest.fixture
def s3(monkeypatch):
    """An S3 server on this machine with an empty bucket `remote`; yields the settings that lead boto3 and pyarrow there."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="remote")
    yield settings
    server.stop()


@pytest.mark.long
@pytest.mark.timeout(240)
def test_s3_for_input_and_output(s3, tmp_path):
    client = boto3.client("s3", region_name="us-east-1")
    rng = np.random.default_rng(0)
    for i in range(40):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(buffer, "PNG")
        name = f"{('Pond', 'BareLand')[i % 2]}/{i}.png"
        client.put_object(Bucket="remote", Key=f"raw/AID/{name}", Body=buffer.getvalue() if i else b"broken")
        (tmp_path / "AID" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "AID" / name).write_bytes(buffer.getvalue() if i else b"broken")
    (tmp_path / "c.yaml").write_text("data: {source: class_folders, images_per_shard: 8, images_per_group: 4, vocabulary: 400}\n")
    remote = [
        "--config",
        str(tmp_path / "c.yaml"),
        f"run={tmp_path / 'run'}",
        "data.root=s3://remote/raw/AID",
        "data.shards=s3://remote/shards",
    ]
    said, _ = start_job(*remote, **s3).communicate(timeout=200)
    assert "set aside: 1" in said and "images in s3://remote/shards/manifest.json" in said, said
    local = prepare(load(str(tmp_path / "c.yaml"), [f"run={tmp_path / 'run'}", f"data.root={tmp_path / 'AID'}"]), parallel=False)
    manifest = load_manifest("s3://remote/shards", ["train", "test"])
    assert sums(manifest) == sums(local) and len(sums(local)) > 4
    for group in groups(manifest, "train"):
        assert read_group("s3://remote/shards", group) == read_group(tmp_path / "run" / "data", group)
    keys = {o["Key"] for o in client.list_objects_v2(Bucket="remote", Prefix="shards/")["Contents"]}
    assert {"shards/tokenizer/tokenizer.json", "shards/rejected.parquet", "shards/preview.html"} <= keys
    assert not any(key.endswith(".tmp") for key in keys)
    with pytest.raises(ValueError, match=r"s3://nowhere/x/manifest\.json does not exist"):
        load_manifest("s3://nowhere/x")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("train", "held_out", "per_shard"), [(192, 32, 16), pytest.param(9000, 500, 256, marks=pytest.mark.long)]
)
def test_thousands_of_images_killed_half_way(tmp_path, train, held_out, per_shard):
    """SIGKILL when half of the shards are there; the same command goes on and ends with the checksums of an unbroken run."""
    images, shards = train + 2 * held_out, -(-train // per_shard) + 2 * -(-held_out // per_shard)
    sizes = f"train: {train}, val: {held_out}, test: {held_out}, images_per_shard: {per_shard}, vocabulary: 1024"
    (tmp_path / "c.yaml").write_text(f"data: {{{sizes}}}\n")

    def run(name: str) -> subprocess.Popen:
        return start_job("--config", str(tmp_path / "c.yaml"), f"run={tmp_path / name}")

    prepare(load(str(tmp_path / "c.yaml"), [f"run={tmp_path / 'whole'}"]), parallel=False)
    killed = run("killed")
    folder = tmp_path / "killed" / "data"
    while len(list(folder.glob("*.json"))) < shards // 2 and killed.poll() is None:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=30)
    assert not (folder / "manifest.json").exists() and len(list(folder.glob("*.json"))) < shards
    with pytest.raises(ValueError, match=r"manifest.json does not exist: run jobs/prepare.py"):
        load_manifest(folder)
    said, _ = run("killed").communicate(timeout=250)
    assert said.count("kept from an earlier run") >= shards // 2 - 2, said
    whole, resumed = load_manifest(tmp_path / "whole" / "data"), load_manifest(folder)
    assert sums(resumed) == sums(whole) and len(sums(whole)) == shards
    assert sum(part["images"] for part in resumed["splits"].values()) == images
    assert not list(folder.glob("*.tmp"))
