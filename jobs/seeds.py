"""Is the distilled student better than the baseline, or lucky? The comparison over several seeds.

For every seed: a baseline, and a distilled student with as many updates, once with prompts on the labelled images alone and
once on the splits of distill.train.splits. Data and teacher are those of the run, which must be there (make demo).
"""

import statistics
from dataclasses import replace

from geodistill.cli import main
from geodistill.config import Config

SEEDS = (0, 1, 2)


def one_seed(config: Config, seed: int) -> dict[str, float]:
    """Mean of the four tasks of the baseline and of both distilled students."""
    from geodistill.evaluate.benchmarks import evaluate
    from geodistill.evaluate.metrics import summary_table
    from geodistill.train.stage import stages
    from geodistill.train.trainer import fit

    run = f"{config.run}/seeds/{seed}"
    checkpoints = config.checkpoints and f"{config.checkpoints}/seeds/{seed}"
    one = replace(config, seed=seed, run=run, role="student", checkpoints=checkpoints)
    *warm, loop = stages(one, "distill")
    for stage in [*stages(one, "finetune"), *warm]:
        fit(one, stage)
    models = {"baseline": f"{run}/baseline/model"}
    for name, splits in {"labelled": ["train"], "all": loop.train.splits}.items():
        folder = f"{run}/distill-{name}"
        fit(one, replace(loop, name=f"distill-{name}", folder=folder, train=replace(loop.train, splits=splits)))
        models[name] = f"{folder}/model"
    scores = evaluate(replace(one, evaluate=replace(config.evaluate, models=models)))
    print(f"\nseed {seed}\n{summary_table(scores)}\n", flush=True)
    return {name: score["summary"]["mean"] for name, score in scores.items()}


def seeds_job(config: Config) -> None:
    from geodistill.data.files import open_folder, write_json

    rows = [one_seed(config, seed) for seed in SEEDS]
    write_json(open_folder(config.run), "seeds/seeds.json", rows)
    print(f"mean of the four tasks; all: prompts on {' and '.join(config.distill.train.splits)}")
    print("seed  baseline  labelled       all")
    for seed, row in zip(SEEDS, rows, strict=True):
        print(f"{seed:4d}  {row['baseline']:8.1f}  {row['labelled']:8.1f}  {row['all']:8.1f}")
    for name in ("labelled", "all"):
        gains = [row[name] - row["baseline"] for row in rows]
        each = ", ".join(f"{g:+.1f}" for g in gains)
        print(f"{name} minus baseline: {statistics.mean(gains):+.1f} (each {each}; deviation {statistics.stdev(gains):.1f})")


if __name__ == "__main__":
    main("seeds", seeds_job)
