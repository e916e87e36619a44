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


def pick(log_MV, token_M):
    return log_MV.gather(-1, token_M[:, None])[:, 0]


def stack(sequences: list[Sequence], name: str):
    return torch.cat([getattr(s, name) for s in sequences]).float()


def make_batch(sequences: list[Sequence], alpha: float, temperature: float) -> losses.Batch:
    """The library's view of the same responses; sequence numbers are neither dense nor sorted."""
    token = torch.tensor([y for s in sequences for y in s.tokens])
    sequence = torch.tensor([7 * (len(sequences) - i) for i, s in enumerate(sequences) for _ in s.tokens])
    step = torch.tensor([t for s in sequences for t in range(len(s.tokens))])
    log_p = log_probabilities(stack(sequences, "teacher"), temperature, MASK)
    log_old = log_probabilities(stack(sequences, "writer"), temperature, MASK)
    mixture = pick(mix([log_p, log_old], [alpha, 1 - alpha]), token)
    return losses.Batch(token, sequence, step, mixture, pick(log_old, token))


def library_reverse_kl(sequences: list[Sequence], loss: LossConfig):
    """[(value, gradient)] of L_single and L_long."""
    logits = stack(sequences, "student").requires_grad_()
    batch = make_batch(sequences, loss.alpha, loss.temperature)
    terms = losses.compare(logits, stack(sequences, "teacher"), batch.token, loss.temperature, MASK, soft=True)
    single, long, metrics = losses.reverse_kl(terms, batch, loss)
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


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_gradient_in_closed_form(temperature):
    """All three at once against autograd in float64, and in chunks, some of them empty."""
    sequences = make_sequences()
    student, teacher = (torch.cat([getattr(s, name) for s in sequences]) for name in ("student", "teacher"))
    token = torch.tensor([y for s in sequences for y in s.tokens])
    logits, weights = student.clone().requires_grad_(), torch.randn(3, len(token), dtype=torch.float64)
    log_q, log_p = (torch.log_softmax(x[:, ALLOWED] / temperature, -1) for x in (logits, teacher))
    at = torch.tensor([ALLOWED.index(int(y)) for y in token])
    reverse, forward = (log_q.exp() * (log_q - log_p)).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
    expected = torch.stack([pick(log_q, at), reverse, forward])
    (grad,) = torch.autograd.grad((weights * expected).sum(), logits)
    for chunks in (1, 4, len(token) + 3):
        again = student.clone().requires_grad_()
        terms = losses.in_chunks(
            lambda q, p, y: losses.compare(q, p, y, temperature, MASK, soft=True), chunks, again, teacher, token
        )
        found = torch.stack([terms.log_q, terms.reverse_kl, terms.forward_kl])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad((weights * found).sum(), again)[0], grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(terms.log_p, pick(log_p, at).detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(terms.entropy, -(log_q.exp() * log_q).sum(-1).detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(terms.agreement, (log_q.argmax(-1) == log_p.argmax(-1)).double())


@pytest.mark.parametrize("chunks", [1, 3])
def test_gradients_that_are_made_at_once(chunks):
    """Through a head, in float64: the same value and gradients as by autograd, of an objective that is linear in its terms."""
    sequences = make_sequences()
    teacher = torch.cat([s.teacher for s in sequences])
    token = torch.tensor([y for s in sequences for y in s.tokens])
    weights = torch.randn(3, len(token), dtype=torch.float64)
    head = torch.nn.Linear(6, V, dtype=torch.float64)
    hidden = torch.randn(len(token), 6, dtype=torch.float64, requires_grad=True)

    def make(hidden, teacher, token):
        return losses.compare(head(hidden), teacher, token, 1.3, MASK, soft=True)

    def objective(terms):
        return (weights * torch.stack([terms.log_q, terms.reverse_kl, terms.forward_kl])).sum()

    inputs = [hidden, head.weight, head.bias]
    expected = objective(make(hidden, teacher, token))
    gradients = torch.autograd.grad(3 * expected, inputs)
    weighs = losses.derivatives(objective, losses.Terms(*torch.zeros(6, len(token), dtype=torch.float64)))
    value, terms = losses.at_once(make, objective, weighs, chunks, [head.weight, head.bias], hidden, teacher, token)
    assert not any(term.requires_grad for term in terms)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(torch.autograd.grad(3 * value, inputs), gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_reuse_clips_some_ratios_and_not_all():
    sequences = make_sequences(reused=True)
    loss = LossConfig(updates_per_rollout=2)
    batch = make_batch(sequences, loss.alpha, loss.temperature)
    log_q = pick(log_probabilities(stack(sequences, "student"), 1.0, MASK), batch.token)
    rho = (log_q - batch.log_mixture).exp()
    inside = (rho > 0.8) & (rho < 1.2)
    assert (rho > 1.2).any() and (rho < 0.8).any() and inside.any()
    flat = library_reverse_kl(sequences, loss)[1][1].norm(dim=-1) == 0
    assert flat.any() and not flat[inside & (losses.returns(batch.log_mixture, batch, True) != 0)].any()


@pytest.mark.parametrize("name", ["sft", "kd", "kd at T=2", "forward_kl", "pretrain, reference preset"])
def test_written_responses(name):
    sequences = make_sequences()
    logits = stack(sequences, "student").requires_grad_()
    token = torch.tensor([y for s in sequences for y in s.tokens])
    hard, soft = (losses.compare(logits, stack(sequences, "teacher"), token, T, MASK, soft=True) for T in (1.0, 2.0))
    alone = losses.compare(logits, None, token, 1.0, MASK)
    for s in sequences:
        s.student.requires_grad_()
    entropy, forward = reference.cross_entropy(sequences, ALLOWED), reference.forward_kl(sequences, ALLOWED)
    value, expected = {
        "sft": lambda: (losses.cross_entropy(alone), entropy),
        "kd": lambda: (losses.distillation(hard, 0.3, 1.0), 0.3 * forward + 0.7 * entropy),
        "kd at T=2": lambda: (
            losses.distillation(hard._replace(forward_kl=soft.forward_kl), 0.6, 2.0),
            reference.distillation(sequences, ALLOWED, 0.6, 2.0),
        ),
        "forward_kl": lambda: (hard.forward_kl.sum(), forward),
        "pretrain, reference preset": lambda: (
            0.5 * losses.cross_entropy(hard) + 0.5 * hard.forward_kl.sum(),
            0.5 * entropy + 0.5 * forward,
        ),
    }[name]()
    compare(value, torch.autograd.grad(value, logits)[0], expected, gradient(expected, sequences), name)


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.1, 1.7), (0.5, 1.0), (1.0, 1.7)])
def test_generalised_jsd(beta, temperature):
    sequences = make_sequences()
    logits, teacher = stack(sequences, "student").requires_grad_(), stack(sequences, "teacher").requires_grad_()
    value = losses.generalised_jsd(logits, teacher, temperature, MASK, beta).sum()
    for s in sequences:
        s.student.requires_grad_()
    expected = reference.generalised_jsd(sequences, ALLOWED, beta, temperature)
    grad, none = torch.autograd.grad(value, [logits, teacher], materialize_grads=True)
    compare(value, grad, expected, gradient(expected, sequences), f"beta {beta}")
    assert not none.any()


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
    token = torch.tensor([y for s in sequences for y in s.tokens])
    terms = losses.compare(logits, stack(sequences, "teacher"), token, 2.0, MASK, soft=True)
    value = losses.distillation(terms, 0.5, 2.0) + terms.forward_kl.sum()
    value = value + sum(losses.generalised_jsd(logits, stack(sequences, "teacher"), 1.0, MASK, beta).sum() for beta in (0.1, 0.9))
    assert torch.isfinite(torch.autograd.grad(value, logits)[0]).all()
