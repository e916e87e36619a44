"""fit: one training stage as a Ray TorchTrainer, skipped where it is finished, resumed where it was interrupted."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import ray
from ray.train import CheckpointConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from geodistill.cli import JobFailed
from geodistill.config import Config, ModelConfig, TrainConfig, save
from geodistill.data.features import load_features
from geodistill.data.shards import load_manifest
from geodistill.models import assemble
from geodistill.models.pair import check_stage_pair
from geodistill.train.stage import Stage


class TrainingFailed(JobFailed):
    """A stage stopped on an error of a worker; the message is the worker's."""


def _last_line(error: BaseException) -> str:
    """The message of an error that Ray has wrapped, without its traceback."""
    cause = getattr(error, "cause", None) or error
    return str(cause).strip().splitlines()[-1]


REPORTING = ("log_every", "validate_every", "checkpoint_every")  # may differ between two runs of the same command
REMEDIES = ("train.learning_rate", "train.max_grad_norm")  # may be lowered to go on after a loss that was not finite


def settings_of(config: Config, stage: Stage) -> dict:
    """What decides the outcome of a stage, weights included: it is skipped or resumed only where this is the same."""
    train = {k: v for k, v in asdict(stage.train).items() if k not in REPORTING}
    model = getattr(config, stage.role).model
    found = {"seed": config.seed, "system": config.system, "train": train, "model": asdict(model)}
    found["data"] = {k: v for k, v in asdict(config.data).items() if k not in ("shards", "name")}
    splits = {*stage.train.splits, "val", *(config.distill.pretrain_splits if stage.train.method == "distill" else ())}
    manifest = load_manifest(config.data.shards)["splits"]
    found["shards"] = [shard["sha256"] for split in sorted(splits & manifest.keys()) for shard in manifest[split]["shards"]]
    found["cluster"] = {key: getattr(config.cluster, key) for key in ("workers", "precision", "zero_stage")}
    if config.image_size:
        found["image_size"] = config.image_size
    if stage.teacher:
        found["teacher_bits"] = config.distill.teacher_bits
    loss = asdict(config.distill.loss)
    if stage.train.method == "distill":
        found["loss"] = loss
    elif stage.train.method == "kd":
        found["loss"] = {k: v for k, v in loss.items() if k.startswith("kd_")}
    weights = {"teacher": stage.teacher, "start": stage.weights, "init": model.init, "tower": model.tower}
    found["weights"] = {name: assemble.weights_digest(folder) for name, folder in weights.items() if folder}
    here = str(Path.cwd()) + "/"  # a project folder may be moved
    return json.loads(json.dumps(found).replace(here, ""))


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _need_same(folder: Path, was: str, old: dict, new: dict, free: tuple[str, ...] = ()) -> None:
    before, now = _flatten(old), _flatten(new)
    # keys that an earlier version did not know say nothing where they are at their default
    defaults = {f"train.{k}": v for k, v in _flatten(asdict(TrainConfig())).items()}
    defaults |= {f"model.{k}": v for k, v in _flatten(asdict(ModelConfig())).items()}
    before = {k: v for k, v in defaults.items() if k in now} | before
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and k not in free]
    if changed:
        shown = "; ".join(f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in changed[:3])
        raise ValueError(f"{folder} was {was} with other settings ({shown}); choose another run=FOLDER, or delete that folder")


def is_finished(folder: Path, settings: dict) -> bool:
    """Whether `folder` holds a finished stage of the same settings.

    Raises ValueError, with the remedy, if it was finished, or begun, with other ones.
    """
    done, begun = folder / "done.json", folder / "settings.json"
    if done.is_file():
        _need_same(folder, "finished", json.loads(done.read_text())["settings"], settings)
        return True
    if begun.is_file() and (folder / "checkpoints").exists():
        _need_same(folder, "begun", json.loads(begun.read_text()), settings, REMEDIES)
    return False


def check_resources(config: Config) -> None:
    """Raise ValueError where Ray could only wait for ever: fewer CPUs or GPUs than workers and data tasks need."""
    cluster, have = config.cluster, ray.cluster_resources()
    need = {"CPU": cluster.workers * cluster.cpus_per_worker + 0.5, "GPU": cluster.workers if cluster.use_gpu else 0}
    for kind, amount in need.items():
        if have.get(kind, 0) < amount:
            raise ValueError(
                f"cluster.workers={cluster.workers} needs {amount:g} {kind}s (0.5 CPU of it for data), but this Ray has "
                f"{have.get(kind, 0):g}; lower cluster.workers, cluster.cpus_per_worker or set cluster.use_gpu=false"
            )


def check_stage(config: Config, stage: Stage) -> None:
    """Raise ValueError for data, folders or a pair of models that cannot work, before a worker starts or a weight is loaded."""
    manifest = load_manifest(config.data.shards, [*stage.train.splits, "val"])
    if stage.train.method == "distill" and config.distill.loss.pretrain > 0:
        load_manifest(config.data.shards, config.distill.pretrain_splits)
    if config.features and not stage.train.blind:
        load_features(config.features)
    per_group = manifest["settings"]["images_per_group"]
    if stage.train.images_per_micro_batch % per_group:
        raise ValueError(
            f"images_per_micro_batch={stage.train.images_per_micro_batch} of {stage.name} must be a multiple of {per_group}, "
            f"the images_per_group that {config.data.shards} was made with"
        )
    check_stage_pair(config, stage)


def fit(config: Config, stage: Stage) -> None:
    """Train one stage to its end. Raises ValueError for what the user can mend, TrainingFailed for what broke on the way."""
    folder = Path(stage.folder)
    config = replace(config, data=replace(config.data, shards=stage.train.shards or config.data.shards))
    check_stage(config, stage)
    settings = settings_of(config, stage)
    if is_finished(folder, settings):
        print(f"[{stage.name}] finished before, in {folder}", flush=True)
        return
    check_resources(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings, indent=1))
    save(config, folder / "config.yaml")
    began = time.time()
    cluster = config.cluster

    def work(job: dict) -> None:  # imports in the workers alone: Ray's controller would wait for transformers too
        from geodistill.train.loop import worker

        worker(job)

    trainer = TorchTrainer(
        work,
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
