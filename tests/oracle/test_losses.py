"""Every term of the objective, value and gradient: the library in float32 against the float64 reference."""

import pytest
import torch

from geodistill.config import LossConfig
from geodistill.distill import losses
from geodistill.distill.decode import log_probabilities, mix
from oracle import reference
from oracle.reference import Sequence, relative_error

V, FORBIDDEN = 9, [0, 4]
ALLOWED = [v for v in range(V) if v not in FORBIDDEN]
MASK = torch.tensor([v in FORBIDDEN for v in range(V)])
LENGTHS = (5, 1, 8, 3, 2)

# name -> (settings of the library, settings of the reference)
REVERSE_KL = {
    "paper": ({}, {}),
    "no length norm": ({"length_norm": False}, {"length_norm": False}),
    "weighted single": ({"single_step_weighting": "importance"}, {"weighted_single": True}),
    "sequence weight": ({"importance": "sequence", "length_norm": False}, {"importance": "sequence", "length_norm": False}),
    "sequence weight, norm": ({"importance": "sequence"}, {"importance": "sequence"}),
    "temperature": ({"temperature": 1.7}, {"temperature": 1.7}),
    "on-policy": ({"alpha": 0.0}, {"alpha": 0.0}),
    "teacher writes": ({"alpha": 1.0}, {"alpha": 1.0}),
    "reference preset": ({"preset": "reference"}, {"preset": "reference"}),
    "reuse": ({"updates_per_rollout": 2}, {"clip": 0.2}),
    "reuse, reference preset": ({"updates_per_rollout": 2, "preset": "reference"}, {"clip": 0.2, "preset": "reference"}),
}


def make_sequences(reused: bool = False, lengths=LENGTHS) -> list[Sequence]:
    """Random responses with float32-representable logits. reused: the student has moved since it wrote them."""
    generator = torch.Generator().manual_seed(3)

    def draw(n: int):
        return (2 * torch.randn(n, V, generator=generator)).double()

    found = []
    for n in lengths:
        tokens = [ALLOWED[int(i)] for i in torch.randint(len(ALLOWED), (n,), generator=generator)]
        writer = draw(n)
        student = writer + (0.3 * draw(n) if reused else 0)
        teacher = writer + draw(n)
        student[:, FORBIDDEN] = 30.0  # would rule every distribution that forgets to mask
        found.append(Sequence(tokens, student.float().double(), teacher.float().double(), writer.float().double()))
    return found


def stack(sequences: list[Sequence], name: str):
    return torch.cat([getattr(s, name) for s in sequences]).float()


def make_batch(sequences: list[Sequence], alpha: float, temperature: float) -> losses.Batch:
    """The library's view of the same responses; sequence numbers are neither dense nor sorted."""
    token = torch.tensor([y for s in sequences for y in s.tokens])
    sequence = torch.tensor([7 * (len(sequences) - i) for i, s in enumerate(sequences) for _ in s.tokens])
    step = torch.tensor([t for s in sequences for t in range(len(s.tokens))])
    log_p = log_probabilities(stack(sequences, "teacher"), temperature, MASK)
    log_old = log_probabilities(stack(sequences, "writer"), temperature, MASK)
    mixture = losses.pick(mix([log_p, log_old], [alpha, 1 - alpha]), token)
    return losses.Batch(token, sequence, step, log_p, mixture, losses.pick(log_old, token))


def library_reverse_kl(sequences: list[Sequence], loss: LossConfig):
    """[(value, gradient)] of L_single and L_long."""
    logits = stack(sequences, "student").requires_grad_()
    log_q = log_probabilities(logits, loss.temperature, MASK)
    single, long, metrics = losses.reverse_kl(log_q, make_batch(sequences, loss.alpha, loss.temperature), loss)
    assert all(torch.isfinite(v) and not v.requires_grad for v in metrics.values())
    return [(term, torch.autograd.grad(term, logits, retain_graph=True)[0]) for term in (single, long)]


def gradient(term, sequences: list[Sequence]):
    return torch.cat(torch.autograd.grad(term, [s.student for s in sequences], retain_graph=True, materialize_grads=True))


def compare(value, grad, expected, expected_grad, name: str = "") -> None:
    assert torch.isfinite(grad).all()
    errors = relative_error(value, expected), relative_error(grad, expected_grad)
    print(f"{name}: value {errors[0]:.1e}, gradient {errors[1]:.1e}")
    assert max(errors) <= 1e-5


@pytest.mark.parametrize("case", REVERSE_KL)
def test_reverse_kl(case):
    settings, same = REVERSE_KL[case]
    sequences = make_sequences(reused="reuse" in case)
    if "reference" in case:
        sequences[2].teacher[4, sequences[2].tokens[4]] -= 80.0  # a reward beyond the clip
    found = library_reverse_kl(sequences, LossConfig(**settings))
    for s in sequences:
        s.student.requires_grad_()
    expected = reference.reverse_kl(sequences, ALLOWED, **same)
    for name, (value, grad), term in zip(("single", "long"), found, expected, strict=True):
        compare(value, grad, term, gradient(term, sequences), f"{case}, {name}")


def test_reuse_clips_some_ratios_and_not_all():
    sequences = make_sequences(reused=True)
    loss = LossConfig(updates_per_rollout=2)
    batch = make_batch(sequences, loss.alpha, loss.temperature)
    log_q = losses.pick(log_probabilities(stack(sequences, "student"), 1.0, MASK), batch.token)
    rho = (log_q - batch.log_mixture).exp()
    inside = (rho > 0.8) & (rho < 1.2)
    assert (rho > 1.2).any() and (rho < 0.8).any() and inside.any()
    flat = library_reverse_kl(sequences, loss)[1][1].norm(dim=-1) == 0
    assert flat.any() and not flat[inside & (losses.returns(batch.log_mixture, batch, True) != 0)].any()


@pytest.mark.parametrize("name", ["sft", "kd", "kd at T=2", "forward_kl", "pretrain, reference preset"])
def test_written_responses(name):
    sequences = make_sequences()
    logits = stack(sequences, "student").requires_grad_()
    log_q, log_p = log_probabilities(logits, 1.0, MASK), log_probabilities(stack(sequences, "teacher"), 1.0, MASK)
    token = torch.tensor([y for s in sequences for y in s.tokens])
    for s in sequences:
        s.student.requires_grad_()
    entropy, forward = reference.cross_entropy(sequences, ALLOWED), reference.forward_kl(sequences, ALLOWED)
    value, expected = {
        "sft": lambda: (losses.cross_entropy(log_q, token), entropy),
        "kd": lambda: (losses.distillation(log_q, log_p, token, 0.3, 1.0), 0.3 * forward + 0.7 * entropy),
        "kd at T=2": lambda: (
            losses.distillation(log_q, log_p, token, 0.6, 2.0),
            reference.distillation(sequences, ALLOWED, 0.6, 2.0),
        ),
        "forward_kl": lambda: (losses.forward_kl(log_q, log_p), forward),
        "pretrain, reference preset": lambda: (
            0.5 * losses.cross_entropy(log_q, token) + 0.5 * losses.forward_kl(log_q, log_p),
            0.5 * entropy + 0.5 * forward,
        ),
    }[name]()
    compare(value, torch.autograd.grad(value, logits)[0], expected, gradient(expected, sequences), name)


def test_alignment():
    generator = torch.Generator().manual_seed(0)
    z_student, z_teacher = (torch.randn(2, 5, 7, generator=generator).double() for _ in range(2))
    single = z_student.float().requires_grad_()
    value = losses.alignment(single, z_teacher.float())
    expected = reference.alignment(z_student.requires_grad_(), z_teacher)
    compare(value, torch.autograd.grad(value, single)[0], expected, torch.autograd.grad(expected, z_student)[0], "align")


@pytest.mark.parametrize("case", [c for c in REVERSE_KL if "reference" not in c])
def test_batch_composition_and_order_change_nothing(case):
    """Each response alone, all in one batch, or all in another order: the same gradient rows, the same sum.

    The reference preset whitens over the batch, so there it may change.
    """
    loss = LossConfig(**REVERSE_KL[case][0])
    sequences = make_sequences(reused="reuse" in case)
    together = library_reverse_kl(sequences, loss)
    alone = [library_reverse_kl([s], loss) for s in sequences]
    order = [3, 0, 4, 2, 1]
    shuffled = library_reverse_kl([sequences[i] for i in order], loss)
    for k in (0, 1):
        value, grad = together[k]
        torch.testing.assert_close(sum(a[k][0] for a in alone), value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.cat([a[k][1] for a in alone]), grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(shuffled[k][0], value, rtol=1e-5, atol=1e-6)
        rows = grad.split(LENGTHS)
        torch.testing.assert_close(shuffled[k][1], torch.cat([rows[i] for i in order]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_no_gradient_is_nan(scale):
    """Also where a distribution is so sharp that most probabilities underflow to 0."""
    sequences = make_sequences()
    for s in sequences:
        s.student, s.teacher, s.writer = (scale * x for x in (s.student, s.teacher, s.writer))
        s.tokens = [ALLOWED[int(i)] for i in s.teacher[:, ALLOWED].argmax(-1)]  # a token that the mixture can draw
    for settings, _ in REVERSE_KL.values():
        for value, grad in library_reverse_kl(sequences, LossConfig(**settings)):
            assert torch.isfinite(value) and torch.isfinite(grad).all()
            assert (grad[:, FORBIDDEN] == 0).all()
    logits = stack(sequences, "student").requires_grad_()
    log_q, log_p = log_probabilities(logits, 1.0, MASK), log_probabilities(stack(sequences, "teacher"), 1.0, MASK)
    token = torch.tensor([y for s in sequences for y in s.tokens])
    value = losses.distillation(log_q, log_p, token, 0.5, 2.0) + losses.forward_kl(log_q, log_p)
    assert torch.isfinite(torch.autograd.grad(value, logits)[0]).all()
