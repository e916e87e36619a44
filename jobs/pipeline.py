"""The whole way in one Ray: prepare, fine-tune the teacher, the baseline and the blind control, distil, evaluate, report.

The same functions as the single jobs call, in the same folders: finished stages are skipped, an interrupted one goes on.
"""

import sys
from dataclasses import replace

from geodistill.config import from_command_line

if __name__ == "__main__":
    config = from_command_line("pipeline")

    from geodistill.cluster import connect
    from geodistill.data.shards import prepare
    from geodistill.evaluate.benchmarks import evaluate
    from geodistill.evaluate.metrics import summary_table
    from geodistill.evaluate.report import report_of_run
    from geodistill.train.trainer import fit, stages

    try:
        connect()
        prepare(config, parallel=True)
        for role in ("teacher", "student", "blind"):
            if role != "blind" or "blind" in config.evaluate.models:
                fit_all = stages(replace(config, role=role), "finetune")
                for stage in fit_all:
                    fit(config, stage)
        for stage in stages(config, "distill"):
            fit(config, stage)
        scores = evaluate(config)
        page = report_of_run(config, scores)
    except ValueError as error:
        print(f"pipeline: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(f"\n{summary_table(scores)}\n\nmetrics: {config.run}/metrics.json\nreport:  {page}")
