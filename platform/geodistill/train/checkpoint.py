"""Checkpoints: all that a resume needs, exactly, on a local disk or s3://, for any number of workers and any ZeRO stage.

FOLDER/step-000100/
  part-00000.safetensors   of every world-th trained parameter: its weight and AdamW's moments, whole and in float32
  part-00000.json          its sha256 and contents; progress; this worker's random state and sums since the last line of metrics

Every worker writes a part, first the tensors, then the JSON: a checkpoint without the JSON of all its parts was not finished, and
does not count. What decides a step beside the weights follows from the seed and the step (loop.py): the order of the data, the
sampled tokens, dropout, the learning rate. A loss scaler does not exist: float32 and bf16 alone.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from pyarrow import fs
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geodistill.data.files import open_folder, read_json, retried, write_json
from geodistill.train import engine as engines


@dataclass
class Progress:
    """Where a run stands. step: updates made; best: lowest validation loss so far; last: the latest one; seconds: time spent."""

    step: int = 0
    best: float = float("inf")
    last: float = float("inf")
    seconds: float = 0.0


@dataclass
class Resume:
    """What a checkpoint gives back beside the engine's state; `metrics` is the Reporter's own, of one worker."""

    progress: Progress = field(default_factory=Progress)
    metrics: dict = field(default_factory=dict)


class CheckpointFailed(OSError):
    """A checkpoint could not be written; the message says why, and which one is kept."""


class Damaged(ValueError):
    """A checkpoint whose files are not those that were written."""


class Checkpoints:
    """The checkpoints of one stage, of one worker among `world`. Every public method is collective."""

    def __init__(self, folder: str, identity: str, name: str, rank: int, world: int, device: torch.device, keep: int):
        """identity: a digest of the settings that decide the outcome; name: of the stage, for messages; keep: how many."""
        self.folder, self.identity, self.name = folder, identity, name
        self.rank, self.world, self.device, self.keep = rank, world, device, keep
        self.files = open_folder(folder, create=True)
        self.writer = ThreadPoolExecutor(1)
        self.under_way: tuple[int, Future] | None = None
        self.whole: dict[int, float] = {}  # step -> validation loss of what is whole in storage

    @property
    def newest(self) -> int:
        """The step of the newest checkpoint, be it still on its way; 0: there is none."""
        return self.under_way[0] if self.under_way else max(self.whole, default=0)

    def save(self, engine, progress: Progress, metrics: dict) -> None:
        """Copy the state; write it while training goes on, after the checkpoint before it is whole.

        Raises CheckpointFailed, on all workers, where that one could not be written or there is no room for this one.
        """
        self.wait()
        tensors: dict[str, Tensor] = {}
        names = engines.trainable(engine)
        for place, (name, parameter) in enumerate(names.items()):
            state = engines.read_state(engine, parameter)
            if place % self.world == self.rank:
                tensors |= {f"{key}/{name}": value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
        self._need_room(progress.step, sum(value.numel() * value.element_size() for value in tensors.values()))
        about = {
            "world": self.world,
            "identity": self.identity,
            "progress": asdict(progress),
            "optimizer_steps": engines.steps_of(engine),
            "contents": {name: list(value.shape) for name, value in tensors.items()},
            "metrics": metrics,
            "random": _random_state(self.device),
        }
        self.under_way = progress.step, self.writer.submit(self._write, progress.step, tensors, about)

    def wait(self) -> None:
        """Until the checkpoint under way is whole; then older ones than the last `keep` go, but the best by validation loss.

        Raises CheckpointFailed, on all workers, where a worker could not write its part.
        """
        if self.under_way is None:
            return
        (step, written), self.under_way = self.under_way, None
        error, value = None, float("inf")
        try:
            value = written.result()
        except (OSError, SafetensorError) as found:
            error = f"worker {self.rank}: {found}"
        errors: list[str | None] = [None] * self.world
        dist.all_gather_object(errors, error)
        self._need_none(step, errors)
        self.whole[step] = value
        best = min(self.whole, key=lambda at: (self.whole[at], at))
        for old in set(sorted(self.whole)[: -self.keep]) - {best}:
            del self.whole[old]
            if self.rank == 0:
                retried(lambda: self.files.delete_dir(_folder(old)))  # noqa: B023 - called at once

    @property
    def failed(self) -> bool:
        """Is it known that this worker could not write its part? (not collective; wait says why, on all workers)"""
        return self.under_way is not None and self.under_way[1].done() and self.under_way[1].exception() is not None

    def restore(self, engine) -> Resume:
        """Load the latest checkpoint that is whole and undamaged into the engine; without any, a run starts at step 0.

        One that is damaged is named and passed over. What is newer than the one that is loaded, or was not finished, is deleted.
        Raises ValueError where all are damaged, where they are of a run with other settings, or where the keys or shapes are not
        exactly those that the engine trains.
        """
        found: list = [self._known() if self.rank == 0 else None]
        dist.broadcast_object_list(found, 0, device=self.device)
        known, unfinished, damaged = found[0]
        for text in damaged:
            self._say(f"set aside a checkpoint that is damaged: {text}")
        step = next((at for at in sorted(known, reverse=True) if self._load_whole(engine, at, known[at], damaged)), 0)
        if step == 0 and damaged:
            raise ValueError(
                f"[{self.name}] no checkpoint in {self.folder} can be read ({damaged[0]}); bring a copy back, or delete that "
                "folder to start at step 0"
            )
        dist.barrier()
        if self.rank == 0:
            for at in [*(at for at in known if at > step), *unfinished]:
                self.files.delete_dir(_folder(at))
        dist.barrier()
        if step == 0:
            return Resume()
        self.whole = {at: _progress(about[0]).last for at, about in known.items() if at <= step}
        self._say(f"goes on from the checkpoint of step {step}")
        about = known[step]
        if len(about) == self.world:
            _set_random_state(about[self.rank]["random"], self.device)
            return Resume(_progress(about[0]), about[self.rank]["metrics"])
        # by another number of workers: rank 0 has all that was counted
        return Resume(_progress(about[0]), _added([part["metrics"] for part in about]) if self.rank == 0 else {})

    def _load_whole(self, engine, step: int, about: list[dict], damaged: list[str]) -> bool:
        """Load the checkpoint of `step` if its files are those that were written; else False, and why in `damaged`."""
        if any(part["identity"] != self.identity for part in about):
            raise ValueError(
                f"[{self.name}] {self.folder}/{_folder(step)} is of a run with other settings, data or models; choose another "
                "run=FOLDER or checkpoints=FOLDER, or delete that folder to start at step 0"
            )
        with tempfile.TemporaryDirectory() as folder:
            reason, parts = None, {}
            try:
                for part in range(self.rank, len(about), self.world):
                    parts[part] = self._fetch(step, part, about[part]["sha256"], Path(folder))
            except Damaged as error:
                reason = str(error)
            reasons: list[str | None] = [None] * self.world
            dist.all_gather_object(reasons, reason)
            wrong = [text for text in reasons if text]
            if wrong:
                damaged += wrong
                self._say(f"set aside a checkpoint that is damaged: {wrong[0]}")
                return False
            self._load(engine, about, parts, f"{self.folder}/{_folder(step)}")
            dist.barrier()  # nobody's folder goes before all have read
        return True

    def _need_none(self, step: int, errors: list[str | None]) -> None:
        """Raise CheckpointFailed where a worker could not write its part of `step`."""
        failed = [text for text in errors if text]
        if failed:
            kept = f"that of step {max(self.whole)} is kept" if self.whole else "there is none before it"
            raise CheckpointFailed(
                f"[{self.name}] the checkpoint of step {step} could not be written to {self.folder} ({failed[0]}); {kept}. "
                "Mend the storage (is it full?) and run the same command again: it goes on from there"
            )

    def _need_room(self, step: int, mine: int) -> None:
        """Raise CheckpointFailed, on all workers, where the disk has no room for the parts (collective).

        mine: bytes of this worker's part. A folder is one disk for all; what goes to an object store is written to a temporary
        file of the worker's node first.
        """
        here = tempfile.gettempdir() if "://" in self.folder else self.folder
        parts: list = [None] * self.world
        dist.all_gather_object(parts, (mine, shutil.disk_usage(here).free))
        errors: list[str | None] = []
        for rank, (need, free) in enumerate(parts):
            if "://" not in self.folder:  # rank 0 has just deleted the oldest one: the others may have looked before that
                need, free = sum(part for part, _ in parts), parts[0][1]
            told = f"worker {rank}: {here} has {free / 2**20:.0f} MiB left, and {need / 2**20:.0f} are needed"
            errors.append(told if need > free else None)
        self._need_none(step, errors)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{self.name}] {text}", flush=True)

    def _write(self, step: int, tensors: dict[str, Tensor], about: dict) -> float:
        """This worker's part, retried; returns the validation loss that decides which checkpoint is best."""
        part = f"{_folder(step)}/part-{self.rank:05d}"
        self.files.create_dir(_folder(step))
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder) / "part.safetensors"
            local = Path(self.folder) / f"{part}.safetensors" if "://" not in self.folder else here
            save_file(tensors, local)
            with local.open("rb") as file:
                about["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            if local == here:
                retried(lambda: fs.copy_files(str(here), f"{part}.safetensors", fs.LocalFileSystem(), self.files))
        about = json.loads(json.dumps(about))  # as it will be read
        write_json(self.files, f"{part}.json", {**about, "digest": _digest(about)})
        return about["progress"]["last"]

    def _known(self) -> tuple[dict[int, list[dict]], list[int], list[str]]:
        """(step -> what its parts say, of what is whole; steps that are not; what is wrong with those whose JSON is damaged)."""
        known, unfinished, damaged = {}, [], []
        for found in self.files.get_file_info(fs.FileSelector("")):
            if found.type != fs.FileType.Directory or not found.base_name.startswith("step-"):
                continue
            step, parts = int(found.base_name.removeprefix("step-")), list[dict]()
            names = {file.base_name for file in self.files.get_file_info(fs.FileSelector(found.base_name))}
            try:
                while f"part-{len(parts):05d}.json" in names and (not parts or len(parts) < parts[0]["world"]):
                    parts.append(self._read(f"{found.base_name}/part-{len(parts):05d}.json"))
            except Damaged as error:
                damaged.append(str(error))
                parts = []
            if parts and len(parts) == parts[0]["world"]:
                known[step] = parts
            else:
                unfinished.append(step)
        return known, unfinished, damaged

    def _read(self, name: str) -> dict:
        try:
            about = read_json(self.files, name)
        except ValueError as error:
            raise Damaged(f"{self.folder}/{name} is not JSON") from error
        if "digest" in about and about.pop("digest") != _digest(about):  # earlier versions wrote none
            raise Damaged(f"{self.folder}/{name} says other things than were written")
        return about

    def _fetch(self, step: int, part: int, sha256: str, folder: Path) -> Path:
        """A local file with the tensors of a part; raises Damaged where it is not the one that was written."""
        name = f"{_folder(step)}/part-{part:05d}.safetensors"
        if not self.files.get_file_info(name).is_file:
            raise Damaged(f"{self.folder}/{name} is missing")
        local = Path(self.folder) / name
        if "://" in self.folder:
            local = folder / f"{part}.safetensors"
            retried(lambda: fs.copy_files(name, str(local), self.files, fs.LocalFileSystem()))
        with local.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise Damaged(f"{self.folder}/{name} has another sha256 than was written")
        return local

    def _load(self, engine, about: list[dict], parts: dict[int, Path], where: str) -> None:
        """Hand every tensor from the worker that read it to all."""
        names = engines.trainable(engine)
        _need_same({k: v for part in about for k, v in part["contents"].items()}, names, where)
        if about[0]["optimizer_steps"]:
            engines.begin_moments(engine, about[0]["optimizer_steps"])
        files = {part: safe_open(str(path), "pt") for part, path in parts.items()}
        for place, (name, parameter) in enumerate(names.items()):
            part = place % len(about)
            state = {}
            for key in ("weight", *engines.MOMENTS):
                if f"{key}/{name}" not in about[part]["contents"]:
                    continue
                if part in files:
                    value = files[part].get_tensor(f"{key}/{name}").to(self.device)
                else:
                    value = torch.empty(about[part]["contents"][f"{key}/{name}"], device=self.device)
                dist.broadcast(value, part % self.world)
                state[key] = value
            engines.write_state(engine, parameter, state)


def newest_step(folder: str) -> int:
    """The step of the newest checkpoint in `folder` whose first part was finished; 0 where there is none."""
    files = open_folder(folder)
    found = files.get_file_info(fs.FileSelector("", recursive=True, allow_not_found=True))
    steps = [Path(file.path).parent.name for file in found if file.base_name == "part-00000.json"]
    return max((int(step.removeprefix("step-")) for step in steps), default=0)


def _folder(step: int) -> str:
    return f"step-{step:06d}"


def _digest(about: dict) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _progress(part: dict) -> Progress:
    return Progress(**part["progress"])


def _need_same(contents: dict[str, list[int]], names: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError where a checkpoint's weights are not exactly those that are trained."""
    have = {key.removeprefix("weight/"): tuple(shape) for key, shape in contents.items() if key.startswith("weight/")}
    want = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in names.items()}
    missing, surplus = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    other = [name for name in want.keys() & have.keys() if want[name] != have[name]]
    if missing or surplus or other:
        lists = (("missing", missing), ("surplus", surplus), ("of another shape", other))
        told = "; ".join(f"{len(found)} {kind}, such as {found[0]}" for kind, found in lists if found)
        raise ValueError(
            f"{where} does not hold the weights that this run trains: {told}. It is of another model or another tuning; choose "
            "another run=FOLDER, or delete that folder to start at step 0"
        )


def _added(metrics: list[dict]) -> dict:
    """The Reporter's states of several workers as one: numbers and lists are added; "all" is alike on all workers."""
    found: dict = {}
    for one in metrics:
        for key, value in one.items():
            if key not in found or key == "all":
                found[key] = value
            elif isinstance(value, dict):
                found[key] = _added([found[key], value])
            elif isinstance(value, list) and value and isinstance(value[0], float):
                found[key] = [a + b for a, b in zip(found[key], value, strict=True)]
            else:
                found[key] = found[key] + value
    return found


def _random_state(device: torch.device) -> dict[str, str]:
    """torch's generators. No step draws from them, each has its seed; what a model's own code draws is repeated all the same."""
    found = {"cpu": bytes(torch.get_rng_state().numpy()).hex()}
    if device.type == "cuda":
        found["cuda"] = bytes(torch.cuda.get_rng_state(device).numpy()).hex()
    return found


def _set_random_state(state: dict[str, str], device: torch.device) -> None:
    for kind, text in state.items():
        value = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        torch.set_rng_state(value) if kind == "cpu" else torch.cuda.set_rng_state(value, device)
