"""Everything that a resume needs: the engine's state (trainable weights, optimizer) and progress.

There is no random state: the order of the data and every sampled token follow from the seed and the step (loop.py).
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import ray.train


@dataclass
class Progress:
    """Where a run stands. step: updates made; best: lowest validation loss so far; seconds: time spent so far."""

    step: int = 0
    best: float = float("inf")
    seconds: float = 0.0
    world: int = 1


def save(engine, progress: Progress, metrics: dict) -> None:
    """Write one checkpoint from every worker and report it to Ray Train (collective)."""
    rank = ray.train.get_context().get_world_rank()
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag="engine", save_latest=False, exclude_frozen_parameters=True)
        if rank == 0:
            (Path(folder) / "progress.json").write_text(json.dumps(asdict(progress)))
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"step-{progress.step:06d}")


def restore(engine) -> Progress:
    """Load the latest checkpoint of this run into the engine; a new run starts at step 0.

    Raises ValueError if it was written by another number of workers.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress(world=ray.train.get_context().get_world_size())
    world = ray.train.get_context().get_world_size()
    with checkpoint.as_directory() as folder:
        progress = Progress(**json.loads((Path(folder) / "progress.json").read_text()))
        if progress.world != world:
            raise ValueError(
                f"checkpoint {checkpoint.path} was written by {progress.world} workers; "
                f"set cluster.workers={progress.world} (now {world}) or start another run="
            )
        engine.load_checkpoint(folder, tag="engine", load_module_strict=False)
    return progress
