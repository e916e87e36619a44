"""`prepare` through Ray Data makes the same shards as in one process, and the job ends with the right code."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from geodistill.config import load
from geodistill.data.prepare import prepare
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
