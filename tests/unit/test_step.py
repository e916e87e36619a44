"""One rollout and update on a CPU: what runs how often, finite gradients, and accumulation."""

import copy
from dataclasses import replace

import pytest
import torch
from oracle.reference import relative_error
from torch import nn

from geodistill.config import LossConfig
from geodistill.distill import losses
from geodistill.distill.step import Distiller, Experience
from geodistill.models.assemble import same_tower
from geodistill.models.row_model import RowModel

LIMIT = 12


class Calls:
    """Counts the calls of a module and the length of what it was given."""

    def __init__(self, module: nn.Module):
        self.calls = self.length = 0
        module.register_forward_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs, output) -> None:
        self.calls += 1
        self.length += len(args[0] if args else kwargs.get("pixel_values", ()))

    def take(self) -> tuple[int, int]:
        found = self.calls, self.length
        self.calls = self.length = 0
        return found


@pytest.fixture
def pair(teacher, student):
    """Fresh copies: hooks and gradients stay in one test."""
    torch.manual_seed(0)
    return RowModel(copy.deepcopy(teacher)), RowModel(copy.deepcopy(student), align=nn.Linear(32, 48))


@pytest.fixture
def make_distiller(pair, forbidden, end):
    def make(loss: LossConfig | None = None, shared_tower: bool = True) -> Distiller:
        return Distiller(pair[1], pair[0], loss or LossConfig(), forbidden, end, LIMIT, shared_tower)

    return make


def trained(model: nn.Module) -> dict:
    """Gradients by name, of the trained parameters; cleared on the way."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def joined(gradients: dict):
    return torch.cat([g.flatten() for g in gradients.values()])


def test_the_pair_shares_its_tower(teacher, student):
    assert same_tower(teacher, student)
    other = copy.deepcopy(student)
    next(other.model.vision_tower.parameters()).data[0] += 1e-3
    assert not same_tower(teacher, other)


@pytest.mark.parametrize("shared", [True, False])
def test_each_image_and_response_is_seen_once(shared, pair, make_distiller, make_packer, questions, pixels):
    """The tower runs once an image, the teacher's language model not at all after the rollout, the heads on M rows."""
    teacher, student = pair
    distiller = make_distiller(shared_tower=shared)
    towers = [Calls(m.model.model.vision_tower) for m in pair]
    language = [Calls(m.model.model.language_model) for m in pair]
    heads = [Calls(m.model.lm_head) for m in pair]

    rows = make_packer(4).pack(questions[:3])  # several rows an image
    assert len(rows.image_I) > 3
    item = distiller.rollout(rows, pixels[:3], torch.Generator().manual_seed(0))
    M = len(item.batch.token)
    steps = int(item.responses.step_RC.max()) + 1
    assert [c.take() for c in towers] == [(0, 0) if shared else (1, 3), (1, 3)]
    assert [c.take()[0] for c in language] == [1 + steps, 1 + steps]
    assert [c.take() for c in heads] == [(steps, M), (steps, M)]

    distiller.on_policy_pass(student, item, M, 48)[0].backward()
    assert [c.take()[0] for c in towers] == [0, 0]
    assert [c.take()[0] for c in language] == [0, 1]
    assert [c.take() for c in heads] == [(1, M), (1, M)]
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_without_a_share_reads_all_responses_at_once(pair, make_distiller, make_packer, questions, pixels):
    distiller = make_distiller(LossConfig(alpha=0.0))
    language, heads = (
        [Calls(part) for part in parts]
        for parts in zip(*((m.model.model.language_model, m.model.lm_head) for m in pair), strict=True)
    )
    item = distiller.rollout(make_packer(4).pack(questions[:1]), pixels[:1], torch.Generator().manual_seed(0))
    steps = int(item.responses.step_RC.max()) + 1
    passes = [c.take()[0] for c in language]
    assert passes[0] <= 2 < passes[1] == 1 + steps  # two rows: once more where the first of them ends
    assert [c.take()[1] for c in heads] == [0, len(item.batch.token)]


@pytest.mark.parametrize("method", ["distill", "kd", "sft"])
def test_chunks_of_the_loss_change_nothing(method, pair, make_packer, questions, pixels, forbidden, end):
    """Also with more of them than tokens, and whether or not the rollout's terms are taken for the first pass. In float64, where
    the order of a sum does not show; what a rollout knows is in float32."""
    teacher, student = (copy.deepcopy(model).double() for model in pair[:2])
    packer, pixels = make_packer(5), pixels.double()
    rows = packer.pack(questions[:2])
    loss = LossConfig(kd_temperature=2.0)
    whole, small = (
        Distiller(student, teacher, loss, forbidden, end, LIMIT, True, chunk) for chunk in (2**23, 7 * len(forbidden))
    )
    if method == "distill":
        item = whole.rollout(rows, pixels[:2], torch.Generator().manual_seed(0))
        assert whole.chunks(len(item.batch.token)) == 1 and small.chunks(len(item.batch.token)) > 5

        known = item.guess

        def run(distiller: Distiller, chunks: int, first: bool):
            item.guess = known if first else None
            return distiller.on_policy_pass(student, item, 1.0, 1.0, chunks)[0]
    else:
        written = whole.labelled(rows, packer.answers(rows), pixels[:2], with_teacher=method == "kd")

        def run(distiller: Distiller, chunks: int, first: bool):
            return distiller.labelled_pass(student, written, 1.0, method, chunks)[0]

    gradients = {}
    for first in (True, False):
        found = []
        for distiller, chunks in ((whole, 1), (small, 1), (small, 1000)):
            value = run(distiller, chunks, first)
            value.backward()
            found.append((value.detach(), joined({k: g for k, g in trained(student).items() if g is not None})))
        for value, grad in found[1:]:
            torch.testing.assert_close(value, found[0][0], rtol=1e-12, atol=1e-12)
            assert relative_error(grad, found[0][1]) <= 1e-12
        gradients[first] = found[0][1]
    assert relative_error(gradients[True], gradients[False]) <= 1e-6


def test_a_trained_tower_gets_gradients(teacher, student, forbidden, end, make_packer, questions, pixels):
    free = RowModel(copy.deepcopy(student).requires_grad_(), freeze_tower=False)
    frozen = RowModel(copy.deepcopy(teacher))
    distiller = Distiller(free, frozen, LossConfig(align=0.0), forbidden, end, LIMIT, shared_tower=True)
    item = distiller.rollout(make_packer(8).pack(questions[:2]), pixels[:2], torch.Generator().manual_seed(0))
    assert item.features is None
    distiller.on_policy_pass(free, item, len(item.batch.token), 32)[0].backward()
    assert free.model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(),
        LossConfig(preset="reference"),
        LossConfig(importance="sequence", length_norm=False),
        LossConfig(single_step_weighting="importance", temperature=1.5, alpha=0.0),
        LossConfig(updates_per_rollout=2, alpha=1.0),
        LossConfig(preset="seqkd", alpha=1.0),
        LossConfig(preset="gkd", alpha=0.0),
        LossConfig(preset="gkd", alpha=1.0, gkd_beta=0.0, temperature=1.5),
    ],
)
def test_on_policy_pass(loss, pair, make_distiller, make_packer, questions, pixels):
    distiller = make_distiller(loss)
    item = distiller.rollout(make_packer(8).pack(questions[:2]), pixels[:2], torch.Generator().manual_seed(0))
    M = len(item.batch.token)
    other = replace(item, batch=replace(item.batch), guess=None)  # as where decoding has not told the terms
    assert item.guess is not None or loss.alpha in (0.0, 1.0)  # a model that did not write knows nothing
    distiller.on_policy_pass(pair[1], other, M, 32)[0].backward()
    twice = joined(trained(pair[1]))
    sharded = replace(item, batch=replace(item.batch))  # as where the head's weights lie in shards
    distiller.on_policy_pass(pair[1], sharded, M, 32, chunks=3)[0].backward()
    in_shards = joined(trained(pair[1]))
    total, metrics = distiller.on_policy_pass(pair[1], item, M, 32)
    expected = (metrics["single"] + metrics["long"]) / M + loss.align * metrics["align"] / 32
    torch.testing.assert_close(total, expected)
    total.backward()
    gradients = trained(pair[1])
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    assert max(relative_error(joined(gradients), other) for other in (twice, in_shards)) <= 1e-5
    assert gradients["align.weight"].abs().max() > 0 and gradients["model.lm_head.weight"].abs().max() > 0
    assert not any("vision_tower" in name for name in gradients)
    assert metrics["reverse_kl"] / M > 0.1 and 0 < item.length <= LIMIT and 0 <= item.finished <= 1


@pytest.mark.parametrize(("alpha", "temperature"), [(0.2, 1.0), (0.7, 1.5), (0.0, 1.0)])
def test_rollout_records_the_mixture(alpha, temperature, pair, make_distiller, make_packer, questions, pixels):
    """log p and log p~ are those of alpha p + (1 - alpha) q at T, recomputed with a full forward of both models."""
    distiller = make_distiller(LossConfig(alpha=alpha, temperature=temperature))
    item = distiller.rollout(make_packer(8).pack(questions[:2]), pixels[:2], torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, q = (
            torch.softmax(m(item.rows, item.responses, item.features)[0][:, ~distiller.forbidden] / temperature, -1) for m in pair
        )
    kept = pair[0].head(item.kept).detach()[:, ~distiller.forbidden] / temperature
    torch.testing.assert_close(torch.log_softmax(kept, -1), p.log(), rtol=1e-4, atol=1e-4)
    at = (~distiller.forbidden).cumsum(0)[item.batch.token] - 1
    mixture = torch.log(alpha * p + (1 - alpha) * q).gather(-1, at[:, None])[:, 0]
    torch.testing.assert_close(item.batch.log_mixture, mixture, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["seqkd", "gkd"])
def test_baselines_on_a_rollout(preset, pair, make_distiller, make_packer, questions, pixels):
    """Their objective from a plain forward of both models, and the gradient of the student's head."""
    loss = LossConfig(preset=preset, alpha=1.0, align=0.0)
    distiller = make_distiller(loss)
    item = distiller.rollout(make_packer(8).pack(questions[:2]), pixels[:2], torch.Generator().manual_seed(0))
    token = item.batch.token
    log_p, log_q = (
        torch.log_softmax(m(item.rows, item.responses, item.features)[0].masked_fill(distiller.forbidden, -1e9), -1) for m in pair
    )
    log_p, middle = log_p.detach(), (0.5 * log_p.detach().exp() + 0.5 * log_q.exp()).clamp(min=1e-30).log()
    cross_entropy = -log_q.gather(-1, token[:, None]).sum()
    jsd = 0.5 * (log_p.exp() * (log_p - middle)).sum() + 0.5 * (log_q.exp() * (log_q - middle)).sum()
    expected = (cross_entropy if preset == "seqkd" else jsd) / len(token)
    head = pair[1].model.lm_head.weight
    (grad,) = torch.autograd.grad(expected, head)
    total, metrics = distiller.on_policy_pass(pair[1], item, len(token), 1.0)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    assert metrics["long"] == 0
    total.backward()
    assert relative_error(head.grad, grad) <= 1e-5


def test_gkd_lets_one_model_write_a_micro_batch(make_distiller, make_packer, questions, pixels):
    """A share alpha of them is the teacher's alone, drawn from the generator of the micro-batch."""
    distiller, wrote = make_distiller(LossConfig(preset="gkd", alpha=0.3)), []
    for seed in range(24):
        item = distiller.rollout(make_packer(8).pack(questions[:1]), pixels[:1], torch.Generator().manual_seed(seed))
        assert item.guess is None or torch.equal(item.guess.log_q, item.batch.log_mixture)
        wrote.append("teacher" if item.guess is None else "student")
    assert 3 <= wrote.count("teacher") <= 12


def test_reuse_keeps_the_policy_that_generated(pair, make_distiller, make_packer, questions, pixels):
    distiller = make_distiller(LossConfig(updates_per_rollout=2))
    item = distiller.rollout(make_packer(8).pack(questions[:2]), pixels[:2], torch.Generator().manual_seed(0))
    M = len(item.batch.token)
    first, first_metrics = distiller.on_policy_pass(pair[1], item, M, 32)
    old = item.batch.log_q_old.clone()
    first.backward()
    with torch.no_grad():
        for p in pair[1].parameters():
            if p.grad is not None:
                p -= 1e-2 * p.grad
    _, second_metrics = distiller.on_policy_pass(pair[1], item, M, 32)
    assert torch.equal(item.batch.log_q_old, old)
    assert second_metrics["reward"] == first_metrics["reward"]
    assert second_metrics["reverse_kl"] != first_metrics["reverse_kl"]


@pytest.mark.parametrize("method", ["sft", "kd", "pretrain", "pretrain with teacher"])
def test_labelled_pass(method, pair, make_distiller, make_packer, questions, pixels):
    distiller, packer = make_distiller(), make_packer(8)
    rows = packer.pack(questions[:2])
    with_teacher = method in ("kd", "pretrain with teacher")
    item = distiller.labelled(rows, packer.answers(rows), pixels[:2], with_teacher)
    total, metrics = distiller.labelled_pass(pair[1], item, item.tokens, method.split()[0])
    entropy = metrics["cross_entropy"] / item.tokens
    assert (item.kept is not None) == with_teacher
    if with_teacher:
        logits = pair[1](rows, item.responses, item.features)[0]
        log_q, log_p = (torch.log_softmax(x[:, ~distiller.forbidden], -1) for x in (logits, pair[0].head(item.kept)))
        forward = (log_p.exp() * (log_p - log_q)).sum()
        entropy = 0.5 * entropy + 0.5 * forward / item.tokens  # kd_alpha = 0.5 at T = 1 too
    torch.testing.assert_close(total, entropy)
    total.backward()
    gradients = trained(pair[1])
    assert all(torch.isfinite(g).all() for name, g in gradients.items() if not name.startswith("align"))


def test_no_labelled_answer_still_runs_backward(pair, make_distiller, make_packer, questions, pixels):
    """A micro-batch without a valid token gives a loss of 0 and gradients of 0, so that workers stay in step."""
    distiller, packer = make_distiller(), make_packer(8)
    hidden = [[replace(q, response=None) for q in asked] for asked in questions[:2]]
    rows = packer.pack(hidden)
    for method, with_teacher in (("sft", False), ("kd", True)):
        item = distiller.labelled(rows, packer.answers(rows), pixels[:2], with_teacher)
        assert item.tokens == 0
        total, _ = distiller.labelled_pass(pair[1], item, 10, method)
        total.backward()
        gradients = trained(pair[1])
        assert total.item() == 0
        assert all((g == 0).all() for name, g in gradients.items() if not name.startswith("align"))


def merge(packer, questions, parts: list[Experience]) -> Experience:
    """The same rollouts as one micro-batch: the sampled tokens packed anew."""
    written = []
    for part in parts:
        token, sequence, _ = part.responses.flat
        counts = torch.unique_consecutive(sequence, return_counts=True)[1]
        written += [answer.tolist() for answer in token.split(counts.tolist())]
    answers = iter(written)
    rows = packer.pack([[replace(q, response=next(answers)) for q in asked] for asked in questions])
    responses = packer.answers(rows)
    token, sequence, step = responses.flat
    assert torch.equal(token, torch.cat([p.batch.token for p in parts]))
    names = ("features", "pixels", "z_teacher", "kept")
    features, pixels, z, kept = (torch.cat([getattr(p, name) for p in parts]) for name in names)
    batch = losses.Batch(token, sequence, step, torch.cat([p.batch.log_mixture for p in parts]))
    return Experience(rows, responses, features, pixels, z, kept, batch, None, 0.0, 0.0)


def test_accumulation_of_rollouts(pair, make_distiller, make_packer, questions, pixels):
    """Two micro-batches of different sizes, each divided by the counts of both, equal one big batch."""
    distiller, packer, student = make_distiller(), make_packer(5), pair[1]
    halves = [slice(0, 3), slice(3, 4)]
    parts = [distiller.rollout(packer.pack(questions[s]), pixels[s], torch.Generator().manual_seed(0)) for s in halves]
    tokens, image_tokens = sum(len(p.batch.token) for p in parts), 4 * 16
    for part in parts:
        distiller.on_policy_pass(student, part, tokens, image_tokens)[0].backward()
    accumulated = joined(trained(student))
    whole = merge(packer, questions[:4], parts)
    distiller.on_policy_pass(student, whole, tokens, image_tokens)[0].backward()
    error = relative_error(accumulated, joined(trained(student)))
    print(f"on-policy: {error:.1e}")
    assert error <= 1e-4


@pytest.mark.parametrize("method", ["sft", "kd"])
def test_accumulation_of_written_answers(method, pair, make_distiller, make_packer, questions, pixels):
    distiller, packer, student = make_distiller(), make_packer(5), pair[1]
    student.align = None

    def item(part: slice):
        rows = packer.pack(questions[part])
        return distiller.labelled(rows, packer.answers(rows), pixels[part], with_teacher=method == "kd")

    parts, whole = [item(slice(0, 3)), item(slice(3, 4))], item(slice(0, 4))
    assert whole.tokens == sum(p.tokens for p in parts)
    for part in parts:
        distiller.labelled_pass(student, part, whole.tokens, method)[0].backward()
    accumulated = joined(trained(student))
    distiller.labelled_pass(student, whole, whole.tokens, method)[0].backward()
    error = relative_error(accumulated, joined(trained(student)))
    print(f"{method}: {error:.1e}")
    assert error <= 1e-4
