"""What a job trains: its stages, from the settings alone. Light: Ray's controller reads a Stage without torch."""

from dataclasses import dataclass, replace

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

    @property
    def keep_best(self) -> bool:
        """Is the model that of the lowest validation loss, and not the last?"""
        return self.train.keep == "best" and self.train.method != "distill"


def on_shards(config: Config, shards: str) -> Config:
    """The same settings, with the data of `shards`; "" = those of data.shards."""
    return replace(config, data=replace(config.data, shards=shards or config.data.shards))


def checkpoints_of(config: Config, stage: Stage) -> str:
    """The folder of a stage's checkpoints, local or s3://."""
    return f"{config.checkpoints}/{stage.name}" if config.checkpoints else f"{stage.folder}/checkpoints"


def stages(config: Config, job: str) -> list[Stage]:
    """What a job trains. job: finetune (by config.role) or distill (Table 1: warm start, then the loop)."""
    run = config.run
    found: list[Stage] = []
    start = ""
    if job == "finetune":
        role = config.role
        if role == "teacher":
            teacher = config.teacher
            if teacher.first.steps:
                found.append(Stage("teacher/first", f"{run}/teacher/first", teacher.first, "teacher", "", ""))
                start = f"{run}/teacher/first/model"
            return [*found, Stage("teacher", f"{run}/teacher", teacher.train, "teacher", start, "")]
        train = config.student.train
        if role == "blind":
            train = replace(train, blind=True, steps=config.student.blind_steps or train.steps)
        name = "baseline" if role == "student" else "blind"
        return [Stage(name, f"{run}/{name}", train, "student", "", "")]
    distill = config.distill
    if distill.warm_start.steps:
        folder = f"{run}/distill/warm"
        found.append(Stage("distill/warm", folder, distill.warm_start, "student", "", distill.teacher))
        start = f"{folder}/model"
    found.append(Stage("distill", f"{run}/distill", distill.train, "student", start, distill.teacher))
    return found
