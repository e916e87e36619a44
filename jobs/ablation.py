"""What does each term bring, and what do sft, kd, seqkd and gkd reach? The loop once for every variant of `ablation`, answered,
scored and compared.

Data, teacher and warm start are those of the run and the same for all (make demo); a variant that is finished is skipped.
"""

from dataclasses import replace

from geodistill.cli import main
from geodistill.config import Config, ConfigError, changed


def variant(config: Config, name: str) -> str:
    """Train one variant; returns its model folder."""
    from geodistill.train.stage import stages
    from geodistill.train.trainer import fit

    one = changed(config, config.ablation[name])
    *warm, loop = stages(one, "distill")
    for stage in warm:
        fit(one, stage)
    if config.ablation[name]:  # the variant without changes is the run's own student
        slug = "".join(c if c.isalnum() else "-" for c in name).strip("-")
        loop = replace(loop, name=f"ablation/{slug}", folder=f"{config.run}/ablation/{slug}")
    fit(one, loop)
    return f"{loop.folder}/model"


def check_variants(config: Config) -> None:
    """Raise ConfigError, before anything is trained, for a variant whose settings contradict each other."""
    for name, overrides in config.ablation.items():
        try:
            changed(config, overrides)
        except ConfigError as error:
            raise ConfigError(f"ablation: {name!r}: {error}") from error


def ablation_job(config: Config) -> None:
    from geodistill.data.files import open_folder, write_json
    from geodistill.evaluate.benchmarks import evaluate
    from geodistill.evaluate.compare import measure, paired_table
    from geodistill.evaluate.metrics import summary_table
    from geodistill.evaluate.report import answers_of_run

    models = {name: variant(config, name) for name in config.ablation}
    folder = f"{config.run}/ablation"
    apart = replace(config, run=folder, evaluate=replace(config.evaluate, models=models))
    scores = evaluate(apart)
    measured = {name: measure(found) for name, found in answers_of_run(apart).items()}
    first, *others = models
    for other in others:
        print(f"\n{paired_table((other, first), measured[other], measured[first]).text()}")
    print(f"\n{summary_table(scores)}\n\nfigures: {folder}/metrics.json")
    write_json(open_folder(folder), "ablation.json", {name: score["summary"] for name, score in scores.items()})


if __name__ == "__main__":
    main("ablation", ablation_job, check=check_variants)
