"""Fine-tune the teacher (role=teacher), the student as a baseline (role=student) or the blind control (role=blind)."""

import sys

from geodistill.config import from_command_line

if __name__ == "__main__":
    config = from_command_line("finetune")

    from geodistill.cluster import connect
    from geodistill.train.trainer import fit, stages

    try:
        connect()
        for stage in stages(config, "finetune"):
            fit(config, stage)
    except ValueError as error:
        print(f"finetune: {error}", file=sys.stderr)
        raise SystemExit(1) from error
