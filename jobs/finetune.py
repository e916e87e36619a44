"""Fine-tune the teacher (role=teacher), the student as a baseline (role=student) or the blind control (role=blind)."""

from geodistill.cli import main
from geodistill.config import Config


def finetune_job(config: Config) -> None:
    from geodistill.train.stage import stages
    from geodistill.train.trainer import fit

    for stage in stages(config, "finetune"):
        fit(config, stage)


if __name__ == "__main__":
    main("finetune", finetune_job)
