"""fit: one training stage as a Ray TorchTrainer, skipped where it is finished, resumed where it was interrupted."""

import asyncio
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import ray
from pyarrow.fs import FileType
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from geodistill.cli import JobFailed, JobStopped
from geodistill.cluster import can_grow, wait_for
from geodistill.config import ClusterConfig, Config, ModelConfig, TrainConfig, as_yaml
from geodistill.data.features import load_features
from geodistill.data.files import exists, located, open_folder, read_json, write_json, write_text
from geodistill.data.shards import load_manifest
from geodistill.models import assemble
from geodistill.models.pair import check_stage_pair
from geodistill.train.checkpoint import newest_step
from geodistill.train.stage import Stage, checkpoints_of


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
    splits = {*stage.train.splits, "val", *(config.distill.pretrain_splits if stage.train.method == "distill" else ())}
    manifest = load_manifest(config.data.shards)["splits"]
    found["shards"] = [shard["sha256"] for split in sorted(splits & manifest.keys()) for shard in manifest[split]["shards"]]
    found["cluster"] = {"precision": config.cluster.precision}  # not workers and zero_stage: they learn the same
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


def _need_same(folder: str, was: str, old: dict, new: dict, free: tuple[str, ...] = ()) -> None:
    before, now = _flatten(old), _flatten(new)
    # keys that an earlier version did not know say nothing where they are at their default
    defaults = {f"train.{k}": v for k, v in _flatten(asdict(TrainConfig())).items()}
    defaults |= {f"model.{k}": v for k, v in _flatten(asdict(ModelConfig())).items()}
    before = {k: v for k, v in defaults.items() if k in now} | before
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and k not in free]
    if changed:
        shown = "; ".join(f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in changed[:3])
        raise ValueError(f"{folder} was {was} with other settings ({shown}); choose another run=FOLDER, or delete that folder")


def is_finished(folder: str, settings: dict) -> bool:
    """Whether `folder` holds a finished stage of the same settings.

    Raises ValueError, with the remedy, if it was finished, or begun, with other ones.
    """
    files = open_folder(folder)
    if exists(files, "done.json"):
        _need_same(folder, "finished", read_json(files, "done.json")["settings"], settings)
        return True
    if exists(files, "settings.json") and files.get_file_info("ray").type == FileType.Directory:
        _need_same(folder, "begun", read_json(files, "settings.json"), settings, REMEDIES)
    return False


def resources_of_worker(cluster: ClusterConfig) -> dict[str, float]:
    """What Ray reserves for a worker."""
    return {"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.use_gpu else {})}


def workers_that_fit(cluster: ClusterConfig, train: TrainConfig, have: dict[str, float]) -> int:
    """The most workers, from cluster.min_workers (0: all) to cluster.workers, that the resources `have` hold beside half a CPU
    for data, and among whom the micro-batches of a step can be divided; 0 where there are none."""
    for workers in range(cluster.workers, (cluster.min_workers or cluster.workers) - 1, -1):
        enough = have.get("CPU", 0) >= workers * cluster.cpus_per_worker + 0.5
        enough &= not cluster.use_gpu or have.get("GPU", 0) >= workers
        if enough and train.images_per_step % (train.images_per_micro_batch * workers) == 0:
            return workers
    return 0


def check_resources(config: Config, train: TrainConfig) -> int:
    """The number of workers to begin with. Raises ValueError where Ray would wait for nodes."""
    cluster, have = config.cluster, ray.cluster_resources()
    workers = workers_that_fit(cluster, train, have)
    if workers == 0:
        least = cluster.min_workers or cluster.workers
        need = f"{least * cluster.cpus_per_worker + 0.5:g} CPUs (0.5 CPU of it for data)"
        need += f" and {least} GPUs" if cluster.use_gpu else ""
        raise ValueError(
            f"cluster.workers={cluster.workers} needs at least {need}, but this Ray has {have.get('CPU', 0):g} "
            f"CPUs and {have.get('GPU', 0):g} GPUs; lower cluster.workers, cluster.cpus_per_worker or set cluster.use_gpu=false"
        )
    return workers


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


class Notice:
    """An actor that tells the workers of a stage that it shall stop."""

    def __init__(self) -> None:
        self.given = asyncio.Event()

    async def give(self) -> None:
        self.given.set()

    async def wait(self) -> None:
        await self.given.wait()


@contextmanager
def _stop_at_sigterm(notice) -> Iterator[None]:
    """Inside: SIGTERM to this process has the workers make a checkpoint and stop, in place of ending the process at once."""
    if threading.current_thread() is not threading.main_thread():  # Python has signals for the main thread alone
        yield
        return
    told, ended = threading.Event(), threading.Event()

    def tell() -> None:
        told.wait()
        if not ended.is_set():
            print("SIGTERM: the workers make a checkpoint and stop", flush=True)
            notice.give.remote()

    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: not Python's
        ended.set()
        told.set()
        teller.join()


def fit(config: Config, stage: Stage, work: Callable[[dict], dict] | None = None, callbacks: Sequence[UserCallback] = ()) -> None:
    """Train one stage to its end, on fewer workers and again where some are lost (cluster.min_workers, cluster.max_failures).

    work: what every worker runs in place of loop.worker (faults are injected through it); callbacks: Ray Train's, of what workers
    report at each validation. Raises ValueError for what the user can mend, TrainingFailed for what broke on the way, JobStopped
    after SIGTERM.
    """
    config = replace(config, data=replace(config.data, shards=stage.train.shards or config.data.shards))
    check_stage(config, stage)
    settings = settings_of(config, stage)
    if is_finished(stage.folder, settings):
        print(f"[{stage.name}] finished before, in {stage.folder}", flush=True)
        return
    try:
        workers = check_resources(config, stage.train)
    except ValueError as lacks:
        if not can_grow():
            raise
        print(f"[{stage.name}] {lacks}; until then it waits, up to {config.cluster.wait:.0f} s, for nodes that join", flush=True)
        workers = _wait_for_workers(config, stage)
    files = open_folder(stage.folder, create=True)
    write_json(files, "settings.json", settings)
    write_text(files, "config.yaml", as_yaml(config))
    where = checkpoints_of(config, stage)
    kept = {k: v for k, v in _flatten(settings).items() if k not in REMEDIES}
    identity = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    began, at, failures = time.time(), newest_step(where), 0
    # on the node of this process: what a lost node held would be taken for the notice
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    notice = ray.remote(Notice).options(num_cpus=0, scheduling_strategy=here).remote()
    with _stop_at_sigterm(notice):
        while True:
            try:
                step = _attempt(config, stage, identity, workers, work or _worker, notice, callbacks)["step"]
                break
            except TrainingFailedError as error:
                reason = reason_of(error)
                now = newest_step(where)
                failures = 1 if now > at else failures + 1
                at = now
                limit = retries(reason, config.cluster.max_failures)
                told = f"[{stage.name}] {_last_line(reason).removeprefix(f'[{stage.name}] ')}"
                if failures > limit:
                    raise TrainingFailed(told) from error
                print(
                    f"{told} - goes on from step {at} (failure {failures} of {limit} without a new checkpoint)",
                    flush=True,
                )
                print(f"[{stage.name}] waits up to {config.cluster.wait:.0f} s for workers", flush=True)
                workers = _wait_for_workers(config, stage)
    if step < stage.train.steps:
        raise JobStopped(f"[{stage.name}] stopped at step {step} of {stage.train.steps}; run the same command again to go on")
    seconds = time.time() - began
    write_json(files, "done.json", {"seconds": seconds, "settings": settings})
    print(f"[{stage.name}] done in {seconds:.0f} s: {stage.folder}/model", flush=True)


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
    return cast(Any, trainer.fit()).return_value


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


def _wait_for_workers(config: Config, stage: Stage) -> int:
    """The number of workers to go on with, once nodes have them; waits up to cluster.wait seconds. Raises ValueError."""
    cluster = config.cluster
    bundles = [resources_of_worker(cluster)] * cluster.workers
    workers = wait_for(lambda have: workers_that_fit(cluster, stage.train, have), bundles, cluster.wait)
    if not workers:
        return check_resources(config, stage.train)
    if workers < config.cluster.workers:
        print(f"[{stage.name}] goes on with {workers} of {config.cluster.workers} workers", flush=True)
    return workers
