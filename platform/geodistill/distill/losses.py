"""The terms of the objective as free functions: each returns a sum over its tokens, its gradient and detached metrics.

Sums, not means: the caller divides by the number of tokens over all workers and accumulation steps.
p is the frozen teacher, q the student, p~ the sampling mixture; all are log-probabilities in float32.
Two distributions of M x V numbers become a few numbers a token in `compare`, a chunk of tokens at a time (`in_chunks`): what
follows works on [M] alone.
Shapes: M response tokens in all, sorted by sequence and step; V vocabulary; B images; N image tokens; D features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from geodistill.config import LossConfig

CHUNK = 12 * 2**20  # logits of a chunk: 48 MiB in float32, above the 32 MiB up to which glibc holds on to what is freed
BASELINES = ("seqkd", "gkd")  # presets with an objective of their own
BLOCK = 2**18  # of which a CPU has in hand at a time: 1 MiB
NEVER = -1e30  # the logit of a token that a response may not hold: its probability is 0, its log-probability finite


class Terms(NamedTuple):
    """What the losses need of each of M response tokens. `log_q`, `reverse_kl` and `forward_kl` carry gradients.

    log_q: log q_t(y_t). entropy: of q_t, nats. log_p: log p_t(y_t). reverse_kl: KL(q_t || p_t).
    forward_kl: KL(p_t || q_t), or what the caller puts in its place: that of another temperature, `generalised_jsd`.
    agreement: 1.0 where both find the same token most probable. All [M]; without a teacher the last four are zeros.
    """

    log_q: Tensor
    entropy: Tensor
    log_p: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    agreement: Tensor


def _blocks(logits: Tensor) -> list[slice]:
    """Rows to work on at a time: on a CPU as many as stay in its cache, because what follows reads them a dozen times."""
    rows = len(logits) if logits.is_cuda else max(1, BLOCK // logits.shape[1])
    return [slice(first, first + rows) for first in range(0, len(logits), max(1, rows))]


class _Compare(torch.autograd.Function):
    """`compare` with its gradient in closed form. Of z = logits / T, with q = softmax(z), d = log q - log p, y the token:

    d log q(y) / dz = 1_y - q;  d KL(q || p) / dz = q (d - KL(q || p));  d KL(p || q) / dz = q - p.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_q: Tensor, logits_p: Tensor | None, token: Tensor, temperature: float, forbidden: Tensor, soft: bool
    ) -> tuple[Tensor, ...]:
        wide = logits_q.dtype if logits_q.dtype == torch.float64 else torch.float32
        never = forbidden.nonzero()[:, 0]

        def log_softmax(logits: Tensor) -> Tensor:
            scaled = logits.to(wide, copy=True) if temperature == 1 else logits.to(wide) / temperature
            return torch.log_softmax(scaled.index_fill_(1, never, NEVER), dim=-1)

        kept = ctx.needs_input_grad[0]
        q = torch.empty_like(logits_q, dtype=wide) if kept else None
        difference = torch.empty_like(logits_q, dtype=wide) if kept and logits_p is not None else None
        p = torch.empty_like(logits_q, dtype=wide) if difference is not None and soft else None
        found = torch.zeros((6, len(token)), dtype=wide, device=token.device)
        own, entropy, taught, reverse, forward, same = found
        for rows in _blocks(logits_q):
            log_q, at = log_softmax(logits_q[rows]), token[rows, None]
            probability = torch.exp(log_q, out=None if q is None else q[rows])
            own[rows] = log_q.gather(-1, at)[:, 0]
            entropy[rows] = -(probability * log_q).sum(-1)
            if logits_p is None:
                continue
            log_p = log_softmax(logits_p[rows])
            best = log_q.max(-1).indices
            same[rows] = (log_p.gather(-1, best[:, None])[:, 0] == log_p.amax(-1)).to(wide)
            taught[rows] = log_p.gather(-1, at)[:, 0]
            apart = torch.sub(log_q, log_p, out=None if difference is None else difference[rows])
            reverse[rows] = (probability * apart).sum(-1)
            if soft:
                forward[rows] = -(torch.exp(log_p, out=None if p is None else p[rows]) * apart).sum(-1)
        ctx.temperature, ctx.dtype = temperature, logits_q.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(token, q, p, difference, reverse)
        terms = tuple(term.clone() for term in found)
        ctx.mark_non_differentiable(terms[1], terms[2], terms[5], *(() if logits_p is not None else terms[3:5]))
        return terms

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):  # type: ignore[override]
        own, _, _, reverse, forward, _ = gradients
        token, q, p, difference, divergence = ctx.saved_tensors
        none = torch.zeros_like(q[:, 0])
        own, reverse, forward = (none if g is None else g for g in (own, reverse, forward))
        grad = torch.empty_like(q, dtype=ctx.dtype)
        for rows in _blocks(q):
            if difference is None:
                block = q[rows] * -own[rows, None]
            else:
                constant = forward[rows] - own[rows] - reverse[rows] * divergence[rows]
                block = torch.addcmul(constant[:, None], difference[rows], reverse[rows, None]).mul_(q[rows])
                if p is not None:
                    block.addcmul_(p[rows], forward[rows, None], value=-1)
            block.scatter_add_(1, token[rows, None], own[rows, None])
            grad[rows] = block if ctx.temperature == 1 else block.div_(ctx.temperature)
        return grad, None, None, None, None, None


def compare(
    logits_q: Tensor, logits_p: Tensor | None, token: Tensor, temperature: float, forbidden: Tensor, soft: bool = False
) -> Terms:
    """Two distributions at each response token, in float32 (float64 stays so): softmax(logits / T) over what is not forbidden.

    logits_q, logits_p [M, V] (p is the teacher, without gradient; None: there is none); token [M]; forbidden bool [V];
    soft: with `forward_kl`, which is else zeros.
    """
    return Terms(*_Compare.apply(logits_q, logits_p, token, temperature, forbidden, soft))


def generalised_jsd(logits_q: Tensor, logits_p: Tensor, temperature: float, forbidden: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, [M] (Agarwal et al., GKD, ICLR 2024).

    At beta = 0 it would be 0 everywhere: KL(p || q) in its place, the limit of JSD / beta; at 1, likewise, KL(q || p). Arguments
    as in `compare`; only q has a gradient.
    """
    wide = torch.promote_types(logits_q.dtype, torch.float32)
    log_q, log_p = (
        torch.log_softmax((x.to(wide) / temperature).masked_fill(forbidden, NEVER), dim=-1) for x in (logits_q, logits_p.detach())
    )
    if beta in (0, 1):
        of, to = (log_p, log_q) if beta == 0 else (log_q, log_p)
        return (of.exp() * (of - to)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(-1)


def chunks_of(tokens: int, vocabulary: int, logits: int = CHUNK) -> int:
    """Into how many chunks M tokens should be cut, so that none has more than `logits` numbers."""
    return max(1, -(-tokens // max(1, logits // vocabulary)))


def in_chunks(make: Callable[..., Terms], count: int, *inputs: Tensor) -> Terms:
    """make(*inputs), where `make` works on `count` chunks of the M rows of all inputs in turn.

    With more than one chunk nothing that `make` computes is kept for the backward pass, which computes it again: so the memory
    of its logits is that of one chunk, whatever M (Chen et al., 2016).
    """
    if count <= 1:
        return make(*inputs)
    parts = [
        checkpoint(make, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(*(i.tensor_split(count) for i in inputs), strict=True)
    ]
    return Terms(*(torch.cat(found) for found in zip(*parts, strict=True)))


class _Ready(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        return None, None, *(known.mul_(grad) for known in ctx.saved_tensors)


def derivatives(objective: Callable[[Terms], Tensor], guess: Terms) -> Terms:
    """Of the objective by each of its terms at `guess`, [M] each: how much it weighs them."""
    leaves = Terms(*(term.detach().requires_grad_() for term in guess))
    return Terms(*torch.autograd.grad(objective(leaves), leaves, allow_unused=True, materialize_grads=True))


def weighed(objective: Callable[[Terms], Tensor], terms: Terms, weighs: Terms) -> Tensor:
    """objective(terms), with the gradient of the sum of its terms times `weighs`."""
    with torch.no_grad():
        value = objective(Terms(*(term.detach() for term in terms)))
    sums = sum((weigh * term).sum() for weigh, term in zip(weighs, terms, strict=True) if term.requires_grad)
    return value + (sums - sums.detach() if isinstance(sums, Tensor) else 0.0)


def at_once(
    make: Callable[..., Terms],
    objective: Callable[[Terms], Tensor],
    weighs: Terms,
    count: int,
    weights: list[Tensor],
    hidden: Tensor,
    *inputs: Tensor,
) -> tuple[Tensor, Terms]:
    """(objective(make(hidden, *inputs)), its terms without gradients), and the gradients of `hidden` and `weights` made at once.

    The same memory and gradients as `weighed` of `in_chunks`, without computing anything twice. weighs: the derivatives of the
    objective by each term, where they are known before.
    """
    used = [(k, weighs[k]) for k, name in enumerate(Terms._fields) if name in ("log_q", "reverse_kl", "forward_kl")]
    parts: list[Terms] = []
    gradient = torch.empty_like(hidden)
    totals = [torch.zeros_like(weight) for weight in weights]
    cuts = (i.tensor_split(count) for i in (gradient, hidden.detach(), *inputs, *(weigh for _, weigh in used)))
    for place, part, *rest in zip(*cuts, strict=True):
        part.requires_grad_()
        terms = make(part, *rest[: len(inputs)])
        asked = [(terms[k], weigh) for (k, _), weigh in zip(used, rest[len(inputs) :], strict=True) if terms[k].requires_grad]
        own, *more = torch.autograd.grad([t for t, _ in asked], [part, *weights], [w.to(t.dtype) for t, w in asked])
        place.copy_(own)
        for total, new in zip(totals, more, strict=True):
            total += new
        parts.append(Terms(*(term.detach() for term in terms)))
    terms = Terms(*(torch.cat(found) for found in zip(*parts, strict=True)))
    with torch.no_grad():
        value = objective(terms)
    return _Ready.apply(value, [gradient, *totals], hidden, *weights), terms


@dataclass
class Batch:
    """What the losses need of M response tokens, beside their `Terms`.

    token, sequence, step [M]: the token, which response it belongs to, and t.
    log_mixture [M]: log p~(y_t). log_q_old [M]: log q(y_t) of the policy that generated, known after its first pass.
    """

    token: Tensor
    sequence: Tensor
    step: Tensor
    log_mixture: Tensor
    log_q_old: Tensor | None = None


def _pad(values_M: Tensor, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """[M] -> ([S, T] with zeros behind each sequence, lengths [S], index back to [M])."""
    _, row, counts = torch.unique_consecutive(batch.sequence, return_inverse=True, return_counts=True)
    padded = values_M.new_zeros((len(counts), int(counts.max())))
    index = (row, batch.step)
    padded[index] = values_M
    return padded, counts, index


def returns(reward_M: Tensor, batch: Batch, normalise: bool, present: bool = False) -> Tensor:
    """R_{t+1} = sum of the rewards after t, [M]; normalised: divided by the number of tokens after t, 0 at the last.

    present: R_t instead, which has the reward of the present token too.
    """
    padded, counts, index = _pad(reward_M, batch)
    total = padded.flip(1).cumsum(1).flip(1)
    result = (total if present else total - padded)[index]
    if normalise:
        remaining = counts[index[0]] - batch.step - (0 if present else 1)
        result = torch.where(remaining > 0, result / remaining.clamp(min=1), 0.0)
    return result


def reference_returns(reward_M: Tensor, batch: Batch, discount: float = 0.95) -> Tensor:
    """MiniLLM's published shaping of the return, [M].

    Reward divided by 0.5 and clipped to +-100; discounted return from t on, divided by the number of tokens from t on
    (not discounted); whitened over all tokens.
    """
    padded, counts, index = _pad((reward_M / 0.5).clamp(-100, 100), batch)
    total = torch.zeros_like(padded)
    running = padded.new_zeros(len(padded))
    for t in range(padded.shape[1] - 1, -1, -1):
        running = padded[:, t] + discount * running
        total[:, t] = running
    value = total[index] / (counts[index[0]] - batch.step)
    return (value - value.mean()) * torch.rsqrt(value.var(unbiased=False) + 1e-8)


def importance(log_q_M: Tensor, batch: Batch, kind: str) -> Tensor:
    """w, detached, [M]. token: q(y_t) / p~(y_t); sequence: the product of that ratio over the whole response.

    The per-token weight is exact at alpha = 0 only; its bias grows with alpha. The sequence weight is exact
    and has the larger variance.
    """
    ratio = log_q_M.detach() - batch.log_mixture
    if kind == "sequence":
        padded, _, index = _pad(ratio, batch)
        ratio = padded.sum(1)[index[0]]
    return ratio.exp()


def reverse_kl(terms: Terms, batch: Batch, loss: LossConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """L_single and L_long as sums over tokens, and metrics as sums over tokens.

    L_single = sum_t [w_t or 1] KL(q_t || p_t), exact over the vocabulary.
    L_long = - sum_t w_t R_{t+1} log q_t(y_t), gradient through log q alone; with importance=sequence both terms carry the
    weight of the whole response. When a rollout is used again (updates_per_rollout > 1) L_long is PPO's clipped form
    in rho = q / p~. Without the decomposition L_single is 0 and L_long has R_t: the same expectation, noisier.
    """
    log_q, divergence = terms.log_q, terms.reverse_kl
    assert batch.log_q_old is not None
    reward = terms.log_p - batch.log_q_old
    weight = importance(log_q, batch, loss.importance)
    weighted = loss.single_step_weighting == "importance" or loss.importance == "sequence"
    single = (weight * divergence if weighted else divergence).sum() if loss.decompose else 0.0 * divergence.sum()
    if loss.preset == "reference":
        advantage = reference_returns(reward, batch)
    else:
        advantage = returns(reward, batch, loss.length_norm, present=not loss.decompose)
    if loss.updates_per_rollout > 1:
        rho = (log_q - batch.log_mixture).exp()
        clipped = rho.clamp(1 - loss.ratio_clip, 1 + loss.ratio_clip)
        long = -torch.minimum(rho * advantage, clipped * advantage).sum()
    else:
        long = -(weight * advantage * log_q).sum()
    metrics = {
        "reverse_kl": divergence.detach().sum(),
        "reward": reward.sum(),
        "importance": weight.sum(),
        "agreement": terms.agreement.sum(),
        "entropy": terms.entropy.sum(),
    }
    return single, long, metrics


def baseline(terms: Terms, preset: str) -> Tensor:
    """What other methods minimise on the responses of a rollout, as a sum over tokens, in place of both terms of `reverse_kl`.

    seqkd: cross-entropy on what the teacher wrote (Kim and Rush, 2016). gkd: `generalised_jsd`, which terms.forward_kl holds.
    """
    return cross_entropy(terms) if preset == "seqkd" else terms.forward_kl.sum()


def cross_entropy(terms: Terms) -> Tensor:
    """- sum_t log q_t(y_t) over the tokens of written responses (L_pt, and the baselines sft and seqkd)."""
    return -terms.log_q.sum()


def distillation(terms: Terms, alpha: float, temperature: float) -> Tensor:
    """Equation 3 on written responses: sum_t alpha T^2 KL(p || q at T) + (1 - alpha) CE. terms: `forward_kl` at T, else at 1."""
    return alpha * temperature**2 * terms.forward_kl.sum() + (1 - alpha) * cross_entropy(terms)


def alignment(z_student_BND: Tensor, z_teacher_BND: Tensor) -> Tensor:
    """1/2 sum over image tokens of || A z_S - z_T ||^2 (equation 4, as a distance to minimise)."""
    return 0.5 * F.mse_loss(z_student_BND.float(), z_teacher_BND.float(), reduction="sum")
