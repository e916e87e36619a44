"""Is the distilled student better than the baseline, or lucky? The comparison over several seeds.

For every seed: a baseline, and a distilled student with as many updates, once with prompts on the labelled images alone and
once on the splits of distill.train.splits. Data and teacher are those of the run, which must be there (make demo).
"""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from geodistill.config import from_command_line

SEEDS = (0, 1, 2)

if __name__ == "__main__":
    config = from_command_line("seeds")

    from geodistill.cluster import connect
    from geodistill.evaluate.benchmarks import evaluate
    from geodistill.evaluate.metrics import summary_table
    from geodistill.train.trainer import fit, stages

    rows = []
    try:
        connect()
        for seed in SEEDS:
            run = f"{config.run}/seeds/{seed}"
            one = replace(config, seed=seed, run=run, role="student")
            for stage in stages(one, "finetune"):
                fit(one, stage)
            *warm, loop = stages(one, "distill")
            for stage in warm:
                fit(one, stage)
            variants = {"labelled": ["train"], "all": loop.train.splits}
            for name, splits in variants.items():
                folder = f"{run}/distill-{name}"
                fit(one, replace(loop, name=f"distill-{name}", folder=folder, train=replace(loop.train, splits=splits)))
            models = {"baseline": f"{run}/baseline/model", **{n: f"{run}/distill-{n}/model" for n in variants}}
            scores = evaluate(replace(one, evaluate=replace(config.evaluate, models=models)))
            print(f"\nseed {seed}\n{summary_table(scores)}\n", flush=True)
            rows.append({name: score["summary"]["mean"] for name, score in scores.items()})
    except ValueError as error:
        print(f"seeds: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    Path(config.run, "seeds/seeds.json").write_text(json.dumps(rows, indent=1))
    print("mean of the four tasks\nseed  baseline  labelled images  " + " + ".join(config.distill.train.splits))
    for seed, row in zip(SEEDS, rows, strict=True):
        print(f"{seed:4d}  {row['baseline']:8.1f}  {row['labelled']:15.1f}  {row['all']:8.1f}")
    for name in ("labelled", "all"):
        gains = [row[name] - row["baseline"] for row in rows]
        spread = statistics.stdev(gains)
        print(f"{name} minus baseline: {statistics.mean(gains):+.1f} (each {', '.join(f'{g:+.1f}' for g in gains)}; deviation {spread:.1f})")
