"""Distil the student: warm start by kd on labelled data, then teacher-mixed sampling with reverse KL (Table 1)."""

from geodistill.cli import main
from geodistill.config import Config


def distill_job(config: Config) -> None:
    from geodistill.train.stage import stages
    from geodistill.train.trainer import fit

    for stage in stages(config, "distill"):
        fit(config, stage)


if __name__ == "__main__":
    main("distill", distill_job)
