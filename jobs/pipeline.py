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


def pipeline_job(config: Config) -> None:
    prepare_job(config)
    for role in ("teacher", "student", "blind"):
        if role != "blind" or "blind" in config.evaluate.models:
            finetune_job(replace(config, role=role))
    distill_job(config)
    evaluate_job(config)


if __name__ == "__main__":
    main("pipeline", pipeline_job)
