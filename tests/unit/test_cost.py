"""What a run is said to cost: weights and FLOPs against counters, memory against measurement, remedies, time, the job."""

import runpy
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, Qwen2_5_VLConfig

from geodistill.config import Config, ModelConfig, TrainConfig, as_yaml, changed, load
from geodistill.data.rows import Responses, Rows, respond
from geodistill.distill.cache import new_cache
from geodistill.distill.step import Distiller
from geodistill.models.cost import TOKENS, architecture, shape, size
from geodistill.models.row_model import RowModel
from geodistill.models.tuning import tune
from geodistill.train import plan
from geodistill.train.stage import Stage, stages

VOCABULARY, TEXT, RESPONSE, MICROS = 1000, 12, 5, 2
TEACHER = {"hidden": 256, "layers": 3, "heads": 4, "intermediate": 688}
STUDENT = {"hidden": 192, "layers": 3, "heads": 4, "intermediate": 512}


def small(questions: int, side: int, *overrides: str) -> Config:
    """A pair of three and two million weights that sees side^2 image tokens; two images in each of two micro-batches."""
    vision = {"hidden": 64, "layers": 3, "heads": 4, "patch": 8, "image_size": 8 * side}
    sizes = [f"{role}.model.{k}={v}" for role, found in (("teacher", TEACHER), ("student", STUDENT)) for k, v in found.items()]
    tower = [f"{role}.model.vision.{key}={value}" for role in ("teacher", "student") for key, value in vision.items()]
    stage = {"images_per_micro_batch": 2, "images_per_step": 2 * MICROS, "questions_per_row": 8}
    train = [f"distill.{part}.{key}={value}" for part in ("train", "warm_start") for key, value in stage.items()]
    plans = [f"plan.questions_per_image={questions}", f"plan.prompt_tokens={TEXT}", f"plan.response_tokens={RESPONSE}"]
    fixed = ["run=/nowhere", f"data.vocabulary={VOCABULARY}", "data.images_per_group=1", "cluster.zero_stage=0"]
    return load(None, [*fixed, *sizes, *tower, *train, *plans, *overrides])


def image_rows(images: int, questions: int, patches: int) -> Rows:
    """Rows as Packer.pack makes them, with random words."""
    words = TEXT - 1
    ids = torch.randint(4, VOCABULARY, (images, patches + questions * words))
    ids[:, :patches] = 3
    branch = torch.cat([torch.zeros(patches), torch.arange(1, questions + 1).repeat_interleave(words)]).long()
    position = torch.cat([torch.arange(patches), torch.arange(patches, patches + words).repeat(questions)])
    last, start = torch.randint(4, VOCABULARY, (images, questions)), torch.full((images, questions), patches + words)
    alive = torch.ones(images, questions, dtype=torch.bool)
    code, number = torch.arange(1, questions + 1).repeat(images, 1), torch.arange(images * questions).reshape(images, questions)
    branch, position = branch.repeat(images, 1), position.repeat(images, 1)
    return Rows(torch.arange(images), ids, branch, position, last, start, alive, code, number, [])


def answers(rows: Rows) -> Responses:
    tokens = torch.randint(4, VOCABULARY, (*rows.last_Rn.shape, RESPONSE))
    return respond(rows, tokens, torch.full_like(rows.last_Rn, RESPONSE))


def measured(config: Config, stage: Stage) -> dict[str, int]:
    """moment -> the most bytes that torch's CPU allocator held, in a step made as train/loop.py makes it.

    The optimizer has its moments already. In bf16 it works on float32 copies, as DeepSpeed's does without ZeRO.
    """
    train, load = stage.train, plan.load_of(config, stage, plan.shapes(config, stage)[1].patches)
    dtype = torch.bfloat16 if config.cluster.precision == "bf16" else torch.float32
    side = config.student.model.vision.image_size
    torch.manual_seed(0)

    def pixels():
        return torch.randn(load.images, 3, side, side, dtype=dtype)

    def made(role: str):
        return AutoModelForImageTextToText.from_config(plan.models(config, stage)[role][1]).to(dtype)

    def labelled(with_teacher: bool):
        rows = image_rows(load.images, load.questions, load.prompt - load.questions * (TEXT - 1))
        return distiller.labelled(rows, answers(rows), pixels(), with_teacher)

    def rollout(number: int):
        rows = image_rows(load.images, load.questions, load.prompt - load.questions * (TEXT - 1))
        return distiller.rollout(rows, pixels(), torch.Generator().manual_seed(number))

    on_policy = train.method == "distill"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        own = made("student")
        tune(own, train.tuning, train.lora)
        if config.cluster.gradient_checkpointing:
            own.gradient_checkpointing_enable({"use_reentrant": False})
        align = nn.Linear(STUDENT["hidden"], TEACHER["hidden"], bias=False).to(dtype) if on_policy else None
        teacher, student = RowModel(made("teacher")).eval().requires_grad_(False), RowModel(own, align).to(dtype)
        trained = [p for p in student.parameters() if p.requires_grad]
        master = trained if dtype == torch.float32 else [p.detach().float().requires_grad_() for p in trained]
        optimizer = torch.optim.AdamW(master, foreach=False)
        forbidden = torch.arange(VOCABULARY) < 4
        distiller = Distiller(student, teacher, config.distill.loss, forbidden, -1, RESPONSE, shared_tower=True)
        for weight in master:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad()
        student.eval()
        with record_function("moment: rollout" if on_policy else "moment: teacher's pass"):
            drawn = [rollout(number) for number in range(MICROS)] if on_policy else []
            corpus = [labelled(not on_policy) for _ in range(MICROS)]
        student.train()
        with record_function("moment: update"):
            for item in drawn:
                distiller.on_policy_pass(student, item, 100.0, 100.0)[0].backward()
            for item in corpus:
                distiller.labelled_pass(student, item, 100.0, "pretrain" if on_policy else train.method)[0].backward()
            for weight, copy in zip(trained, master, strict=True):
                copy.grad = weight.grad.to(copy.dtype)
            optimizer.step()
    events = sorted(prof.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = accumulate(event.nbytes() if event.name() == "[memory]" else 0 for event in events)
    peaks: dict[str, int] = {}
    moment = ""
    for event, total in zip(events, held, strict=True):
        if event.name().startswith("moment: "):
            moment = event.name().removeprefix("moment: ")
        peaks[moment] = max(peaks.get(moment, 0), total)
    return peaks


LORA = ["distill.train.tuning=lora", "distill.train.lora.rank=8"]


@pytest.mark.parametrize("overrides", [[], ["cluster.gradient_checkpointing=true"], LORA], ids=["full", "checkpointing", "lora"])
@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("questions", [1, 8])
def test_memory_of_the_on_policy_loop_is_what_is_measured(questions: int, side: int, overrides: list[str]) -> None:
    config = small(questions, side, *overrides)
    compare(config, stages(config, "distill")[1], ("rollout", "update"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["distill.train.tuning=attention_and_norm"],
        ["distill.train.tuning=projector"],
        ["distill.train.tuning=bias", "cluster.gradient_checkpointing=true"],
        ["cluster.precision=bf16"],
    ],
    ids=["attention", "projector", "bias", "bf16"],
)
def test_memory_of_other_settings_is_what_is_measured(overrides: list[str]) -> None:
    config = small(4, 8, *overrides)
    compare(config, stages(config, "distill")[1], ("rollout", "update"))


def test_memory_of_the_warm_start_is_what_is_measured() -> None:
    config = small(8, 8)
    compare(config, stages(config, "distill")[0], ("teacher's pass", "update"))


def compare(config: Config, stage: Stage, moments: tuple[str, ...]) -> None:
    """Within 10 % of what is held beside weights and optimizer, whose bytes are certain and would hide an error."""
    found, truth = plan.memory(config, stage), measured(config, stage)
    for moment in moments:
        certain = sum(found[moment][name] for name in ("teacher's weights", "student's weights", "optimizer"))
        estimate = sum(found[moment].values())
        print(
            f"{moment}: {estimate / 1e6:.1f} MB for {truth[moment] / 1e6:.1f}: {estimate / truth[moment] - 1:+.1%};",
            f"beside weights and optimizer {(estimate - certain) / (truth[moment] - certain) - 1:+.1%}",
        )
        assert estimate - certain == pytest.approx(truth[moment] - certain, rel=0.1)


GEOCHAT = {"vision": {"hidden": 1024, "layers": 24, "heads": 16, "patch": 14, "image_size": 504}}
SIZES = {
    "teacher": {"hidden": 5120, "layers": 40, "heads": 40, "intermediate": 13824},
    "student": {"hidden": 4096, "layers": 32, "heads": 32, "intermediate": 11008},
}


def geochat(*overrides: str) -> Config:
    """The paper's pair on its six A100s, from the settings' sizes alone."""
    models = [f"{role}.model.{key}={value}" for role, sizes in SIZES.items() for key, value in sizes.items()]
    towers = [f"{role}.model.vision.{key}={value}" for role in SIZES for key, value in GEOCHAT["vision"].items()]
    trains = ("teacher.train", "student.train", "distill.warm_start", "distill.train")
    batches = [f"{train}.images_per_{key}" for train in trains for key in ("step=144", "micro_batch=8")]
    cluster = [f"cluster.{item}" for item in ("workers=6", "use_gpu=true", "precision=bf16", "zero_stage=2")]
    steps = ["distill.warm_start.steps=2400", "distill.train.steps=1600"]
    return load(None, ["run=/nowhere", "data.vocabulary=32000", *models, *towers, *batches, *cluster, *steps, *overrides])


def test_flops_agree_with_torchs_counter() -> None:
    """The paper counts softmax, activation and norms too, which torch leaves out; the rest is the same to the last digit."""
    config = plan.models(geochat(), stages(geochat(), "distill")[0])["student"][1]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = LlamaForCausalLM(config.text_config)
        mask = torch.empty(1, 1, TOKENS, TOKENS, dtype=torch.bool)  # none: transformers looks at values
        model(inputs_embeds=torch.empty(1, TOKENS, config.text_config.hidden_size), attention_mask=mask, use_cache=False)
    found = size(config)
    assert counter.get_total_flops() == shape(config).text_flops(TOKENS, TOKENS, TOKENS)
    assert found["flops"] == pytest.approx(counter.get_total_flops() / 1e9, rel=5e-4)
    assert found["image_flops"] == pytest.approx(19.9e3, rel=1e-3)


def test_a_cache_of_grouped_heads_is_counted_once() -> None:
    text = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2)
    model, cache = LlamaForCausalLM(text), new_cache(LlamaForCausalLM(text))
    model(torch.zeros(2, 10, dtype=torch.long), past_key_values=cache, use_cache=True)
    made = architecture(ModelConfig(), 500)
    made.text_config = text
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == 2 * shape(made).cache(10, 4)


def test_a_model_of_another_family_is_counted() -> None:
    config = Qwen2_5_VLConfig()
    text = config.get_text_config()
    text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 2, 256, 8, 2
    text.intermediate_size, config.vision_config.depth, config.vision_config.out_hidden_size = 512, 2, 256
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters())
    found = shape(config, TrainConfig())
    assert (found.weights, found.key_heads, found.layers, found.hidden) == (weights, 2, 2, 256)
    assert 0 < found.language < found.paper < weights and found.language < found.trained < weights


@pytest.mark.parametrize(
    ("tuning", "trained"),
    [
        ("full", 6_738_415_616 + 20_979_712),
        ("lora", 64 * 32 * (4 * 8192 + 3 * (4096 + 11008)) + 20_979_712),
        ("bias", 32 * (4 * 4096 + 2 * 11008 + 4096) + 65 * 4096 + 20_979_712),
        ("attention_and_norm", 32 * 4 * 4096**2 + 65 * 4096 + 20_979_712),
        ("projector", 20_979_712),
    ],
)
def test_trained_weights_of_each_policy(tuning: str, trained: int) -> None:
    config = geochat(f"distill.train.tuning={tuning}")
    assert plan.shapes(config, stages(config, "distill")[1])[1].trained == trained


# Bytes a trained weight that DeepSpeed 0.19.8 was measured to hold, with one worker (eight Linear(1000, 1000), two passes a
# step): beside the weights between two steps, and gradients in all before a step.
DEEPSPEED = {
    ("fp32", 0): (8, 4), ("fp32", 1): (12, 4), ("fp32", 2): (12, 4), ("fp32", 3): (16, 4),
    ("bf16", 0): (12, 2), ("bf16", 1): (16, 6), ("bf16", 2): (12, 4), ("bf16", 3): (16, 4),
}  # fmt: skip


@pytest.mark.parametrize(("precision", "zero"), list(DEEPSPEED))
def test_gradients_and_optimizer_are_those_of_deepspeed(precision: str, zero: int) -> None:
    config = small(1, 8, f"cluster.precision={precision}", f"cluster.zero_stage={zero}")
    stage = stages(config, "distill")[0]
    trained, found = plan.shapes(config, stage)[1].trained, plan.memory(config, stage)
    between = found["teacher's pass"]["optimizer"] + found["teacher's pass"]["gradients"]
    assert (between / trained, found["update"]["gradients"] / trained) == DEEPSPEED[precision, zero]
    if zero:
        batches = [f"{train}.images_per_step=32" for train in ("teacher.train", "student.train")]
        more = changed(config, ["cluster.workers=2", "distill.warm_start.images_per_micro_batch=1", *batches])
        spread = plan.memory(more, stages(more, "distill")[0])["update"]
        assert spread["optimizer"] == found["update"]["optimizer"] / 2
        assert spread["gradients"] == found["update"]["gradients"] / (2 if zero > 1 else 1)


def test_weights_in_shards_are_whole_in_a_rollout_alone() -> None:
    whole, shards = geochat(), geochat("cluster.zero_stage=3", "cluster.shard_teacher=true")
    before, after = (plan.memory(config, stages(config, "distill")[1]) for config in (whole, shards))
    for name in ("teacher's weights", "student's weights"):
        assert after["update"][name] == pytest.approx(before["update"][name] / 6)
    assert after["rollout"]["gathered weights"] == pytest.approx(13351.58e6 * 2 + (7063.64e6 + 4096 * 5120) * 2, rel=1e-6)
    assert after["update"]["gathered weights"] == 2e9  # stage3_max_live_parameters


def test_what_does_not_fit_is_told_with_what_helps() -> None:
    config = geochat()
    stage = stages(config, "distill")[1]
    fits, words = plan.verdict(config, stage, plan.available(config), "A100-80")
    assert not fits and "(update), 77.1 GiB free on A100-80; activations alone: " in words
    found, together = plan.remedies(config, stage, plan.available(config))
    assert not together and "cluster.gradient_checkpointing=true" in [override for override, _ in found]
    for override, left in found:
        better = changed(config, [override])
        fits, words_then = plan.verdict(better, stages(better, "distill")[1], plan.available(better), "A100-80")
        assert fits and f"{left:.1f} GiB at the peak" in words_then and f"{override} (-> {left:.1f} GiB)" in words


def test_remedies_are_joined_where_one_is_not_enough() -> None:
    config = geochat("plan.gpu=L40S-48")
    stage = stages(config, "distill")[1]
    found, together = plan.remedies(config, stage, plan.available(config))
    assert together and len(found) > 1 and found[-1][1] <= plan.available(config)
    assert [left for _, left in found] == sorted((left for _, left in found), reverse=True)
    better = changed(config, [override for override, _ in found])
    assert plan.verdict(better, stages(better, "distill")[1], plan.available(better), "L40S-48")[0]


def test_no_remedy_is_offered_that_does_not_help() -> None:
    config = small(1, 8)
    fits, words = plan.verdict(config, stages(config, "distill")[1], 0.01, "a toy")
    assert not fits and "take a larger card, more workers or smaller models; it helps, but not enough: " in words
    assert "zero_stage" not in words and "shard_teacher" not in words  # of one worker


def test_a_stage_is_stopped_before_it_fails_on_the_gpu() -> None:
    config = geochat()
    stage = stages(config, "distill")[1]
    with pytest.raises(
        ValueError, match=r"does not fit: .* on a GPU of 79.1 GiB; .*try one of cluster.gradient_checkpointing=true"
    ):
        plan.check_memory(config, stage, 79.1)
    plan.check_memory(config, stage, 200.0)
    plan.check_memory(changed(config, ["cluster.use_gpu=false"]), stage, 79.1)
    alone = stages(geochat("role=teacher"), "finetune")[0]  # without a teacher
    assert set(plan.memory(config, alone)) == {"update", "optimizer's step"}


def test_time_is_bytes_or_flops_over_the_rates_that_are_reached() -> None:
    config = geochat("plan.questions_per_image=1")
    stage = stages(config, "distill")[1]
    cost = plan.work(config, stage)
    teacher, student = plan.shapes(config, stage)
    assert teacher is not None
    rows, columns, both = 8, 1296 + 59 + 8, (teacher, student)
    read = sum(2.0 * m.language + rows * m.cache(columns, 2) for m in both)
    assert cost["decode"].read == pytest.approx(3 * 16 * read, rel=1e-3)
    assert cost["decode"].seconds(config) == pytest.approx(3 * 16 * read / (2039e9 * 0.7), rel=1e-3)  # the slower of the two
    assert cost["update"].seconds(config) == cost["update"].flops / (312e12 * 0.45)
    assert cost["update"].flops == pytest.approx(6 * 3 * rows * student.text_flops(1371, 1371, 16), rel=2e-3)
    assert cost["all-reduce"].sent == pytest.approx(5 / 6 * 2 * student.trained * (2 * 6 + 1))
    again = changed(config, ["cluster.gradient_checkpointing=true"])
    assert plan.work(again, stage)["update"].flops == pytest.approx(4 / 3 * cost["update"].flops, rel=2e-3)
    faster = changed(config, ["plan.gpu=H100-80", "plan.network=25"])
    assert cost["decode"].seconds(faster) == pytest.approx(cost["decode"].seconds(config) * 2039 / 3350)
    assert cost["all-reduce"].seconds(faster) == cost["all-reduce"].sent / 25e9
    warm = plan.work(config, stages(config, "distill")[0])
    assert warm["decode"].flops == 0 and warm["teacher's pass"].flops > 0
    alone = [plan.work(changed(config, [f"distill.loss.alpha={alpha}"]), stage) for alpha in (0, 1)]
    mixed = plan.work(changed(config, ["distill.loss.preset=gkd", "distill.loss.alpha=0.25"]), stage)
    for part in ("prefill", "decode", "teacher's pass"):  # with gkd now the one writes, now the other
        assert mixed[part].flops == pytest.approx(0.75 * alone[0][part].flops + 0.25 * alone[1][part].flops)
    assert sum(one["decode"].flops for one in alone) == pytest.approx(cost["decode"].flops)  # with a mixture both do


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["plan.py", *arguments])
    runpy.run_path(str(Path(__file__).parents[2] / "jobs/plan.py"), run_name="__main__")


def test_the_job_ends_with_0_1_or_2(tmp_path: Path, monkeypatch, capsys) -> None:
    settings = tmp_path / "config.yaml"
    file = str(settings)
    settings.write_text(as_yaml(small(4, 8)))
    run(monkeypatch, "--config", file)
    out = capsys.readouterr().out
    assert "Memory of one worker: distill/warm" in out and "GPU-hours" in out and "GeoChat-13B (paper)" in out
    assert "distill fits: " in out and "student: no folder yet" in out
    settings.write_text(as_yaml(geochat("distill.warm_start.steps=0")))
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, "--config", file)
    found = capsys.readouterr()
    assert "13048.66  13377.05" in found.out and "6760.72   6904.53" in found.out
    assert "plan: distill does not fit: " in found.err and "gradient_checkpointing=true (-> " in found.err
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--config", file, "plan.gpu=abacus")
    assert not [p for p in tmp_path.iterdir() if p.name != "config.yaml"]
