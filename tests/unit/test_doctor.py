"""What the doctor finds: each check where it is well and where it is not."""

import shutil
import socket
import subprocess
import sys
from collections import namedtuple

import pytest

from geodistill import doctor
from geodistill.config import load
from geodistill.doctor import Finding

Usage = namedtuple("Usage", "total used free")


def test_packages_that_are_missing_or_too_old(monkeypatch):
    assert doctor.packages().verdict == "ok" and "torch" in doctor.packages().found
    real = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.1" if name == "ray" else real(name))
    found = doctor.packages()
    assert found.verdict == "wrong" and found.found.startswith("ray") and "2.1" in found.found and found.remedy


def test_cards_that_are_asked_for_and_not_there():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert doctor.gpus(False).verdict == "ok"
    assert doctor.gpus(True).verdict == "wrong" and doctor.gpus(True).remedy


def test_shared_memory_and_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(4 * doctor.GIB, 0, 3 * doctor.GIB))
    assert doctor.shared_memory(2 * doctor.GIB).verdict == "ok"
    assert doctor.shared_memory(5 * doctor.GIB).verdict == "wrong"
    assert doctor.disk(str(tmp_path / "not" / "there")).verdict == "look"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, doctor.GIB))
    assert doctor.disk(str(tmp_path)).verdict == "wrong"


def test_storage_is_written_read_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "MEGABYTES", 1)
    found = doctor.storage("run", str(tmp_path / "new"))
    assert found.verdict == "ok" and "MB/s" in found.found and not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    assert doctor.storage("run", str(tmp_path / "file" / "below")).verdict == "wrong"
    other = doctor.storage("run", str(tmp_path / "new"), ".doctor-of-another-node")
    assert other.verdict == "wrong" and "another folder" in other.found


def test_ports_that_are_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert doctor.ports({"the endpoint": port}).found == f"taken: {port} (the endpoint)"
    assert doctor.ports({"the endpoint": port}).verdict == "ok"


def test_nodes_of_other_versions():
    here = dict.fromkeys(doctor.SAME, "1")
    assert doctor.agreement([here, here]).verdict == "ok"
    found = doctor.agreement([here, here | {"torch": "2"}])
    assert found.verdict == "wrong" and found.found == "nodes differ: torch: 1, 2"


def test_the_token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert [doctor.token("127.0.0.1").verdict, doctor.token("10.0.0.7").verdict] == ["ok", "look"]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert doctor.token("10.0.0.7").verdict == "ok"


def test_only_folders_outside_the_run_are_looked_at_beside_it():
    config = load(None, ["run=here", "checkpoints=s3://bucket/checkpoints"])
    assert doctor.places(config) == {"run": "here", "checkpoints": "s3://bucket/checkpoints"}


def test_a_meeting_that_nobody_comes_to_is_said():
    """In a process of its own: one has one process group at a time."""
    code = "import datetime; from geodistill import doctor; doctor.timedelta = lambda seconds: datetime.timedelta(seconds=1); "
    code += "print(doctor.meet(doctor.free_port(), '127.0.0.1', 1, 2, False))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.startswith("('gloo: ") and done.stdout.strip().endswith(", 0.0)")


def test_the_text_has_a_line_for_each_and_the_remedies():
    text = doctor.doctor_text(
        {"10.0.0.7": [Finding("disk", "1 GiB", "wrong", "free some")], "together": [Finding("clocks", "agree")]}
    )
    assert text.splitlines()[0] == "10.0.0.7" and "WRONG disk" in text and "-> free some" in text and "ok    clocks" in text
