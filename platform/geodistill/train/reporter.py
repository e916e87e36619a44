"""What a training stage is, and what it tells: metrics.jsonl, TensorBoard, and a line of progress with rate and time left."""

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tensorboardX import SummaryWriter
from torch import Tensor

from geodistill.config import TrainConfig
from geodistill.train.checkpoint import Progress


@dataclass
class Stage:
    """One training stage: what is trained on what, and where it is written."""

    name: str
    folder: str  # model/, checkpoints/, metrics.jsonl, ...
    train: TrainConfig
    role: str  # "teacher" or "student": whose model settings hold
    weights: str  # folder of the model to go on from; "" = model.init, or random
    teacher: str  # folder of the frozen teacher; "" = none
    keep_best: bool  # the model is the one of the lowest validation loss, not the last


class Reporter:
    """Means over tokens and workers; metrics.jsonl, TensorBoard, and a line of progress with rate and time left."""

    def __init__(self, stage: Stage, start: Progress, rank: int, device: torch.device):
        self.stage, self.rank, self.device = stage, rank, device
        self.spent, self.began = start.seconds, time.time()
        self.sums: dict[str, Tensor] = {}
        self.waited, self.set_aside = 0.0, 0
        self.last = (start.step, time.time())
        if rank == 0:
            path = Path(stage.folder) / "metrics.jsonl"
            kept = path.read_text().splitlines() if path.exists() else []
            path.write_text("".join(line + "\n" for line in kept if json.loads(line)["step"] <= start.step))
            self.file = path.open("a")
            self.board = SummaryWriter(str(Path(stage.folder) / "tensorboard"), purge_step=start.step)

    @property
    def seconds(self) -> float:
        return self.spent + time.time() - self.began

    def add(self, sums: dict[str, Tensor], count: float) -> None:
        """Sums over `count` things (tokens, branches, images, updates) of this worker."""
        for name, value in sums.items():
            pair = torch.stack(
                [torch.as_tensor(value, dtype=torch.float64).cpu(), torch.tensor(float(count), dtype=torch.float64)]
            )
            self.sums[name] = self.sums.get(name, torch.zeros(2, dtype=torch.float64)) + pair

    def reject(self, reasons: list[str]) -> None:
        """Count what the stream set aside on this worker; say the first one."""
        if reasons and not self.set_aside:
            print(f"[{self.stage.name}] set aside: {reasons[0]} (further ones are counted as set_aside)", flush=True)
        self.set_aside += len(reasons)

    def flush(self, step: int, extra: dict[str, float]) -> None:
        """Average over all workers (collective), write and print."""
        names = sorted(self.sums)
        values = torch.stack([self.sums[name] for name in names]).to(self.device)
        dist.all_reduce(values)
        row = {"step": step, **{k: (v[0] / v[1].clamp(min=1)).item() for k, v in zip(names, values, strict=True)}, **extra}
        seconds, steps = time.time() - self.last[1], step - self.last[0]
        row["images_per_second"] = self.stage.train.images_per_step * steps / seconds
        row["data_wait"] = self.waited / seconds
        row["seconds"] = self.seconds
        row["set_aside"] = self.set_aside
        gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row["peak_memory_gib"] = peak / 2**30
        self.sums, self.waited, self.last = {}, 0.0, (step, time.time())
        if self.rank == 0:
            left = (self.stage.train.steps - step) * seconds / max(steps, 1)
            shown = [f"{k} {row[k]:.3f}" for k in ("loss", "reverse_kl", "reward", "length", "agreement") if k in row]
            rate = f"{row['images_per_second']:.0f} images/s, data wait {100 * row['data_wait']:.0f} %"
            print(
                f"[{self.stage.name}] {step}/{self.stage.train.steps} {' '.join(shown)} | {rate}, {_clock(left)} left", flush=True
            )
        self.write(row)

    def write(self, row: dict[str, float]) -> None:
        if self.rank == 0:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(f"{self.stage.name}/{name}", value, row["step"])
            self.board.flush()


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60)} s" if seconds >= 60 else f"{int(seconds)} s"
