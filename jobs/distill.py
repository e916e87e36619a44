"""Distil the student: warm start by kd on labelled data, then teacher-mixed sampling with reverse KL (Table 1)."""

import sys

from geodistill.config import from_command_line

if __name__ == "__main__":
    config = from_command_line("distill")

    from geodistill.cluster import connect
    from geodistill.train.trainer import fit, stages

    try:
        connect()
        for stage in stages(config, "distill"):
            fit(config, stage)
    except ValueError as error:
        print(f"distill: {error}", file=sys.stderr)
        raise SystemExit(1) from error
