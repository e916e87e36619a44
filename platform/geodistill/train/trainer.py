"""fit: one training stage as a Ray TorchTrainer, skipped where it is finished, resumed where it was interrupted."""

import json
import time
from dataclasses import asdict
from pathlib import Path

from ray.train import CheckpointConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from geodistill.cli import JobFailed
from geodistill.config import Config, save
from geodistill.data.shards import load_manifest
from geodistill.models import assemble
from geodistill.train.loop import Stage, worker


class TrainingFailed(JobFailed):
    """A stage stopped on an error of a worker; the message is the worker's."""


def _last_line(error: BaseException) -> str:
    """The message of an error that Ray has wrapped, without its traceback."""
    cause = getattr(error, "cause", None) or error
    return str(cause).strip().splitlines()[-1]


def stages(config: Config, job: str) -> list[Stage]:
    """What a job trains. job: finetune (by config.role) or distill (Table 1: warm start, then the loop)."""
    run = Path(config.run)
    if job == "finetune":
        role = config.role
        if role == "teacher":
            return [Stage("teacher", str(run / "teacher"), config.teacher.train, "teacher", "", "", True)]
        train = config.student.train
        if role == "blind":
            train = type(train)(**{**vars(train), "blind": True})
        name = "baseline" if role == "student" else "blind"
        return [Stage(name, str(run / name), train, "student", "", "", True)]
    distill = config.distill
    found = []
    start = ""
    if distill.warm_start.steps:
        folder = run / "distill" / "warm"
        found.append(Stage("distill/warm", str(folder), distill.warm_start, "student", "", distill.teacher, True))
        start = str(folder / "model")
    found.append(Stage("distill", str(run / "distill"), distill.train, "student", start, distill.teacher, False))
    return found


def settings_of(config: Config, stage: Stage) -> dict:
    """The settings that decide the outcome of a stage: a finished one is skipped only if they are the same."""
    found = {"seed": config.seed, "system": config.system, "data": asdict(config.data), "stage": asdict(stage)}
    found["model"] = asdict(getattr(config, stage.sizes).model)
    cluster = config.cluster
    found["cluster"] = {"workers": cluster.workers, "precision": cluster.precision}
    if stage.teacher:
        found["loss"] = asdict(config.distill.loss)
        found["pretrain_splits"] = config.distill.pretrain_splits
    here = str(Path.cwd()) + "/"  # a project folder may be moved
    return json.loads(json.dumps(found).replace(here, ""))


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def is_finished(folder: Path, settings: dict) -> bool:
    """Whether `folder` holds a finished stage of the same settings; ValueError, with the remedy, if of other ones."""
    file = folder / "done.json"
    if not file.is_file():
        return False
    old, new = _flatten(json.loads(file.read_text())["settings"]), _flatten(json.loads(json.dumps(settings)))
    changed = [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if changed:
        raise ValueError(
            f"{folder} was finished with other settings ({'; '.join(changed[:3])}); "
            "choose another run=FOLDER, or delete that folder to train again"
        )
    return True


def check_stage(config: Config, stage: Stage) -> None:
    """Raise ValueError for data, folders or a pair of models that cannot work, before a worker starts or a weight is loaded."""
    load_manifest(Path(config.data.shards), [*stage.train.splits, "val"])
    if stage.train.method == "distill" and config.distill.loss.pretrain > 0:
        load_manifest(Path(config.data.shards), config.distill.pretrain_splits)
    if not stage.teacher:
        return
    sizes = getattr(config, stage.sizes).model
    start = stage.start or sizes.init
    vision = sizes.vision
    tokens = (vision.image_size // vision.patch) ** 2
    if start or sizes.tower:
        tokens = assemble.image_tokens_of(start or sizes.tower)
    vocabulary = assemble.vocabulary_of(start or stage.teacher)
    assemble.check_pair(stage.teacher, vocabulary, tokens)


def fit(config: Config, stage: Stage) -> None:
    """Train one stage to its end. Raises ValueError for what the user can mend, TrainingFailed for what broke on the way."""
    folder = Path(stage.folder)
    settings = settings_of(config, stage)
    if is_finished(folder, settings):
        print(f"[{stage.name}] finished before, in {folder}", flush=True)
        return
    check_stage(config, stage)
    save(config, folder / "config.yaml")
    began = time.time()
    cluster = config.cluster
    trainer = TorchTrainer(
        worker,
        train_loop_config={"config": config, "stage": stage},
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.use_gpu else {})},
        ),
        run_config=RunConfig(name="checkpoints", storage_path=str(folder), checkpoint_config=CheckpointConfig(num_to_keep=2)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {}) or {0: error}
        cause = next(iter(failures.values()))
        raise TrainingFailed(f"[{stage.name}] {_last_line(cause)}") from error
    seconds = time.time() - began
    (folder / "done.json").write_text(json.dumps({"seconds": seconds, "settings": settings}, indent=1))
    print(f"[{stage.name}] done in {seconds:.0f} s: {folder}/model", flush=True)
