"""Ray Tune: distillations with other settings, each a real Ray Train run; the best one's model is left ready to serve.

Every trial is the two stages of jobs/distill.py in a folder of its own, named by what is changed; a warm start that does not
differ between trials is trained once. A trial reports at every validation. A sweep that was interrupted is begun again with
resume=true: every trial then first reports again what it had reported, from its own files, and the scheduler's decisions of then
are taken as they were, so that search and scheduler stand where they stood; what was finished is not trained again.
"""

import hashlib
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from matplotlib.figure import Figure
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Searcher

from geodistill.cluster import can_have
from geodistill.config import Config, ConfigError, changed, save, search_space
from geodistill.evaluate.plots import heat_map, parallel_coordinates
from geodistill.evaluate.tables import Table
from geodistill.train.stage import Stage, stages
from geodistill.train.trainer import fit, settings_of

STEP = "step"  # the measure of time that trials report


def name_of(values: dict[str, Any]) -> str:
    """The folder of a trial, such as alpha=0.2,temperature=1."""
    parts = [f"{key.removeprefix('distill.').removeprefix('loss.')}={_shown(value)}" for key, value in sorted(values.items())]
    return re.sub(r"[^\w=,.+-]", "-", ",".join(parts))


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def one(config: Config, values: dict[str, Any]) -> tuple[Config, list[Stage]]:
    """The settings of a trial and its stages: a warm start shared with all trials of the same, and the loop."""
    config = changed(config, [f"{key}={_shown(value)}" for key, value in values.items()])
    folder = Path(config.run) / "sweep"
    *warm, loop = stages(config, "distill")
    start = loop.weights
    shared = []
    for stage in warm:
        digest = hashlib.sha256(json.dumps(settings_of(config, stage), sort_keys=True).encode()).hexdigest()[:10]
        stage = replace(stage, name=f"sweep/warm/{digest}", folder=str(folder / "warm" / digest))
        shared.append(stage)
        start = f"{stage.folder}/model"
    name = name_of(values)
    return config, [*shared, replace(loop, name=f"sweep/{name}", folder=str(folder / "trials" / name), weights=start)]


def trial(values: dict[str, Any], config: Config) -> None:
    """What Tune runs: report what this trial had reported before it was interrupted, then go on."""
    config, (*warm, loop) = one(config, values)
    for row in reported(Path(loop.folder)):
        tune.report(row)
    for stage in warm:
        Path(stage.folder).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(stage.folder) / "lock"):  # one trial trains it, the others wait for it
            fit(config, stage)
    fit(config, loop, callbacks=[TuneReportCallback()])


def reported(folder: Path) -> list[dict]:
    """What a trial has reported, from its metrics.jsonl: at each validation, with the figures of the last line before it."""
    file, found, last = folder / "metrics.jsonl", list[dict](), dict[str, float]()
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    for row in (json.loads(line) for line in lines if line.endswith("\n")):
        if "validation_loss" in row:
            found.append({**last, **row})
        else:
            last = row
    return found


class Remembered(AsyncHyperBandScheduler):
    """ASHA whose decisions are written down, and taken again where a trial reports the same step once more.

    Ray does not keep its rungs: after an interruption a trial would run on that had been stopped, or be measured against others.
    """

    def __init__(self, journal: Path, **options: Any):
        super().__init__(time_attr=STEP, **options)
        self.journal = journal
        lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a killed sweep may leave half a line
        if len(whole) < len(lines):
            journal.write_text("".join(whole))
        rows = [json.loads(line) for line in whole]
        self.taken = {(row["trial"], row[STEP]): row["action"] for row in rows}

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        action = super().on_trial_result(tune_controller, trial, result)  # the rung is filled either way
        key = name_of(trial.config), result[STEP]
        if key not in self.taken:
            self.taken[key] = action
            row = {"trial": key[0], STEP: key[1], self._metric: result[self._metric], "action": action}
            with self.journal.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return self.taken[key]


def at_once(config: Config, have: dict[str, float]) -> int:
    """How many trials can run beside each other in resources `have`: all their workers, and half a CPU for data."""
    cluster = config.cluster
    fits = [(have.get("CPU", 0) - 0.5) / (cluster.workers * cluster.cpus_per_worker)]
    fits += [have.get("GPU", 0) / cluster.workers] if cluster.use_gpu else []
    fits += [config.sweep.at_once] if config.sweep.at_once else []
    return int(min(fits))


def searcher(config: Config, parallel: int) -> tuple[Searcher | BasicVariantGenerator, dict[str, Any], int]:
    """(search algorithm, Tune's space, number of samples)."""
    sweep, space = config.sweep, search_space(config.sweep.space)
    if sweep.search == "grid":
        grid = {key: tune.grid_search(domain.values) for key, domain in space.items()}
        return BasicVariantGenerator(max_concurrent=parallel), grid, 1
    domains: dict[str, Any] = {}
    for key, domain in space.items():
        if domain.values:
            domains[key] = tune.choice(domain.values)
        else:
            domains[key] = (tune.loguniform if domain.log else tune.uniform)(domain.low, domain.high)
    if sweep.search == "random":
        return BasicVariantGenerator(max_concurrent=parallel, random_state=config.seed), domains, sweep.trials
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as error:
        raise ConfigError(
            "sweep.search=optuna needs optuna: pip install 'geodistill[sweep]', or set sweep.search=random"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = OptunaSearch(seed=config.seed, metric=sweep.metric, mode=sweep.mode)
    return ConcurrencyLimiter(found, max_concurrent=parallel), domains, sweep.trials


def sweep(config: Config) -> dict:
    """Run or go on with the sweep of the settings; returns what sweep.json holds. Raises ValueError where nothing can run.

    Writes run/sweep: trials/NAME (as distill has them), warm/, decisions.jsonl, sweep.json, sweep.png, best/model.
    """
    folder, options = Path(config.run) / "sweep", config.sweep
    asked = folder / "config.yaml"
    if asked.exists() and not config.resume:
        raise ValueError(f"{folder} holds a sweep: go on with it with resume=true, choose another run=FOLDER, or delete it")
    if config.resume and not asked.exists():
        raise ValueError(f"{folder} holds no sweep that could be resumed; leave resume=true out")
    save(replace(config, resume=False), folder / "asked.yaml")
    if config.resume and asked.read_text() != (folder / "asked.yaml").read_text():
        raise ValueError(f"{asked} and these settings differ; give the command of then, with resume=true")
    (folder / "asked.yaml").rename(asked)
    parallel = at_once(config, can_have())
    if parallel < 1:
        need = config.cluster.workers * config.cluster.cpus_per_worker + 0.5
        raise ValueError(
            f"a trial needs {need:g} CPUs (or as many GPUs as workers), and this Ray has fewer: lower cluster.workers"
        )
    search, space, samples = searcher(config, parallel)
    loop = config.distill.train
    asha = None
    if options.scheduler == "asha":
        if options.grace > loop.steps:
            raise ValueError(
                f"sweep.grace={options.grace} is beyond distill.train.steps={loop.steps}: no trial could be stopped early; lower "
                "sweep.grace, or set sweep.scheduler=none"
            )
        journal = folder / "decisions.jsonl"
        asha = Remembered(journal, max_t=loop.steps, grace_period=options.grace, reduction_factor=options.reduction)
    shutil.rmtree(folder / "tune", ignore_errors=True)  # Ray's own record of a run that was interrupted; not read
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, config=config), {"node:__internal_head__": 0.001}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=options.metric,
            mode=options.mode,
            search_alg=search,
            scheduler=asha,
            num_samples=samples,
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=1),
    )
    start = time.time()
    results = tuner.fit()
    ended = [results[i] for i in range(len(results))]
    found = summary(config, [(dict(r.config or {}), str(r.error).splitlines()[-1] if r.error else "") for r in ended])
    found["seconds"] = time.time() - start
    (folder / "sweep.json").write_text(json.dumps(found, indent=1))
    sweep_figure(config, found).savefig(folder / "sweep.png", dpi=150)
    return found


def summary(config: Config, trials: list[tuple[dict, str]]) -> dict:
    """{"metric", "mode", "trials": the best first, each with its values, last figures and state; "best": its model's folder}."""
    metric, sign = config.sweep.metric, 1 if config.sweep.mode == "min" else -1
    rows = []
    for values, error in trials:
        _, (*_, loop) = one(config, values)
        figures = reported(Path(loop.folder))
        state = "finished" if (Path(loop.folder) / "done.json").exists() else f"failed: {error}" if error else "stopped early"
        last = figures[-1] if figures else {}
        rows.append({"name": name_of(values), "values": values, "state": state, STEP: last.get(STEP, 0), metric: last.get(metric),
                     "figures": {k: last[k] for k in ("reverse_kl", "agreement", "length") if k in last}})  # fmt: skip
    rows.sort(key=lambda row: (row["state"] != "finished", row[metric] is None, sign * (row[metric] or 0)))
    best = None
    if rows and rows[0]["state"] == "finished":
        best = Path(config.run) / "sweep/best"
        part = best.with_suffix(".partial")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(Path(config.run) / "sweep/trials" / rows[0]["name"] / "model", part / "model")
        (part / "trial.json").write_text(json.dumps(rows[0], indent=1))
        shutil.rmtree(best, ignore_errors=True)
        part.rename(best)
    return {"metric": metric, "mode": config.sweep.mode, "trials": rows, "best": str(best / "model") if best else ""}


def sweep_table(found: dict) -> str:
    """The trials, the best first."""
    metric, keys = found["metric"], sorted({key for row in found["trials"] for key in row["values"]})
    others = [k for k in ("reverse_kl", "agreement", "length") if any(k in row["figures"] for row in found["trials"])]
    rows = []
    for place, row in enumerate(found["trials"], 1):
        figures = [f"{row['figures'][k]:.3f}" if k in row["figures"] else "-" for k in others]
        value = "-" if row[metric] is None else f"{row[metric]:.4f}"
        rows.append(
            [str(place), *(_shown(row["values"].get(k, "-")) for k in keys), str(row[STEP]), value, *figures, row["state"]]
        )
    columns = [("", name) for name in (*(k.rsplit(".", 1)[-1] for k in keys), "steps", metric, *others, "state")]
    best = f"The best model is in {found['best']}." if found["best"] else "No trial was finished."
    return Table("Trials, the best first", columns, rows, best, "").text()


def sweep_figure(config: Config, found: dict) -> Figure:
    """A heat map where two settings were swept over lists of values, else parallel coordinates."""
    metric, space = found["metric"], search_space(config.sweep.space)
    points = [(row["values"], row[metric]) for row in found["trials"] if row[metric] is not None]
    if len(space) == 2 and all(domain.values for domain in space.values()):
        return heat_map({key: domain.values for key, domain in space.items()}, points, metric)
    return parallel_coordinates([(key, domain.log) for key, domain in space.items()], points, metric)
