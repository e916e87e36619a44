"""What `jobs/benchmark.py distill` compares: the same models, prompts, losses and numbers of tokens, and the passes it claims."""

import os
import threading
from collections import Counter
from importlib.util import find_spec
from multiprocessing.connection import Connection

import pytest
import torch
from sharp import sharpen

from geodistill.benchmarks import distill as distill_benchmark
from geodistill.benchmarks.contestants import (
    LOSSES,
    MINILLM,
    OURS,
    QUESTIONS,
    RESPONSE,
    RUN,
    SAMPLES,
    TRL,
    UPDATES,
    Ours,
    Pair,
    Setting,
    make,
    prompts_of,
    samples,
    trl_trainer,
)
from geodistill.benchmarks.distill import (
    INSTALL,
    LARGE,
    SMALL,
    Shape,
    compare,
    distill_figure,
    distill_table,
    no_case,
    orders_of,
)
from geodistill.benchmarks.minillm import MiniLLM
from geodistill.benchmarks.step import NO_END, NO_GPU
from geodistill.config import ModelConfig, VisionConfig
from geodistill.distill.step import Distiller

TOWER = VisionConfig(hidden=32, layers=3, heads=2, patch=8)
TINY = Pair(
    "tiny",
    ModelConfig(vision=TOWER, hidden=32, layers=2, heads=2, intermediate=64),
    ModelConfig(vision=TOWER, hidden=48, layers=2, heads=2, intermediate=96),
)
SETTING = Setting(TINY, 4)
N = 4

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason=f"trl is not installed: {INSTALL}")


def sharp():
    """The models of SETTING with peaked distributions."""
    made = make(SETTING)
    sharpen(made.student, 1)
    sharpen(made.teacher, 2)
    return made


def gradients(student, loss) -> torch.Tensor:
    student.zero_grad()
    loss.backward()
    return torch.cat([w.grad.flatten() for w in student.parameters() if w.requires_grad and w.grad is not None])


def written(rows, responses) -> torch.Tensor:
    """The responses to all questions [SAMPLES, RESPONSE], in the order of `prompts_of`, whatever that of the rows is."""
    tokens = responses.flat[0].reshape(SAMPLES, RESPONSE)
    order = [QUESTIONS.index(question.text) for row in rows.questions for question in row]
    assert sorted(order) == list(range(SAMPLES))
    return tokens[torch.tensor(order).argsort()]


def close(a: torch.Tensor, b: torch.Tensor, share: float = 1e-4) -> bool:
    return bool((a - b).norm() < share * b.norm())


def test_all_start_from_the_same_weights_and_share_a_frozen_tower():
    one, other = make(SETTING), make(SETTING)
    for role in ("student", "teacher"):
        weights = getattr(other, role).state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in getattr(one, role).state_dict().items())
    tower = one.teacher.model.vision_tower.state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in one.student.model.vision_tower.state_dict().items())
    frozen = {name for name, weight in one.student.named_parameters() if not weight.requires_grad}
    assert frozen == {name for name, _ in one.student.named_parameters() if "vision_tower" in name}
    assert not any(weight.requires_grad for weight in one.teacher.parameters())
    assert one.forbidden.sum() == 4  # padding, start, end, image


def test_the_measured_pairs_have_the_sizes_of_their_names():
    made = make(Setting(SMALL, 64))
    sizes = [sum(weight.numel() for weight in model.parameters()) / 1e6 for model in (made.student, made.teacher)]
    assert sizes == pytest.approx([5, 30], rel=0.1)
    ids = prompts_of(made, 1)
    lengths = ids.mask_BP.sum(1) - 64
    assert lengths.min() >= 20 and lengths.max() <= 70  # with the system's words of 32 tokens before the image


def test_the_prompts_of_the_port_are_what_the_processor_makes_of_images_and_questions():
    made = make(SETTING)
    prompts = prompts_of(made, N)
    talk = [
        [{"role": "user", "content": [{"type": "image", "image": asked.image}, {"type": "text", "text": question}]}]
        for asked in samples(made.side, N)
        for question in asked.questions
    ]
    given = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    theirs = made.processor.apply_chat_template(talk, processor_kwargs={"padding": True}, **given)
    assert torch.equal(prompts.ids_BP, theirs["input_ids"]) and torch.equal(prompts.mask_BP, theirs["attention_mask"])
    torch.testing.assert_close(prompts.pixels, theirs["pixel_values"], rtol=0, atol=1e-5)


def test_loss_and_gradient_of_the_port_are_ours_in_the_first_update_and_the_next(monkeypatch):
    ours = Ours(sharp())
    made, distiller = ours.made, ours.distillers[MINILLM]
    item = distiller.rollout(*ours.batch(N), torch.Generator().manual_seed(3))
    tokens = written(item.rows, item.responses)
    port = MiniLLM(made.student, made.teacher, made.forbidden, RESPONSE)
    # the published reward alone counts forbidden tokens
    monkeypatch.setattr(port, "reward", lambda prompts, tokens: port.judged(port.teacher, prompts, tokens)[1])
    stored = port.stored(prompts_of(made, N), tokens)
    for _ in range(2):
        theirs = port.loss(stored)
        mine, _ = distiller.on_policy_pass(ours.student, item, tokens.numel(), 1)
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-4)
        assert close(gradients(made.student, mine), gradients(made.student, theirs), 1e-3)
        with torch.no_grad():
            for weight in made.student.parameters():
                weight.mul_(1.02) if weight.requires_grad else None


def test_the_published_reward_is_the_teachers_log_probability():
    made = sharp()
    port = MiniLLM(made.student, made.teacher, torch.zeros_like(made.forbidden), RESPONSE)
    tokens = torch.randint(4, 900, (SAMPLES, RESPONSE), generator=torch.Generator().manual_seed(0))
    prompts = prompts_of(made, N)
    with torch.no_grad():
        torch.testing.assert_close(port.reward(prompts, tokens), port.judged(made.teacher, prompts, tokens)[1], rtol=0, atol=1e-4)


def test_the_port_makes_the_passes_that_it_claims():
    made = make(SETTING)
    seen: dict[str, Counter] = {}
    for role in ("student", "teacher"):
        count = seen[role] = Counter()

        def note(module, args, given, count=count):
            count[given["input_ids"].shape[1], "cache" if given["use_cache"] else "whole", "pixel_values" in given] += 1

        getattr(made, role).register_forward_pre_hook(note, with_kwargs=True)
    prompts = prompts_of(made, N)
    P = prompts.ids_BP.shape[1]
    port = MiniLLM(made.student, made.teacher, made.forbidden, RESPONSE)
    stored = port.sample(prompts)
    for _ in range(UPDATES):
        port.loss(stored).backward()
    assert stored.tokens_BT.shape == (SAMPLES, RESPONSE) and not made.forbidden[stored.tokens_BT].any()

    def passes(writing: int, reading: int) -> dict:
        return {
            (P, "cache", True): writing,
            (1, "cache", False): writing * (RESPONSE - 1),
            (P + RESPONSE, "whole", True): reading,
        }

    assert seen == {"student": passes(2, 3 + UPDATES), "teacher": passes(1, 7)}


@needs_trl
def test_trl_reads_the_same_prompts_and_its_loss_and_gradient_are_ours(tmp_path):
    ours = Ours(sharp())
    made = ours.made
    before = {name: value.clone() for name, value in made.student.state_dict().items()}
    trainer = trl_trainer(made, [N], str(tmp_path), [])
    assert trainer.model is made.student and trainer.beta == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    trained = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert trained == {id(weight) for weight in made.student.parameters() if weight.requires_grad}

    prompts = prompts_of(made, N)
    trainer.model.train()
    read = trainer._prepare_inputs(list(trainer.train_dataset))
    order = [read["prompt_ids"].tolist().index(one.tolist()) for one in prompts.ids_BP]  # it shuffles
    assert sorted(order) == list(range(SAMPLES)) and torch.equal(read["prompt_mask"][order], prompts.mask_BP)
    torch.testing.assert_close(read["pixel_values"][order], prompts.pixels, rtol=0, atol=1e-5)
    assert read["completion_mask"].shape == (SAMPLES, RESPONSE) and bool(read["completion_mask"].all())
    assert not made.forbidden[read["completion_ids"]].any()

    item = ours.distillers[TRL].rollout(*ours.batch(N), torch.Generator().manual_seed(3))
    tokens = written(item.rows, item.responses)
    whole = Distiller(ours.student, ours.teacher, LOSSES[TRL], torch.zeros_like(made.forbidden), NO_END, RESPONSE, True)
    mine, _ = whole.on_policy_pass(ours.student, item, tokens.numel(), 1)
    given = {"prompt_ids": prompts.ids_BP, "prompt_mask": prompts.mask_BP, "pixel_values": prompts.pixels}
    given |= {"completion_ids": tokens, "completion_mask": torch.ones_like(tokens)}
    theirs, _, _ = trainer._compute_loss(made.student, given, None)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert close(gradients(made.student, mine), gradients(made.student, theirs), 1e-3)


def thread(target, args):
    """In place of a process: it has an end of the pipe of its own, too."""
    *rest, pipe = args
    return threading.Thread(target=target, args=(*rest, Connection(os.dup(pipe.fileno()))), daemon=True)


def test_contestants_step_in_turn_and_each_writes_all_its_tokens(monkeypatch):
    monkeypatch.setattr(distill_benchmark, "process", thread)
    rivals = [MINILLM, TRL] if find_spec("trl") else [MINILLM]
    cases = compare(SETTING, Shape(4, (N,), (1, N), 1), rivals)  # it asserts the numbers of tokens
    assert [(case["rival"], case["questions"]) for case in cases] == [(MINILLM, 1), (MINILLM, N), (TRL, N)][: len(rivals) + 1]
    for case in cases:
        for name in ("ours", "theirs"):
            one = case[name]
            assert 0 < one["rollout"] < one["seconds"] and 0 < one["cpu_rollout"] < one["cpu"]
            assert one["tokens"] == SAMPLES * RESPONSE and one["peak"] > one["extra"]
            assert len(case["runs"][OURS]) == 1
        assert case["ratio"] > 0 and case["cpu_ratio"] > 0 and len(case["ratios"]) == 1 and case["target"] is None


def test_a_contestant_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(distill_benchmark, "process", thread)
    monkeypatch.setitem(RUN, OURS, lambda *given: 1 / 0)
    with pytest.raises(RuntimeError, match=r"ours: (?s:.*)division by zero"):
        compare(SETTING, Shape(4, (), (N,), 1), [MINILLM])


def test_rounds_alternate_who_begins():
    both = [TRL, MINILLM]
    assert orders_of(Shape(4, (), (8,), 1), both) == [(OURS, 8, MINILLM), *[(MINILLM, 8, MINILLM)] * 2, (OURS, 8, MINILLM)]
    once = [(OURS, 1, TRL), (OURS, 8, TRL), (TRL, 1, TRL)]
    assert orders_of(Shape(4, (1, 8), (), 2), both) == [*once, *once[::-1], *once]
    alone = [(OURS, 1, TRL), (TRL, 1, TRL), (OURS, 8, TRL), (TRL, 8, TRL)]
    assert orders_of(Shape(4, (1, 8), (), 0, each=True), both) == alone


def test_the_number_of_questions_of_an_image_does_not_change_what_the_rivals_read():
    made = make(SETTING)
    one = prompts_of(made, 1)
    for n in (4, 8, 16):
        other = prompts_of(made, n)
        assert torch.equal(one.ids_BP, other.ids_BP) and one.pixels.shape == other.pixels.shape


def test_the_table_tells_targets_and_what_is_missing_and_the_figure_has_a_panel_for_each_shape():
    step = {"seconds": 2.0, "cpu": 1.9, "rollout": 0.5, "peak": 2**30, "extra": 2**28}
    cases = []
    for image_tokens, n in ((256, 1), (256, 8), (1296, 8)):
        slow = step | {"seconds": 9.0}
        case = no_case(SMALL.name, image_tokens, n, MINILLM) | {"ours": step, "theirs": slow, "ratio": 4.5, "cpu_ratio": 4.4}
        cases.append(case | {"ratios": [4.0, 4.5, 5.0], "target": 4.0 if n == 8 else None})
    cases.append(no_case(LARGE[0].name, 256, 8, MINILLM, NO_GPU))
    found = {"device": "cpu", "threads": 1, "samples": SAMPLES, "response_tokens": RESPONSE, "trl": None, "cases": cases}
    text = distill_table(found)
    assert INSTALL in text and NO_GPU in text and "4.00 to 5.00" in text and ">= 4.0" in text and f"{UPDATES} updates" in text
    (row,) = [line.split() for line in text.splitlines() if "256 image tokens: MiniLLM" in line]
    assert row[-2:] == ["562", "562"]  # ms a question, n=1 and n=8
    assert [ax.get_title("left").split()[0] for ax in distill_figure(found).axes] == ["256", "1296"]
