"""fit: one training stage as a Ray TorchTrainer, skipped where it is finished, resumed where it was interrupted."""

import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from pyarrow.fs import FileType
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchTrainer

from geodistill.cli import JobFailed, JobStopped
from geodistill.cluster import Nodes, need, places, total
from geodistill.config import ClusterConfig, Config, ModelConfig, TrainConfig, as_yaml
from geodistill.data.features import load_features
from geodistill.data.files import exists, located, open_folder, read_json, write_json, write_text
from geodistill.data.shards import load_manifest
from geodistill.models import assemble
from geodistill.models.pair import check_stage_pair
from geodistill.train.checkpoint import newest_step
from geodistill.train.notice import notice_of_sigterm
from geodistill.train.stage import Stage, checkpoints_of, on_shards


class TrainingFailed(JobFailed):
    """A stage stopped on an error of a worker; the message is the worker's."""


# may differ between two runs of the same command
REPORTING = ("log_every", "validate_every", "checkpoint_every", "keep_checkpoints")
REMEDIES = ("train.learning_rate", "train.max_grad_norm")  # may be lowered to go on after a loss that was not finite


def settings_of(config: Config, stage: Stage) -> dict:
    """What decides the outcome of a stage, weights included: it is skipped or resumed only where this is the same."""
    train = {k: v for k, v in asdict(stage.train).items() if k not in REPORTING}
    model = getattr(config, stage.role).model
    found = {"seed": config.seed, "system": config.system, "train": train, "model": asdict(model)}
    found["data"] = {k: v for k, v in asdict(config.data).items() if k not in ("shards", "name")}
    on_policy, distill = stage.train.method == "distill", config.distill
    splits = {*stage.train.splits, "val", *(distill.pretrain_splits if on_policy and not distill.pretrain_shards else ())}
    found["shards"] = _digests(config.data.shards, splits)
    if on_policy and distill.pretrain_shards:
        found["pretrain_shards"] = _digests(distill.pretrain_shards, set(distill.pretrain_splits))
    found["cluster"] = {"precision": config.cluster.precision}  # not workers and zero_stage: they learn the same
    if config.image_size:
        found["image_size"] = config.image_size
    if stage.teacher:
        found["teacher_bits"] = config.distill.teacher_bits
    loss = asdict(config.distill.loss)
    if on_policy:
        found["loss"] = {k: v for k, v in loss.items() if k != "gkd_beta" or loss["preset"] == "gkd"}
    elif stage.train.method == "kd":
        found["loss"] = {k: v for k, v in loss.items() if k.startswith("kd_")}
    weights = {"teacher": stage.teacher, "start": stage.weights, "init": model.init, "tower": model.tower}
    found["weights"] = {name: assemble.weights_digest(folder) for name, folder in weights.items() if folder}
    here = str(Path.cwd()) + "/"  # a project folder may be moved
    return json.loads(json.dumps(found).replace(here, ""))


def _digests(shards: str, splits: set[str]) -> list[str]:
    """Of every shard of those splits that are there."""
    found = load_manifest(shards)["splits"]
    return [shard["sha256"] for split in sorted(splits & found.keys()) for shard in found[split]["shards"]]


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _need_same(folder: str, was: str, old: dict, new: dict, free: tuple[str, ...] = ()) -> None:
    before, now = _flatten(old), _flatten(new)
    # keys that an earlier version did not know say nothing where they are at their default
    defaults = {f"train.{k}": v for k, v in _flatten(asdict(TrainConfig())).items()}
    defaults |= {f"model.{k}": v for k, v in _flatten(asdict(ModelConfig())).items()}
    before = {k: v for k, v in defaults.items() if k in now} | before
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and k not in free]
    if changed:
        shown = "; ".join(f"{k}: {before.get(k)!r:.80} -> {now.get(k)!r:.80}" for k in changed[:3])
        raise ValueError(f"{folder} was {was} with other settings ({shown}); choose another run=FOLDER, or delete that folder")
    for key in free:
        if before.get(key) != now.get(key):
            print(f"{folder} goes on with another {key.removeprefix('train.')}: {before.get(key)} -> {now.get(key)}", flush=True)


def is_finished(folder: str, settings: dict) -> bool:
    """Whether `folder` holds a finished stage of the same settings, with its model.

    Raises ValueError, with the remedy, if it was finished, or begun, with other ones.
    """
    files = open_folder(folder)
    if exists(files, "done.json"):
        _need_same(folder, "finished", read_json(files, "done.json")["settings"], settings)
        return exists(files, "model/config.json")
    if exists(files, "settings.json") and files.get_file_info("ray").type == FileType.Directory:
        _need_same(folder, "begun", read_json(files, "settings.json"), settings, REMEDIES)
    return False


def resources_of_worker(cluster: ClusterConfig) -> dict[str, float]:
    """What Ray reserves for a worker."""
    return {"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.use_gpu else {})}


def workers_that_fit(cluster: ClusterConfig, train: TrainConfig, nodes: Nodes) -> int:
    """The most workers, from cluster.min_workers (0: all) to cluster.workers, that `nodes` hold beside half a CPU for data, and
    among whom the micro-batches of a step can be divided; 0 where there are none."""
    room, cpus = places(nodes, cluster.cpus_per_worker, cluster.use_gpu), total(nodes, "CPU")
    for workers in range(cluster.workers, (cluster.min_workers or cluster.workers) - 1, -1):
        enough = workers <= room and cpus >= workers * cluster.cpus_per_worker + 0.5
        if enough and train.images_per_step % (train.images_per_micro_batch * workers) == 0:
            return workers
    return 0


def lacking(cluster: ClusterConfig, nodes: Nodes) -> str:
    """What is told where no number of workers fits."""
    least = cluster.min_workers or cluster.workers
    needed = f"{least * cluster.cpus_per_worker + 0.5:g} CPUs (0.5 CPU of it for data)"
    needed += f" and {least} GPUs" if cluster.use_gpu else ""
    have = f"{total(nodes, 'CPU'):g} CPUs and {total(nodes, 'GPU'):g} GPUs"
    have += f", on {len(nodes)} nodes with room for {places(nodes, cluster.cpus_per_worker, cluster.use_gpu)} such workers"
    return (
        f"cluster.workers={cluster.workers} needs at least {needed}, but this Ray has {have}; lower cluster.workers, "
        "cluster.cpus_per_worker or set cluster.use_gpu=false"
    )


def bundles_of(cluster: ClusterConfig) -> list[dict[str, float]]:
    """What a stage asks an autoscaler for."""
    return [resources_of_worker(cluster)] * cluster.workers + [{"CPU": 0.5}]


def workers_of(config: Config, stage: Stage, told: threading.Event, again: bool = False) -> int:
    """The number of workers to begin with, or to go on with after a failure, once nodes have them: waits up to cluster.wait.
    Raises ValueError where they do not come, JobStopped where `told` is set."""
    cluster = config.cluster
    arguments = partial(workers_that_fit, cluster, stage.train), partial(lacking, cluster), bundles_of(cluster), cluster.wait
    workers = need(stage.name, *arguments, told, again)
    if not workers:
        raise JobStopped(f"[{stage.name}] stopped while it waited for nodes; run the same command again to go on")
    if workers < cluster.workers:
        print(f"[{stage.name}] goes on with {workers} of {cluster.workers} workers", flush=True)
    return workers


def check_stage(config: Config, stage: Stage) -> None:
    """Raise ValueError for data, folders or a pair of models that cannot work, before a worker starts or a weight is loaded."""
    check_shards(config, stage)
    if config.features and not stage.train.blind:
        load_features(config.features)
    check_stage_pair(config, stage)


def check_shards(config: Config, stage: Stage) -> None:
    """Raise ValueError for prepared data that a stage cannot learn from."""
    shards = stage.train.shards or config.data.shards
    needed = [(shards, [*stage.train.splits, "val"])]
    if stage.train.method == "distill" and config.distill.loss.pretrain > 0:
        needed.append((config.distill.pretrain_shards or shards, config.distill.pretrain_splits))
    for folder, splits in needed:
        per_group = load_manifest(folder, splits)["settings"]["images_per_group"]
        if stage.train.images_per_micro_batch % per_group:
            raise ValueError(
                f"images_per_micro_batch={stage.train.images_per_micro_batch} of {stage.name} must be a multiple of {per_group}, "
                f"the images_per_group that {folder} was made with"
            )


def fit(
    config: Config,
    stage: Stage,
    work: Callable[[dict], dict] | None = None,
    callbacks: Sequence[UserCallback] = (),
    turn: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Train one stage to its end, on fewer workers and again where some are lost (cluster.min_workers, cluster.max_failures).

    work: what every worker runs in place of loop.worker (faults are injected through it); callbacks: Ray Train's, of what workers
    report at each validation; turn: what is held while there are workers, where others want them too. Raises ValueError for what
    the user can mend, TrainingFailed for what broke on the way, JobStopped after SIGTERM.
    """
    config = on_shards(config, stage.train.shards)
    check_stage(config, stage)
    settings = settings_of(config, stage)
    if is_finished(stage.folder, settings):
        print(f"[{stage.name}] finished before, in {stage.folder}", flush=True)
        return
    with notice_of_sigterm() as (notice, told):
        workers = workers_of(config, stage, told)
        files = open_folder(stage.folder, create=True)
        write_json(files, "settings.json", settings)
        write_text(files, "config.yaml", as_yaml(config))
        where = checkpoints_of(config, stage)
        kept = {k: v for k, v in _flatten(settings).items() if k not in REMEDIES}
        identity = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        began, at, failures = time.time(), newest_step(where), 0
        while True:
            try:
                with turn():
                    if failures or turn is not nullcontext:  # nodes may have gone meanwhile
                        workers = workers_of(config, stage, told, again=True)
                    step = _attempt(config, stage, identity, workers, work or _worker, notice, callbacks)["step"]
                break
            except TrainingFailedError as error:
                reason = reason_of(error)
                now = newest_step(where)
                failures = 1 if now > at else failures + 1
                at = now
                if told.is_set() and not _is_ours(reason):
                    raise _stopped(stage, at) from error
                limit = retries(reason, config.cluster.max_failures)
                said = f"[{stage.name}] {_last_line(reason).removeprefix(f'[{stage.name}] ')}"
                if failures > limit:
                    raise TrainingFailed(said) from error
                print(
                    f"{said} - goes on from step {at} (failure {failures} of {limit} without a new checkpoint)",
                    flush=True,
                )
                print(f"[{stage.name}] waits up to {config.cluster.wait:.0f} s for workers", flush=True)
    if step < stage.train.steps:
        raise _stopped(stage, step)
    seconds = time.time() - began
    write_json(files, "done.json", {"seconds": seconds, "settings": settings})
    print(f"[{stage.name}] done in {seconds:.0f} s: {stage.folder}/model", flush=True)
    if told.is_set():
        raise JobStopped(f"[{stage.name}] was done when SIGTERM came; run the same command again for what comes next")


def _stopped(stage: Stage, step: int) -> JobStopped:
    return JobStopped(f"[{stage.name}] stopped at step {step} of {stage.train.steps}; run the same command again to go on")


def _worker(job: dict) -> dict:
    from geodistill.train.loop import worker  # in the workers alone: Ray's controller would wait for transformers too

    return worker(job)


def _attempt(config: Config, stage: Stage, identity: str, workers: int, work: Callable[[dict], dict], notice, callbacks) -> dict:
    """What rank 0 returns. identity: a digest of what decides the outcome, in which a checkpoint must agree."""
    cluster = config.cluster
    config = replace(config, cluster=replace(cluster, workers=workers))
    # the reference is in a list, or Ray would wait for it before the workers start
    job = {"config": config, "stage": stage, "identity": identity, "notice": [notice.wait.remote()]}
    files, path = located(stage.folder)
    trainer = TorchTrainer(
        cast(Callable, work),
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker=resources_of_worker(cluster),
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=files,
            callbacks=list(callbacks),
            # `fit` begins again itself, perhaps with fewer
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),  # type: ignore[call-arg]
        ),
    )
    try:
        with _ctrl_c_kept():
            return cast(Any, trainer.fit()).return_value
    except SystemExit as error:  # of Ray Train's handler of Ctrl-C, when the workers are gone
        raise KeyboardInterrupt from error


@contextmanager
def _ctrl_c_kept() -> Iterator[None]:
    """Behind it Ctrl-C does again what it did: Ray Train leaves a handler of its own, for which nothing stops any more."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # Python has signals for the main thread alone
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)  # None: not Python's


def reason_of(error: BaseException) -> BaseException:
    """What stopped the workers: of several errors one of ours, for a worker whose neighbour is gone fails as well."""
    causes = [getattr(cause, "_base_exc", cause) for cause in (getattr(error, "worker_failures", None) or {0: error}).values()]
    return next((cause for cause in causes if _is_ours(cause)), causes[0])


def _is_ours(cause: BaseException) -> bool:
    if isinstance(cause, (ConnectionError, TimeoutError)):  # a neighbour or the network is gone
        return False
    return isinstance(cause, (ValueError, OSError)) or type(cause).__name__ == "NotFinite"


def retries(reason: BaseException, limit: int) -> int:
    """How often in a row, without a new checkpoint, a stage begins again after `reason`: not after an error that comes back, once
    after a figure that was not finite (a machine may have erred), else `limit` times."""
    if type(reason).__name__ == "NotFinite":
        return min(1, limit)
    return 0 if _is_ours(reason) else limit


def _last_line(error: BaseException) -> str:
    if isinstance(error, ray.exceptions.RayActorError):
        return "a worker died: it was killed, ran out of memory, or its node was lost"
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
