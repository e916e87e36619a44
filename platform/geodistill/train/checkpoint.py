"""Everything that a resume needs: the engine's state (trainable weights, optimizer), progress, and random states."""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import ray.train
import torch


@dataclass
class Progress:
    """Where a run stands. step: updates made; best: lowest validation loss so far; seconds: time spent so far."""

    step: int = 0
    best: float = float("inf")
    seconds: float = 0.0
    world: int = 1


def save(engine, progress: Progress, generator: torch.Generator, metrics: dict) -> None:
    """Write one checkpoint from every worker and report it to Ray Train (collective)."""
    rank = ray.train.get_context().get_world_rank()
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag="engine", save_latest=False, exclude_frozen_parameters=True)
        states = {"torch": torch.get_rng_state(), "sampling": generator.get_state()}
        torch.save(states, Path(folder) / f"random-{rank}.pt")
        if rank == 0:
            (Path(folder) / "progress.json").write_text(json.dumps(asdict(progress)))
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"step-{progress.step:06d}")


def restore(engine, generator: torch.Generator) -> Progress:
    """Load the latest checkpoint of this run into the engine; a new run starts at step 0.

    Raises ValueError if it was written by another number of workers.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress(world=ray.train.get_context().get_world_size())
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    with checkpoint.as_directory() as folder:
        progress = Progress(**json.loads((Path(folder) / "progress.json").read_text()))
        if progress.world != world:
            raise ValueError(
                f"checkpoint {checkpoint.path} was written by {progress.world} workers; "
                f"set cluster.workers={progress.world} (now {world}) or start another run="
            )
        engine.load_checkpoint(folder, tag="engine", load_module_strict=False)
        states = torch.load(Path(folder) / f"random-{rank}.pt", weights_only=True)
    torch.set_rng_state(states["torch"])
    generator.set_state(states["sampling"])
    return progress
