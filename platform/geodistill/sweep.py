"""Ray Tune: distillations with other settings, each a real Ray Train run; the best one's model is left ready to serve.

Every trial is the two stages of jobs/distill.py in a folder of its own, named by what is changed; a warm start that does not
differ between trials is trained once. A trial reports at every validation. A sweep that was interrupted is begun again by the
same command: every trial then first reports again what it had reported, from its own files, and the scheduler's decisions of
then are taken as they were, so that search and scheduler stand where they stood; what was finished is not trained again.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from pyarrow.fs import FileType
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Searcher
from ray.tune.search.optuna import OptunaSearch

from geodistill.cli import JobStopped, sigterm_interrupts
from geodistill.cluster import Nodes, answering, need, places, total
from geodistill.config import Config, ConfigError, as_yaml, changed, search_space
from geodistill.data.files import (
    exists,
    located,
    lock,
    open_folder,
    read_lines,
    read_text,
    replace_folder,
    write_json,
    write_text,
    written,
)
from geodistill.evaluate.plots import heat_map, parallel_coordinates
from geodistill.evaluate.tables import Table
from geodistill.train.stage import Stage, stages
from geodistill.train.trainer import bundles_of, fit, lacking, settings_of

JOURNAL, SUGGESTED = "decisions.jsonl", "suggestions.jsonl"
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
    folder = f"{config.run}/sweep"
    *warm, loop = stages(config, "distill")
    start = loop.weights
    shared = []
    for stage in warm:
        digest = hashlib.sha256(json.dumps(settings_of(config, stage), sort_keys=True).encode()).hexdigest()[:10]
        stage = replace(stage, name=f"sweep/warm/{digest}", folder=f"{folder}/warm/{digest}")
        shared.append(stage)
        start = f"{stage.folder}/model"
    name = name_of(values)
    return config, [*shared, replace(loop, name=f"sweep/{name}", folder=f"{folder}/trials/{name}", weights=start)]


def trial(values: dict[str, Any], config: Config, parallel: int) -> None:
    """What Tune runs, `parallel` at once: report what this trial had reported before it was interrupted, then go on."""
    config, (*warm, loop) = one(config, values)
    turn = partial(place, config, parallel)
    with lock(loop.folder):  # random search and Optuna may draw the same values twice: the second finds what the first has left
        for row in reported(loop.folder):
            tune.report(row)
        for stage in warm:
            with lock(stage.folder):  # one trial trains it, the others wait for it
                fit(config, stage, turn=turn)
        fit(config, loop, callbacks=[TuneReportCallback()], turn=turn)


@contextmanager
def place(config: Config, parallel: int) -> Iterator[None]:
    """Held by a trial while it has workers. Where a node is lost, fewer trials than `parallel` fit beside each other: were all to
    begin again, their workers could take every CPU, and none would be left for data."""
    folder = f"{config.run}/sweep"
    places = [lock(f"{folder}/place-{i}") for i in range(parallel)]
    while True:
        fits = max(1, at_once(config, answering()))
        with lock(f"{folder}/places"):  # the trials' processes are all on the head
            free = [one for one in places if _taken(one)]
            mine = free[0] if free and parallel - len(free) < fits else None
            for one in free:
                if one is not mine:
                    one.release()
        if mine:
            break
        time.sleep(5)
    try:
        yield
    finally:
        mine.release()


def _taken(one: FileLock) -> bool:
    try:
        one.acquire(blocking=False)
    except Timeout:
        return False
    return True


def reported(folder: str) -> list[dict]:
    """What a trial has reported, from its metrics.jsonl: at each validation, with the figures of the last line before it."""
    found, last = list[dict](), dict[str, float]()
    for row in read_lines(open_folder(folder), "metrics.jsonl"):
        if "validation_loss" in row:
            found.append({**last, **row})
        else:
            last = row
    return found


class Remembered(AsyncHyperBandScheduler):
    """ASHA whose decisions are written down, and taken again where a trial reports the same step once more.

    Ray does not keep its rungs: after an interruption a trial would run on that had been stopped, or be measured against others.
    A trial at its last step is let go on, where Ray's ASHA stops it.
    """

    def __init__(self, folder: str, **options: Any):
        """folder: where decisions.jsonl lies."""
        super().__init__(time_attr=STEP, **options)
        self.files = open_folder(folder, create=True)
        self.rows = read_lines(self.files, JOURNAL)
        self.taken = {(row["trial"], row[STEP]): row["action"] for row in self.rows}

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        action = super().on_trial_result(tune_controller, trial, result)  # the rung is filled either way
        if result[STEP] >= self._max_t:  # it ends by itself: stopped, it might not come to write that it is finished
            action = self.CONTINUE
        key = name_of(trial.config), result[STEP]
        if key not in self.taken:
            self.taken[key] = action
            self.rows.append({"trial": key[0], STEP: key[1], self._metric: result[self._metric], "action": action})
            write_text(self.files, JOURNAL, "".join(json.dumps(row) + "\n" for row in self.rows))
        return self.taken[key]


class Suggestions(OptunaSearch):
    """Optuna whose suggestions are written down. It learns from trials in the order in which they end, and that is another one
    when trials beside each other are reported again: after an interruption what had been drawn is drawn first, in that order.
    What trials one after another have drawn comes again by the seed alone, as does all that follows."""

    def __init__(self, folder: str, seed: int, parallel: int, **options: Any):
        """folder: where suggestions.jsonl lies; parallel: trials beside each other."""
        self.files = open_folder(folder, create=True)
        self.rows = read_lines(self.files, SUGGESTED)
        self.drawn, self.alone = 0, parallel == 1 and all(row["alone"] for row in self.rows)
        again = [] if self.alone else [row["values"] for row in self.rows]
        super().__init__(seed=seed + len(again), points_to_evaluate=again, **options)  # the same seed would draw those again

    def suggest(self, trial_id: str) -> dict | None:
        values = super().suggest(trial_id)
        if values is not None:
            self.drawn += 1
            if self.drawn > len(self.rows):
                self.rows.append({"values": values, "alone": self.alone})
                write_text(self.files, SUGGESTED, "".join(json.dumps(row) + "\n" for row in self.rows))
        return values


def at_once(config: Config, nodes: Nodes) -> int:
    """How many trials can run beside each other on `nodes`: all their workers, and half a CPU for data."""
    cluster = config.cluster
    fits = [(total(nodes, "CPU") - 0.5) / (cluster.workers * cluster.cpus_per_worker)]
    fits += [places(nodes, cluster.cpus_per_worker, cluster.use_gpu) / cluster.workers]
    fits += [config.sweep.at_once] if config.sweep.at_once else []
    return max(0, int(min(fits)))


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
    except ImportError as error:
        raise ConfigError(
            "sweep.search=optuna needs optuna: pip install 'geodistill[sweep]', or set sweep.search=random"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = Suggestions(f"{config.run}/sweep", config.seed, parallel, metric=sweep.metric, mode=sweep.mode)
    return ConcurrencyLimiter(found, max_concurrent=parallel), domains, sweep.trials


def sweep(config: Config) -> dict:
    """Run or go on with the sweep of the settings; returns what sweep.json holds.

    Raises ValueError where nothing can run, JobStopped after SIGTERM, KeyboardInterrupt after Ctrl-C: the same command goes on.

    Writes run/sweep: trials/NAME (as distill has them), warm/, decisions.jsonl, suggestions.jsonl (Optuna), sweep.json,
    sweep.png, best/model.
    """
    folder, options = f"{config.run}/sweep", config.sweep
    files, asked = open_folder(folder, create=True), as_yaml(replace(config, resume=False))
    begun = exists(files, "config.yaml")
    if config.resume and not begun:
        raise ValueError(f"{folder} holds no sweep that could be resumed; leave resume=true out")
    if begun and read_text(files, "config.yaml") != asked:
        raise ValueError(
            f"{folder}/config.yaml and these settings differ; give the command of then to go on, choose another run=FOLDER, or "
            "delete that folder"
        )
    cluster, train = config.cluster, config.distill.train
    if options.metric != "validation_loss" and train.validate_every % train.log_every:
        raise ValueError(
            f"sweep.metric={options.metric} is read at validations: distill.train.validate_every={train.validate_every} must be "
            f"a multiple of distill.train.log_every={train.log_every}"
        )
    fits, lacks = partial(at_once, config), partial(lacking, cluster)
    parallel = need("sweep", fits, lacks, bundles_of(cluster), cluster.wait)
    search, space, samples = searcher(config, parallel)
    asha = None
    if options.scheduler == "asha":
        if options.grace > train.steps:
            raise ValueError(
                f"sweep.grace={options.grace} is beyond distill.train.steps={train.steps}: no trial could be stopped early; "
                "lower sweep.grace, or set sweep.scheduler=none"
            )
        asha = Remembered(folder, max_t=train.steps, grace_period=options.grace, reduction_factor=options.reduction)
    write_text(files, "config.yaml", asked)
    if files.get_file_info("tune").type == FileType.Directory:
        files.delete_dir("tune")  # Ray's own record of a run that was interrupted; not read
    store, path = located(folder)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, config=config, parallel=parallel), {"node:__internal_head__": 0.001}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=options.metric,
            mode=options.mode,
            search_alg=search,
            scheduler=asha,
            num_samples=samples,
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=path, storage_filesystem=store, verbose=1),
    )
    start = time.time()
    results = run(tuner)
    ended = [results[i] for i in range(len(results))]
    found = summary(config, [(dict(r.config or {}), str(r.error).splitlines()[-1] if r.error else "") for r in ended])
    found["seconds"] = time.time() - start
    write_json(files, "sweep.json", found)
    if any(row[options.metric] is not None for row in found["trials"]):
        with written(folder) as here:
            sweep_figure(config, found).savefig(here / "sweep.png", dpi=150)
    keep_best(config, found)
    return found


def run(tuner: tune.Tuner) -> tune.ResultGrid:
    """Its trials, ended.

    Raises JobStopped after SIGTERM, KeyboardInterrupt after Ctrl-C, which Tune would take for the end of the sweep.
    """
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    with sigterm_interrupts() as told:
        try:
            return tuner.fit()
        except KeyboardInterrupt:
            if not told.is_set():
                raise
    raise JobStopped("the sweep was stopped; the same command goes on, trials that ran from their last checkpoints")


def summary(config: Config, trials: list[tuple[dict, str]]) -> dict:
    """{"metric", "mode", "trials": the best first, each with its values, last figures and state; "best": its model's folder}."""
    metric, sign = config.sweep.metric, 1 if config.sweep.mode == "min" else -1
    rows = []
    for values, error in trials:
        folder = f"{config.run}/sweep/trials/{name_of(values)}"
        figures = reported(folder)
        state = "finished" if exists(open_folder(folder), "done.json") else f"failed: {error}" if error else "stopped early"
        last = figures[-1] if figures else {}
        rows.append({"name": name_of(values), "values": values, "state": state, STEP: last.get(STEP, 0), metric: last.get(metric),
                     "figures": {k: last[k] for k in ("reverse_kl", "agreement", "length") if k in last}})  # fmt: skip
    rows.sort(key=lambda row: (row["state"] != "finished", row[metric] is None, sign * (row[metric] or 0)))
    best = f"{config.run}/sweep/best/model" if rows and rows[0]["state"] == "finished" else ""
    return {"metric": metric, "mode": config.sweep.mode, "trials": rows, "best": best}


def keep_best(config: Config, found: dict) -> None:
    """Put the best trial's model into run/sweep/best, where one was finished."""
    if found["best"]:
        best = found["trials"][0]
        replace_folder(f"{config.run}/sweep/trials/{best['name']}/model", found["best"])
        write_json(open_folder(f"{config.run}/sweep/best"), "trial.json", best)


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
