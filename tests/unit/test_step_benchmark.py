"""The paper's setting fits its cards by the plan, and the benchmark of a step does the work whose cost it tells."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from geodistill.benchmarks.step import NO_GPU, REPEATS, Step, alone, measure_step, random_model, step_table
from geodistill.config import Config, as_yaml, changed, keys, load
from geodistill.models.cost import architecture
from geodistill.train import plan
from geodistill.train.stage import stages

ROOT = Path(__file__).parents[2]
LORA, FULL = "configs/geochat-13b-to-7b.yaml", "configs/geochat-13b-to-7b-full.yaml"

# Two workers with two micro-batches of two images each; three questions an image make two rows of two (load_of rounds up).
V, PATCHES, IMAGES, ROWS, QUESTIONS, WORDS, RESPONSE, MICROS = 50, 4, 2, 4, 2, 5, 4, 2
TOWER = {"hidden": 16, "layers": 3, "heads": 2, "patch": 8, "image_size": 16}
TEACHER = {"hidden": 32, "layers": 3, "heads": 4, "intermediate": 80}
STUDENT = {"hidden": 16, "layers": 2, "heads": 2, "intermediate": 40}


def tiny(*overrides: str) -> Config:
    sizes = [f"{role}.model.{k}={v}" for role, one in (("teacher", TEACHER), ("student", STUDENT)) for k, v in one.items()]
    towers = [f"{role}.model.vision.{key}={value}" for role in ("teacher", "student") for key, value in TOWER.items()]
    trains = ("teacher.train", "student.train", "distill.warm_start", "distill.train")
    batches = {"images_per_step": 8, "images_per_micro_batch": IMAGES, "questions_per_row": 2}
    steps = [f"{train}.{key}={value}" for train in trains for key, value in batches.items()]
    plans = ["plan.questions_per_image=3", f"plan.prompt_tokens={WORDS}", f"plan.response_tokens={RESPONSE}"]
    fixed = ["run=/nowhere", f"data.vocabulary={V}", "data.images_per_group=1", "cluster.workers=2", "cluster.zero_stage=2"]
    return load(None, [*fixed, *sizes, *towers, *steps, *plans, *overrides])


def test_the_papers_settings_fit_its_cards_as_their_comments_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    for file in (LORA, FULL):
        config, text = load(file), Path(file).read_text()
        for role, job in (("teacher", "finetune"), ("student", "finetune"), ("student", "distill")):
            for stage in stages(changed(config, [f"role={role}"]), job):
                fits, words = plan.verdict(config, stage, plan.available(config), config.plan.gpu)
                assert fits, words
                if job == "distill":
                    hours = stage.train.steps * sum(cost.seconds(config) for cost in plan.work(config, stage).values()) / 3600
                    gib = words.split(" at the peak")[0].rpartition(": ")[2]
                    assert gib in text and f"{hours:.0f} hours" in text, (gib, hours)


def test_the_papers_numbers_are_in_its_setting(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load(LORA)
    assert (config.cluster.workers, config.plan.gpu, config.cluster.precision) == (6, "A100-80", "bf16")
    assert (config.distill.loss.alpha, config.student.model.vision.image_size) == (0.2, 504)
    for train in (config.teacher.first, config.teacher.train, config.distill.warm_start, config.distill.train):
        assert (train.images_per_step, train.warmup, train.tuning) == (144, 0.03, "lora")
        assert (train.lora.rank, train.lora.alpha, train.lora.dropout) == (64, 16, 0.05)
    assert (config.teacher.first.steps, config.teacher.train.steps) == (2400, 1600)
    assert (config.distill.warm_start.steps, config.distill.train.steps) == (2400, 1600)
    found = plan.shapes(config, stages(config, "distill")[-1])
    assert [round(model.paper / 1e6, 2) for model in found if model] == [13048.66, 6760.72]


def test_the_setting_for_all_weights_differs_in_what_it_says_alone(monkeypatch):
    monkeypatch.chdir(ROOT)

    def flat(file: str) -> dict:
        config = load(file, ["run=r"])
        found = {}
        for name, *_ in keys():
            value = config
            for part in name.split("."):
                value = getattr(value, part)
            found[name] = value
        return found

    lora, full = flat(LORA), flat(FULL)
    trains = ("student.train", "distill.warm_start", "distill.train")
    expected = {f"{train}.{key}" for train in trains for key in ("tuning", "learning_rate")}
    expected |= {"distill.train.images_per_micro_batch", "cluster.zero_stage"}
    assert {name for name in lora if lora[name] != full[name]} == expected


def test_random_weights_are_made_on_the_device_in_their_type(monkeypatch):
    monkeypatch.chdir(ROOT)
    made = architecture(load(LORA).teacher.model, 32000)
    model = random_model(made, torch.device("meta"), torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(13351.58e6, rel=1e-6)


def linear(d: int, layers: int, f: int) -> int:
    return layers * (4 * d**2 + 3 * d * f)


def both(of) -> float:
    return sum(of(one["hidden"], one["layers"], one["intermediate"]) for one in (TEACHER, STUDENT))


def test_flops_and_bytes_are_those_of_a_formula_written_by_hand():
    found = measure_step(tiny())
    P = PATCHES + QUESTIONS * (WORDS - 1)
    columns, middle, M = P + QUESTIONS * RESPONSE, P + QUESTIONS * RESPONSE // 2, ROWS * QUESTIONS * RESPONSE
    h, d, f, layers = TOWER["hidden"], STUDENT["hidden"], STUDENT["intermediate"], STUDENT["layers"]
    seen = PATCHES + 1  # with the class token
    image = 2 * 3 * TOWER["patch"] ** 2 * h * PATCHES
    image += TOWER["layers"] * (2 * seen * (4 * h**2 + 2 * h * 4 * h) + 4 * seen**2 * h) + 2 * PATCHES * (h * d + d**2)
    prefill = both(lambda d, L, f: 2 * ROWS * P * linear(d, L, f) + 4 * ROWS * P * P * d * L)
    tokens = ROWS * QUESTIONS
    decode = both(lambda d, L, f: 2 * tokens * (linear(d, L, f) + V * d) + 4 * tokens * middle * d * L)
    update = 2 * ROWS * columns * linear(d, layers, f) + 4 * ROWS * columns**2 * d * layers + 2 * M * V * d
    weights = both(lambda d, L, f: linear(d, L, f) + (2 * L + 1) * d + 2 * V * d)
    caches = both(lambda d, L, f: 2 * L * d * middle * ROWS)
    assert found["flops"] == {
        "tower and prefill": MICROS * (prefill + 2 * IMAGES * image),
        "decode": MICROS * RESPONSE * decode,
        "update": 2 * MICROS * 3 * update + MICROS * 2 * M * V * TEACHER["hidden"],
    }
    assert found["decode_bytes"] == MICROS * RESPONSE * 4 * (weights + caches)


class NoModules:
    """In place of torch's tracker of modules: all is counted in one place."""

    parents = frozenset({"Global"})

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ([], 0.02),
        (["cluster.gradient_checkpointing=true"], 0.02),
        (["distill.train.tuning=lora"], 0.07),
        (["distill.loss.alpha=0"], 0.02),
    ],
    ids=["full", "checkpointing", "lora", "alpha=0"],
)
def test_the_step_does_the_flops_that_are_told(overrides, error):
    """By torch's counter over the real step. In a model as small as this the adapters, which are not reckoned, weigh most."""
    config = alone(tiny(*overrides, "distill.train.lora.rank=1", "plan.questions_per_image=2"))
    step, told = Step(config), plan.work(config, stages(config, "distill")[-1])
    operators = torch.ops.aten

    def backward(grad, query, key, value, *args, **kwargs) -> int:
        return 2 * sdpa_flop_count(query, key, value)

    forward = {operators._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: sdpa_flop_count(q, k, v)}
    mapping = forward | {operators._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    counter.mod_tracker = NoModules()  # torch's own cannot be asked for the gradient of a weight
    with counter:
        step.run()
    assert sum(cost.flops for cost in told.values()) == pytest.approx(counter.get_total_flops(), rel=error)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["distill.train.tuning=lora", "cluster.precision=bf16", "cluster.gradient_checkpointing=true"],
        ["distill.loss.preset=reference", "distill.loss.align=0"],
        ["distill.loss.pretrain=0"],
    ],
    ids=["full", "lora", "reference", "no pretraining"],
)
def test_a_step_decodes_exactly_what_was_asked_for_and_learns(overrides):
    step = Step(alone(tiny(*overrides)))
    before = [weight.detach().clone() for weight in step.trained]
    frozen = [weight.detach().clone() for weight in step.teacher.parameters()]
    run = step.run()
    assert run["tokens"] == MICROS * ROWS * QUESTIONS * RESPONSE and math.isfinite(run["loss"])
    assert all(value > 0 for value in run["seconds"].values()) and not run["peak"]
    assert any(not torch.equal(old, new) for old, new in zip(before, step.trained, strict=True))
    assert all(torch.equal(old, new) for old, new in zip(frozen, step.teacher.parameters(), strict=True))
    assert all(weight.dtype == step.dtype and weight.grad is None for weight in step.student.parameters())


def test_the_load_is_that_of_one_worker_of_the_settings():
    config = tiny("cluster.shard_teacher=true")
    one = alone(config)
    of = [plan.load_of(c, stages(c, "distill")[-1], PATCHES) for c in (config, one)]
    assert of[0] == of[1] == plan.Load(IMAGES, ROWS, QUESTIONS, PATCHES + QUESTIONS * (WORDS - 1), RESPONSE, MICROS)
    assert (one.cluster.zero_stage, one.cluster.shard_teacher) == (0, False)


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    runpy.run_path(str(ROOT / "jobs/benchmark.py"), run_name="__main__")


def test_the_job_writes_its_figures_without_ray(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text(as_yaml(changed(tiny(), [f"run={tmp_path}"])))
    monkeypatch.setattr("geodistill.cluster.connect", lambda: pytest.fail("Ray was started"))
    run(monkeypatch, "step", "--config", str(tmp_path / "config.yaml"))
    out, found = capsys.readouterr().out, json.loads((tmp_path / "benchmark/step.json").read_text())
    assert found["device"] == "cpu" and len(found["seconds"]) == len(found["loss"]) == REPEATS
    assert all(math.isfinite(loss) for loss in found["loss"])
    measured = {name for name, one in found["figures"].items() if one["measured"] is not None}
    times = {"tower and prefill", "decode", "update", "optimizer's step", "decode, rate", "update, rate"}
    peaks = {f"peak memory, {moment}" for moment in ("rollout", "update", "optimizer's step")}
    assert measured == times and peaks < found["figures"].keys()
    assert all(one["ratio"] is None for one in found["figures"].values())
    assert out.count(NO_GPU) == len(found["figures"]) - len(measured) == 6 and step_table(found) in out


def test_what_cannot_be_run_here_is_refused_before_a_weight_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.sysconf", lambda name: 2**16)  # pages of as many bytes: 4 GiB
    for overrides, words in (([], "no GPU"), (["cluster.use_gpu=false", "distill.train.tuning=full"], "GiB (optimizer's step)")):
        with pytest.raises(SystemExit, match="1"):
            run(monkeypatch, "step", "--config", LORA, f"run={tmp_path}", *overrides)
        assert words in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "jobs.jsonl"}  # what is told of every job
