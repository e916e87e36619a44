"""The whole way in one Ray: prepare, fine-tune the teacher, the baseline and the blind control, distil, evaluate, report.

The same work as the single jobs, in the same folders: finished stages are skipped, an interrupted one goes on.
"""

from dataclasses import replace

from distill import distill_job
from evaluate import evaluate_job
from finetune import finetune_job
from prepare import prepare_job

from geodistill.cli import main
from geodistill.config import Config
from geodistill.rules import need_source


def check_data(config: Config, roles: list[str]) -> None:
    """Refuse data that a later stage, or evaluation, could not use before the first one is trained."""
    from geodistill.data.shards import load_manifest
    from geodistill.train.stage import stages
    from geodistill.train.trainer import check_shards

    trained = [stage for role in roles for stage in stages(replace(config, role=role), "finetune")]
    for stage in [*trained, *stages(config, "distill")]:
        check_shards(config, stage)
    load_manifest(config.data.shards, [config.evaluate.split])


def pipeline_job(config: Config) -> None:
    prepare_job(config)
    roles = [role for role in ("teacher", "student", "blind") if role != "blind" or "blind" in config.evaluate.models]
    check_data(config, roles)
    for role in roles:
        finetune_job(replace(config, role=role))
    distill_job(config)
    evaluate_job(config)


if __name__ == "__main__":
    main("pipeline", pipeline_job, check=need_source)
