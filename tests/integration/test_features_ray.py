"""Stored features through a real Ray: the job's actors, what is made again, what is refused, and what the stages read."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY, same, settings, train

from geodistill.config import Config, TrainConfig
from geodistill.data.features import Tower, to_tensor
from geodistill.data.prepare import prepare
from geodistill.data.stream import PackerSpec, stream
from geodistill.language import IMAGE
from geodistill.models.vision import new_tower

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
JOB = str(Path(__file__).parents[2] / "jobs" / "features.py")


def with_features(folder: Path, *overrides: str) -> list[str]:
    tower = [f"{role}.model.tower={folder}/tower" for role in ("teacher", "student")]
    return [*tower, "cluster.workers=2", f"features={folder}/features", *overrides]


@pytest.fixture(scope="module")
def config(ray_cluster, tmp_path_factory) -> Config:
    """Prepared shards, and a tower for both models."""
    folder = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    new_tower(settings(folder / "run").student.model.vision).save_pretrained(folder / "tower")
    config = settings(folder / "run", *with_features(folder))
    prepare(config, parallel=False)
    return config


@pytest.fixture
def job(config, monkeypatch, capsys):
    """Overrides -> (exit code, what the job said)."""
    file = Path(config.run).parent / "run.yaml"
    file.write_text(f"run: {config.run}\n")
    data = f"data.shards={config.data.shards}"

    def run(*overrides: str) -> tuple[int, str]:
        given = [*TINY, data, *with_features(file.parent, *overrides)]
        monkeypatch.setattr(sys, "argv", [JOB, "--config", str(file), *given])
        code = 0
        try:
            runpy.run_path(JOB, run_name="__main__")
        except SystemExit as left:
            code = int(left.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_the_job_makes_each_file_once_and_refuses_what_differs(job, config):
    code, said = job()
    assert code == 0 and "104 images" in said and "ms, tower" in said and "pay" in said and "images/s" in said, said
    files = {file: file.stat().st_mtime_ns for file in Path(config.features).iterdir()}
    assert sorted(file.name for file in files) == [
        "manifest.json", "train-00000.arrow", "train-00001.arrow", "unlabelled-00000.arrow", "val-00000.arrow"
    ]  # fmt: skip
    code, said = job()
    assert code == 0 and "features are there already" in said and "ms, tower" in said
    assert {file: file.stat().st_mtime_ns for file in Path(config.features).iterdir()} == files
    lost = Path(config.features) / "train-00001.arrow"
    before = lost.read_bytes()
    lost.unlink()
    code, said = job()
    assert code == 0 and "72 of 104 images are there already" in said and "file 1 of 1" in said
    assert lost.read_bytes() == before
    kept = [file for file in files if file.suffix == ".arrow" and file != lost]
    assert all(file.stat().st_mtime_ns == files[file] for file in kept)

    torch.manual_seed(1)
    other = Path(config.run).parent / "other"
    new_tower(config.student.model.vision).save_pretrained(other)
    for override, reason in (
        ("cluster.precision=bf16", "cluster.precision fp32 is not bf16"),
        (f"student.model.tower={other}", "the vision tower, or the layer of it that is read, is not the student's"),
        ("student.model.vision.feature_layer=-1", "the vision tower, or the layer of it that is read, is not the student's"),
        ("features=", "features is empty"),
    ):
        code, said = job(override)
        assert code == (2 if override == "features=" else 1) and reason in said, said


@pytest.mark.long
def test_the_stream_reads_the_features_of_the_images_that_it_would_show(job, config):
    assert job()[0] == 0
    spec = PackerSpec(f"{config.data.shards}/tokenizer", IMAGE, 16, 64, 200, 12)
    order = TrainConfig(steps=8, images_per_step=16, images_per_micro_batch=16)  # two epochs
    shown, read = (stream(config, ["train"], order, one, 0, 0, 1, 0) for one in (spec, replace(spec, features=config.features)))
    tower, count = Tower(config, "cpu"), 0
    for images, found in zip(shown, read, strict=True):
        assert found.ids == images.ids and found.questions == images.questions
        assert found.features is not None and found.features.flags.writeable and found.pixels.shape == (0, 64, 64, 3)
        np.testing.assert_allclose(to_tensor(found.features), tower(images.pixels), rtol=1e-4, atol=1e-5)
        count += 1
    assert count == 8


@pytest.mark.long
@pytest.mark.timeout(600)
def test_stages_learn_the_same_from_features_as_from_images(job, config):
    assert job()[0] == 0
    folder = Path(config.run).parent
    train(settings(folder / "run", *with_features(folder, "role=teacher", "features=")), "finetune")
    for run, features in (("shown", ""), ("read", config.features)):
        given = with_features(folder, f"features={features}", f"distill.teacher={folder}/run/teacher/model")
        train(settings(folder / run, *given), "distill")
    for stage in ("distill/warm", "distill"):
        same(folder / "shown" / stage, folder / "read" / stage)
