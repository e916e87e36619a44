"""Small runs for the integration tests, and how two of them are compared."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from geodistill.config import Config, load

TINY = [
    "data.train=64", "data.unlabelled=32", "data.val=8", "data.test=16", "data.images_per_shard=32",
    "teacher.model.hidden=32", "teacher.model.layers=2", "teacher.model.heads=2", "teacher.model.intermediate=64",
    "student.model.hidden=16", "student.model.layers=1", "student.model.heads=2", "student.model.intermediate=32",
    *(f"{role}.model.vision.{k}" for role in ("teacher", "student")
      for k in ("hidden=16", "layers=2", "heads=2", "patch=16")),
    *(f"{t}.{k}" for t in ("teacher.train", "student.train", "distill.warm_start", "distill.train")
      for k in ("steps=3", "log_every=1", "validate_every=3", "checkpoint_every=3", "questions_per_row=12",
                "images_per_micro_batch=8", "learning_rate=0.003")),
    "distill.loss.align=0.1", "evaluate.images_per_batch=8", "evaluate.samples=4",
]  # fmt: skip


def settings(run: Path, *overrides: str) -> Config:
    return load(None, [f"run={run}", f"data.shards={run.parent}/data", *TINY, *overrides])


def train(config: Config, job: str) -> None:
    from geodistill.train.stage import stages
    from geodistill.train.trainer import fit

    for stage in stages(config, job):
        fit(config, stage)


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, two: Path, keys: tuple[str, ...] = ("loss", "grad_norm", "validation_loss")) -> None:
    """The same figures at every step, and the same weights in the end."""
    assert all(any(key in row for row in history(one)) for key in keys)
    for a, b in zip(history(one), history(two), strict=True):
        assert a["step"] == b["step"]
        for key in keys:
            assert (key in a) == (key in b)
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
    left, right = (load_file(folder / "model/model.safetensors") for folder in (one, two))
    assert left.keys() == right.keys()
    assert max((left[k] - right[k]).abs().max().item() for k in left) < 2e-4
