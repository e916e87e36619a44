"""What a job trains: its stages, from the settings alone. Light: Ray's controller reads a Stage without torch."""

from dataclasses import dataclass, replace
from pathlib import Path

from geodistill.config import Config, TrainConfig


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


def stages(config: Config, job: str) -> list[Stage]:
    """What a job trains. job: finetune (by config.role) or distill (Table 1: warm start, then the loop)."""
    run = Path(config.run)
    if job == "finetune":
        role = config.role
        if role == "teacher":
            return [Stage("teacher", str(run / "teacher"), config.teacher.train, "teacher", "", "", True)]
        train = config.student.train
        if role == "blind":
            train = replace(train, blind=True, steps=config.student.blind_steps or train.steps)
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
