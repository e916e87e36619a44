"""Distil the student: warm start by kd on labelled data, then teacher-mixed sampling with reverse KL (Table 1)."""

from geodistill.cli import main
from geodistill.config import Config


def distill_job(config: Config) -> None:
    from geodistill.train.stage import stages
    from geodistill.train.trainer import fit

    for stage in stages(config, "distill"):
        fit(config, stage)


def check_models(config: Config) -> None:
    """Refuse a teacher and a student that cannot be compared in the first seconds, before Ray starts."""
    from geodistill.models.pair import check_stage_pair
    from geodistill.train.stage import stages

    check_stage_pair(config, stages(config, "distill")[0])


if __name__ == "__main__":
    main("distill", distill_job, check=check_models)
