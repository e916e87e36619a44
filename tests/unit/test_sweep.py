"""The parts of a sweep that decide, without Ray: the space, ASHA's memory, what a trial had reported, how many run at once."""

import gc
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import tune
from ray.tune.schedulers import TrialScheduler

from geodistill.cli import JobStopped
from geodistill.config import ConfigError, Domain, ModelConfig, VisionConfig, absolute, load, search_space
from geodistill.evaluate.plots import heat_map, parallel_coordinates
from geodistill.models import assemble
from geodistill.sweep import (
    Remembered,
    Suggestions,
    at_once,
    keep_best,
    name_of,
    place,
    reported,
    summary,
    sweep_figure,
    sweep_table,
)
from geodistill.sweep import run as ended

STAGES = ("teacher.train", "student.train", "distill.warm_start", "distill.train")
ALPHA, HEAT, RATE = "distill.loss.alpha", "distill.loss.temperature", "distill.train.learning_rate"


def test_values_and_ranges_are_read():
    found = search_space(
        {ALPHA: "0 | 0.2|0.5", RATE: "1e-4 .. 1e-2 log", HEAT: "0.5 .. 2", "distill.loss.preset": "paper | reference"}
    )
    assert found[ALPHA] == Domain((0, 0.2, 0.5)) and found["distill.loss.preset"].values == ("paper", "reference")
    assert found[RATE] == Domain(low=1e-4, high=1e-2, log=True) and found[HEAT] == Domain(low=0.5, high=2.0)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"distill.loss.alhpa": "0 | 1"}, r"alhpa' is no key .* did you mean 'distill\.loss\.alpha'"),
        ({"data.train": "1 | 2"}, "no key of distill or student"),
        ({HEAT: "2 .. 0.5"}, r"is no range; write LOW \.\. HIGH"),
        ({RATE: "0 .. 1 log"}, "with LOW above 0"),
        ({HEAT: "warm .. hot"}, "is no range"),
        ({"distill.train.steps": "100 .. 400"}, r"takes none; write A \| B \| C"),
    ],
)
def test_a_wrong_space_names_the_key(space, said):
    with pytest.raises(ConfigError, match=said):
        search_space(space)


def test_folders_of_a_space_are_made_absolute(monkeypatch, tmp_path):
    """A trial runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    config = absolute(load(None, ["sweep.space={distill.teacher: ../a/model | s3://b/model, distill.loss.alpha: 0 | 1}"]))
    found = search_space(config.sweep.space)
    assert found["distill.teacher"].values == (f"{tmp_path}/../a/model", "s3://b/model") and found[ALPHA].values == (0, 1)


def test_a_grid_of_ranges_is_refused():
    with pytest.raises(ConfigError, match=r"sweep\.search=grid needs values, but distill\.loss\.temperature"):
        load(None, ["sweep.space={distill.loss.temperature: 0.5 .. 2}"])


def test_a_space_takes_the_place_of_the_default():
    config = load(None, ["sweep.space={distill.loss.kd_alpha: 0.2 | 0.8}"])
    assert list(config.sweep.space) == ["distill.loss.kd_alpha"]


def test_names_of_trials():
    assert name_of({HEAT: 1.0, ALPHA: 0.2}) == "alpha=0.2,temperature=1"
    assert name_of({RATE: 0.000123456789}) == "train.learning_rate=0.000123457"


def of(*overrides: str):
    return load(
        None, [f"{t}.images_per_micro_batch=8" for t in STAGES] + [f"{t}.images_per_step=32" for t in STAGES] + [*overrides]
    )


def test_trials_at_once_leave_half_a_cpu_for_data():
    assert [at_once(of("cluster.workers=2"), [{"CPU": cpus}]) for cpus in (2, 2.5, 4.5, 8)] == [0, 1, 2, 3]
    assert at_once(of("cluster.workers=2", "sweep.at_once=1"), [{"CPU": 64}]) == 1
    assert at_once(of("cluster.workers=4", "cluster.use_gpu=true"), [{"CPU": 64, "GPU": 6}]) == 1


def test_fewer_trials_begin_again_where_a_node_is_lost(tmp_path, monkeypatch):
    """Two beside each other on 4 CPUs would leave none for data: the one that still runs is counted."""
    config, have = of(f"run={tmp_path}", "cluster.workers=2"), [{"CPU": 4.0}, {"CPU": 4.0}]
    monkeypatch.setattr("geodistill.sweep.answering", lambda: have)
    monkeypatch.setattr("geodistill.sweep.time.sleep", lambda seconds: threading.Event().wait(0.01))
    ends, begun = [threading.Event() for _ in range(3)], []

    def run(number: int) -> None:
        with place(config, 3):
            begun.append(number)
            ends[number].wait(10)

    trials = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for count, one in enumerate(trials[:2], 1):
        one.start()
        until(lambda count=count: len(begun) == count)
    del have[0]
    trials[2].start()
    ends[0].set()
    trials[0].join()
    threading.Event().wait(0.3)
    assert begun == [0, 1]
    ends[1].set()
    until(lambda: begun == [0, 1, 2])
    ends[2].set()
    for one in trials[1:]:
        one.join()


def until(is_so) -> None:
    for _ in range(1000):
        if is_so():
            return
        threading.Event().wait(0.01)
    raise TimeoutError


@pytest.mark.parametrize(("before", "now"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_what_was_drawn_is_drawn_again_whatever_ends_first(tmp_path, before, now):
    pytest.importorskip("optuna")

    def search(parallel: int) -> Suggestions:
        found = Suggestions(str(tmp_path), 0, parallel, metric="loss", mode="min")
        found.set_search_properties("loss", "min", {RATE: tune.loguniform(1e-6, 1e-2)})
        return found

    def drawn(found: Suggestions, count: int, late: int) -> list[float]:
        values = list[float]()
        for number in range(count):
            values.append(found.suggest(str(number))[RATE])
            if number != late:
                found.on_trial_complete(str(number), {"loss": values[-1]})
        return values

    first = drawn(search(before), 12, late=0 if before > 1 else -1)
    second = drawn(search(now), 20, late=-1)
    third = drawn(search(now), 24, late=-1)
    assert second[:12] == first and third[:20] == second and len(set(third)) == 24
    rows = [json.loads(line) for line in (tmp_path / "suggestions.jsonl").read_text().splitlines()]
    assert [row["values"][RATE] for row in rows] == third


def rows(folder, values):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step, value in enumerate(values, 1):
        lines += [{"step": 10 * step, "reverse_kl": value / 2, "loss": value}, {"step": 10 * step, "validation_loss": value}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "valid')


def test_what_a_trial_reports_again(tmp_path):
    rows(tmp_path, [3.0, 2.0])
    assert reported(str(tmp_path)) == [
        {"step": 10, "reverse_kl": 1.5, "loss": 3.0, "validation_loss": 3.0},
        {"step": 20, "reverse_kl": 1.0, "loss": 2.0, "validation_loss": 2.0},
    ]
    assert reported(f"{tmp_path}/none") == []


def scheduler(journal):
    found = Remembered(str(journal.parent), max_t=90, grace_period=10, reduction_factor=3)
    found.set_search_properties("validation_loss", "min")
    return found


def run(asha, curves, upto=None):
    """Report every trial's values in turn until it is stopped, as one trial at a time would; the decisions."""
    found = {}
    for number, values in enumerate(curves):
        if upto is not None and number >= upto:
            break
        trial = SimpleNamespace(trial_id=f"{random.random()}", config={ALPHA: number})  # Ray gives new ids after a resume
        asha.on_trial_add(None, trial)
        for step, value in enumerate(values, 1):
            found[number, 10 * step] = asha.on_trial_result(None, trial, {"step": 10 * step, "validation_loss": value})
            if found[number, 10 * step] == TrialScheduler.STOP:
                break
    return found


def test_a_resumed_sweep_takes_the_decisions_of_an_unbroken_one(tmp_path):
    draw = random.Random(0)
    curves = [[draw.random() for _ in range(9)] for _ in range(12)]
    unbroken = run(scheduler(tmp_path / "unbroken/decisions.jsonl"), curves)
    stops = [key for key, action in unbroken.items() if action == TrialScheduler.STOP]
    assert len(stops) > 4
    for cut in (1, 5, 11):
        journal = tmp_path / f"{cut}/decisions.jsonl"
        before = run(scheduler(journal), curves, cut)
        with journal.open("a") as file:
            file.write('{"trial": "alpha=')  # killed while it wrote
        assert run(scheduler(journal), curves) == unbroken
        assert {k: v for k, v in unbroken.items() if k in before} == before
        assert len(journal.read_text().splitlines()) == len(unbroken)  # nothing twice


def test_a_decision_that_was_taken_stands(tmp_path):
    """Also where the others' results, in another order, would give another one."""
    journal = tmp_path / "decisions.jsonl"
    journal.write_text(json.dumps({"trial": "alpha=1", "step": 10, "validation_loss": 5.0, "action": "CONTINUE"}) + "\n")
    assert run(scheduler(journal), [[1.0] * 9, [5.0] * 9])[1, 10] == "CONTINUE"
    assert run(scheduler(tmp_path / "other/decisions.jsonl"), [[1.0] * 9, [5.0] * 9])[1, 10] == "STOP"


def test_summary_table_figure_and_best(tmp_path, monkeypatch):
    config = load(None, [f"run={tmp_path}", "sweep.space={distill.loss.alpha: 0 | 0.2, distill.loss.temperature: 0.7 | 1}"])
    monkeypatch.setattr("geodistill.sweep.settings_of", lambda config, stage: {"of": stage.name})
    trials = []
    for alpha, heat, values, done in ((0, 0.7, [3.0, 2.5], True), (0, 1, [3.0, 2.0], True), (0.2, 0.7, [1.0], False)):
        folder = tmp_path / "sweep/trials" / name_of({ALPHA: alpha, HEAT: heat})
        rows(folder, values)
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text(str(values))
        if done:
            (folder / "done.json").write_text("{}")
        trials.append(({ALPHA: alpha, HEAT: heat}, ""))
    trials.append(({ALPHA: 0.2, HEAT: 1}, "the loss is not finite"))
    found = summary(config, trials)
    keep_best(config, found)
    assert [row["state"] for row in found["trials"]] == [
        "finished",
        "finished",
        "stopped early",
        "failed: the loss is not finite",
    ]
    assert found["trials"][0]["values"] == {ALPHA: 0, HEAT: 1}
    assert (tmp_path / "sweep/best/model/config.json").read_text() == "[3.0, 2.0]"  # of those that were finished
    assert json.loads((tmp_path / "sweep/best/trial.json").read_text())["name"] == "alpha=0,temperature=1"
    table = sweep_table(found)
    assert "stopped early" in table and "2.0000" in table and "sweep/best/model" in table
    axes = sweep_figure(config, found).axes
    assert axes[0].get_xlabel() == ALPHA and {text.get_text() for text in axes[0].texts} == {"2.5", "2", "1"}


def test_a_trial_whose_settings_contradict_each_other_costs_the_others_nothing(tmp_path):
    config = load(None, [f"run={tmp_path}", "sweep.space={distill.loss.preset: paper | seqkd}"])
    rows(tmp_path / "sweep/trials/preset=paper", [1.0])
    (tmp_path / "sweep/trials/preset=paper/done.json").write_text("{}")
    found = summary(config, [({"distill.loss.preset": "paper"}, ""), ({"distill.loss.preset": "seqkd"}, "set alpha=1")])
    assert [row["state"] for row in found["trials"]] == ["finished", "failed: set alpha=1"]


def test_signals_end_a_sweep_and_are_no_result():
    def tuner(number: int):
        return SimpleNamespace(fit=lambda: (os.kill(os.getpid(), number), time.sleep(10)))

    with pytest.raises(JobStopped, match="same command"):
        ended(tuner(signal.SIGTERM))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it, Ray Train takes it
    try:
        with pytest.raises(KeyboardInterrupt):
            ended(tuner(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) is not None and os.environ["TUNE_DISABLE_SIGINT_HANDLER"] == "1"


def test_figures_draw_every_trial():
    points = [
        ({RATE: 10.0**-i, "distill.loss.preset": kind}, float(i)) for i, kind in enumerate(["paper", "reference", "paper"], 2)
    ]
    figure = parallel_coordinates([(RATE, True), ("distill.loss.preset", False)], points, "validation_loss")
    assert sum(len(line.get_xdata()) == 3 for line in figure.axes[0].lines) == 3
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["learning_rate", "preset", "validation_loss"]
    one = heat_map({ALPHA: (0, 1), HEAT: (1,)}, [({ALPHA: 1, HEAT: 1}, 0.5)], "reverse_kl")
    assert [text.get_text() for text in one.axes[0].texts] == ["0.5"]


def test_trials_of_a_node_share_the_memory_of_the_teachers_weights(tokenizer, tmp_path):
    """A model is mapped from its file, not copied: however many processes of a node load it, its weights are there once."""
    sizes = ModelConfig(vision=VisionConfig(hidden=32, layers=2, heads=2, patch=8, image_size=32), hidden=512, layers=6, heads=8)
    assemble.save(assemble.new_model(sizes, tokenizer), assemble.new_processor(tokenizer, 32, 8), tmp_path / "model")

    def own() -> int:
        return next(
            int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line
        )

    gc.collect()
    before, size = own(), (tmp_path / "model/model.safetensors").stat().st_size
    model, _ = assemble.load(tmp_path / "model")
    assert sum(float(parameter.detach().sum()) for parameter in model.parameters()) != 0  # all of it is read
    assert size > 40e6 and own() - before < size / 4


def test_a_trial_at_its_last_step_ends_by_itself(tmp_path):
    """Stopped there, it might be cut off before its model and done.json are written."""
    found = run(scheduler(tmp_path / "decisions.jsonl"), [[1.0] * 9])
    assert list(found.values()) == [TrialScheduler.CONTINUE] * 9
