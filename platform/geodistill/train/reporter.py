"""What a training stage tells: metrics.jsonl, TensorBoard, Prometheus, MLflow, a line of progress with rate and time left."""

import json
import resource
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from ray.util.metrics import Gauge
from tensorboardX import SummaryWriter
from torch import Tensor

from geodistill.config import Config
from geodistill.data.files import exists, open_folder, read_lines, read_text, upload, write_text
from geodistill.train.checkpoint import Resume
from geodistill.train.collapse import Watch
from geodistill.train.stage import Stage


class Reporter:
    """Means over tokens and workers, of the steps between two lines; rank 0 writes."""

    def __init__(self, config: Config, stage: Stage, resume: Resume, rank: int, device: torch.device):
        self.stage, self.rank, self.device = stage, rank, device
        start, kept = resume.progress, resume.metrics
        self.spent, self.began = start.seconds, time.time()
        self.sums = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in kept.get("sums", {}).items()}
        self.images, self.set_aside = kept.get("images", 0), set[str](kept.get("set_aside", []))
        self.waited, self.tokens = 0.0, 0.0  # response tokens that were learned from, over all workers, since the last line
        self.row: dict[str, float] = {}  # the last line of metrics of this process
        self.watch = Watch(kept.get("all", {}))
        self.gauges: dict[str, Gauge] = {}
        self.last = (start.step, time.time())
        if rank == 0:
            self.apart = tempfile.TemporaryDirectory() if "://" in stage.folder else None  # files of a store take no more lines
            self.folder = Path(self.apart.name if self.apart else stage.folder)
            self.published = time.time()
            files = open_folder(stage.folder)
            rows = [row for row in read_lines(files, "metrics.jsonl") if row["step"] <= start.step]
            write_text(open_folder(str(self.folder)), "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            for name in ("warnings.jsonl", "mlflow.txt"):
                if self.apart and exists(files, name):
                    (self.folder / name).write_text(read_text(files, name))
            self.file = (self.folder / "metrics.jsonl").open("a")
            self.mlflow = _mlflow(config, stage, start.step, self.folder / "mlflow.txt")
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start.step + 1)

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

    def state(self) -> dict:
        """What a resume needs, so that the next line of metrics is that of an unbroken run: sums since the last one."""
        sums = {name: pair.tolist() for name, pair in self.sums.items()}
        return {"sums": sums, "images": self.images, "set_aside": sorted(self.set_aside), "all": self.watch.state}

    def saw(self, ids: Sequence[str]) -> None:
        """Note the images that a step learns from: `images`, the sum of the CRC-32 of their names, tells whether two runs saw
        the same ones between two lines of metrics, whatever their workers."""
        self.images += sum(zlib.crc32(name.encode()) for name in ids)

    def reject(self, reasons: list[str]) -> None:
        """Count what the stream set aside on this worker; say the first one."""
        if reasons and not self.set_aside:
            print(f"[{self.stage.name}] set aside: {reasons[0]} (further ones are counted as set_aside)", flush=True)
        self.set_aside.update(reasons)  # not once an epoch

    def flush(self, step: int, extra: dict[str, float]) -> None:
        """Average over all workers (collective), write and print."""
        counts = {"set_aside": len(self.set_aside), "images": self.images}
        sums = {name: torch.tensor(float(count), dtype=torch.float64) for name, count in counts.items()}
        self.add(sums, 1 / dist.get_world_size())  # over all workers a sum, not a mean
        names = sorted(self.sums)
        values = torch.stack([self.sums[name] for name in names]).to(self.device)
        dist.all_reduce(values)
        row = {"step": step, **{k: (v[0] / v[1].clamp(min=1)).item() for k, v in zip(names, values, strict=True)}, **extra}
        seconds, steps = time.time() - self.last[1], step - self.last[0]
        row["images_per_second"] = self.stage.train.images_per_step * steps / seconds
        row["tokens_per_second"] = self.tokens / seconds
        row["data_wait"] = self.waited / seconds
        row["seconds"] = self.seconds
        gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row["peak_memory_gib"] = peak / 2**30
        self.sums, self.images, self.waited, self.tokens, self.last = {}, 0, 0.0, 0.0, (step, time.time())
        if self.rank == 0:
            left = (self.stage.train.steps - step) * seconds / max(steps, 1)
            shown = [f"{k} {row[k]:.3f}" for k in ("loss", "reverse_kl", "reward", "length", "agreement") if k in row]
            rate = f"{row['images_per_second']:.0f} images/s, data wait {100 * row['data_wait']:.0f} %"
            print(
                f"[{self.stage.name}] {step}/{self.stage.train.steps} {' '.join(shown)} | {rate}, {_clock(left)} left", flush=True
            )
        self.row = row
        self.write(row)

    def write(self, row: dict[str, float]) -> None:
        if self.rank == 0:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self._gauge(row)
            if self.mlflow:
                self.mlflow.log_metrics({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(f"{self.stage.name}/{name}", value, row["step"])
            self.board.flush()
            self.publish(30)

    def publish(self, every: float = 0) -> None:
        """Send what was written to the stage's folder where that is no local one, if that was not done in the last `every`
        seconds. Before a checkpoint, so that no line is lacking that comes before it."""
        if self.rank == 0 and self.apart and time.time() - self.published >= every:
            upload(self.folder, self.stage.folder)
            self.published = time.time()

    def close(self) -> None:
        """After the last line."""
        if self.rank == 0:
            self.file.close()
            self.board.close()
            self.publish()
            if self.mlflow:
                self.mlflow.end_run()

    def _gauge(self, row: dict[str, float]) -> None:
        """Show the figures to Prometheus, through Ray, as ray_geodistill_NAME with the label stage."""
        for name, value in row.items():
            if name not in self.gauges:
                self.gauges[name] = Gauge(f"geodistill_{name}", f"{name} of a training stage, as in metrics.jsonl", ("stage",))
            self.gauges[name].set(value, {"stage": self.stage.name})

    def warn(self, samples: Callable[[], list[str]]) -> None:
        """Say, and write to warnings.jsonl, where the last line of metrics looks like a student that collapses.

        samples: gives some of the last responses, to be shown.
        """
        wrong = self.watch.look(self.row)
        if not wrong or self.rank > 0:
            return
        shown = samples()
        told = {"step": self.row["step"], "wrong": wrong, "samples": shown}
        with (self.folder / "warnings.jsonl").open("a") as file:
            file.write(json.dumps(told, ensure_ascii=False) + "\n")
        lines = [f"[{self.stage.name}] WARNING, step {self.row['step']}: the student may be collapsing: {'; '.join(wrong)}"]
        print("\n".join([*lines, *(f"    {text}" for text in shown)]), flush=True)


def _mlflow(config: Config, stage: Stage, step: int, note: Path):
    """The module mlflow with a run of this stage open, that of before (in the file `note`) where it goes on; None where none is
    asked for."""
    if not config.mlflow:
        return None
    try:
        import mlflow
    except ImportError as error:
        raise ValueError("mlflow=... needs MLflow: pip install 'geodistill[mlflow]', or set mlflow= (empty)") from error
    mlflow.set_tracking_uri(config.mlflow)
    mlflow.set_experiment("geodistill")
    known = note.read_text() if step and note.exists() else None
    active = mlflow.start_run(run_id=known, run_name=f"{config.run}: {stage.name}")
    note.write_text(active.info.run_id)
    if not step:
        loss = asdict(config.distill.loss) if stage.train.method != "sft" else {}
        mlflow.log_params({"seed": config.seed, **asdict(stage.train), **{f"loss.{k}": v for k, v in loss.items()}})
    return mlflow


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60)} s" if seconds >= 60 else f"{int(seconds)} s"
