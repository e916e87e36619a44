"""Three tokens, at most three steps: every response can be listed, so the gradient's expectation is known exactly."""

import itertools

import pytest
import torch

from geodistill.config import LossConfig
from geodistill.distill import losses
from oracle.reference import relative_error

V, LIMIT, END = 3, 3, 0
PREFIXES = [prefix for n in range(LIMIT) for prefix in itertools.product(range(1, V), repeat=n)]
RESPONSES = [(*prefix, v) for prefix in PREFIXES for v in range(V) if v == END or len(prefix) == LIMIT - 1]


@pytest.fixture
def policies():
    """Tabular student (logits with gradient) and teacher (log-probabilities): one row a prefix, float64."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(len(PREFIXES), V, generator=generator, dtype=torch.float64)
    teacher = 1.5 * torch.randn(len(PREFIXES), V, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), teacher.log_softmax(-1)


def true_gradient(logits, log_p):
    """Gradient of KL(q || p) over whole responses."""
    log_q = logits.log_softmax(-1)
    total = 0.0
    for y in RESPONSES:
        rows = [PREFIXES.index(y[:t]) for t in range(len(y))]
        log_qy, log_py = (sum(table[r, v] for r, v in zip(rows, y, strict=True)) for table in (log_q, log_p))
        total = total + log_qy.exp() * (log_qy - log_py)
    return torch.autograd.grad(total, logits)[0]


def expected_gradient(logits, log_p, loss: LossConfig):
    """Sum over responses of p~(y) times the gradient that the library's losses give for y."""
    total = torch.zeros_like(logits)
    seen = 0.0
    for y in RESPONSES:
        rows, token = torch.tensor([PREFIXES.index(y[:t]) for t in range(len(y))]), torch.tensor(y)
        terms = losses.compare(logits[rows], log_p[rows], token, 1.0, torch.zeros(V, dtype=torch.bool))
        old = terms.log_q.detach()
        mixture = torch.log(loss.alpha * terms.log_p.exp() + (1 - loss.alpha) * old.exp())
        batch = losses.Batch(token, torch.zeros_like(token), torch.arange(len(y)), mixture, old)
        single, long, _ = losses.reverse_kl(terms, batch, loss)
        probability = mixture.sum().exp()
        total += probability * torch.autograd.grad(single + long, logits)[0]
        seen += float(probability)
    assert seen == pytest.approx(1.0, abs=1e-12)
    return total


def test_all_responses_are_listed():
    assert len(RESPONSES) == 1 + 2 + 4 * 3


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_sequence_weight_is_unbiased(policies, alpha):
    loss = LossConfig(alpha=alpha, importance="sequence", length_norm=False)
    assert relative_error(expected_gradient(*policies, loss), true_gradient(*policies)) <= 1e-12


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.9])
def test_without_the_decomposition_the_expectation_is_the_same(policies, alpha):
    loss = LossConfig(alpha=alpha, importance="sequence", length_norm=False, decompose=False)
    assert relative_error(expected_gradient(*policies, loss), true_gradient(*policies)) <= 1e-12


@pytest.mark.parametrize("weighting", ["none", "importance"])
def test_token_weight_is_unbiased_on_policy_only(policies, weighting):
    def error(alpha: float) -> float:
        loss = LossConfig(alpha=alpha, importance="token", single_step_weighting=weighting, length_norm=False)
        return relative_error(expected_gradient(*policies, loss), true_gradient(*policies))

    assert error(0.0) <= 1e-12
    assert error(0.2) > 1e-3
    assert error(0.8) > error(0.2)


def test_length_norm_changes_the_gradient(policies):
    loss = LossConfig(alpha=0.0, importance="sequence", length_norm=True)
    assert relative_error(expected_gradient(*policies, loss), true_gradient(*policies)) > 1e-3
