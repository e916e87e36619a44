"""The terms of the objective as free functions: each returns a sum over its tokens, its gradient and detached metrics.

Sums, not means: the caller divides by the number of tokens over all workers and accumulation steps.
p is the frozen teacher, q the student, p~ the sampling mixture; all are log-probabilities in float32.
Shapes: M response tokens in all, sorted by sequence and step; V vocabulary; B images; N image tokens; D features.
Forbidden tokens have log-probability -inf in p and q alike.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from geodistill.config import LossConfig


@dataclass
class Batch:
    """What the losses need of M response tokens.

    token, sequence, step [M]: the token, which response it belongs to, and t. log_p [M, V]: the teacher's distribution.
    log_mixture [M]: log p~(y_t). log_q_old [M]: log q(y_t) of the policy that generated, known after its first pass.
    """

    token: Tensor
    sequence: Tensor
    step: Tensor
    log_p: Tensor
    log_mixture: Tensor
    log_q_old: Tensor | None = None


def pick(log_MV: Tensor, token_M: Tensor) -> Tensor:
    """log-probability of each token, [M]."""
    return log_MV.gather(-1, token_M[:, None])[:, 0]


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) over the vocabulary, [M]. Tokens that a forbids (-inf) take no part, in value and gradient."""
    possible = torch.isfinite(log_a)
    a = torch.where(possible, log_a, 0.0)
    b = torch.where(possible, log_b, 0.0)
    return (torch.where(possible, log_a, -torch.inf).exp() * (a - b)).sum(-1)


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


def reverse_kl(log_q_MV: Tensor, batch: Batch, loss: LossConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """L_single and L_long as sums over tokens, and metrics as sums over tokens.

    L_single = sum_t [w_t or 1] KL(q_t || p_t), exact over the vocabulary.
    L_long = - sum_t w_t R_{t+1} log q_t(y_t), gradient through log q alone; with importance=sequence both terms carry the
    weight of the whole response. When a rollout is used again (updates_per_rollout > 1) L_long is PPO's clipped form
    in rho = q / p~. Without the decomposition L_single is 0 and L_long has R_t: the same expectation, noisier.
    """
    log_q = pick(log_q_MV, batch.token)
    log_p = pick(batch.log_p, batch.token)
    assert batch.log_q_old is not None
    reward = log_p - batch.log_q_old
    weight = importance(log_q, batch, loss.importance)
    divergence = kl(log_q_MV, batch.log_p)
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
        "agreement": (log_q_MV.detach().argmax(-1) == batch.log_p.argmax(-1)).float().sum(),
        "entropy": -(log_q_MV.detach().exp() * torch.where(torch.isfinite(log_q_MV), log_q_MV, 0.0).detach()).sum(),
    }
    return single, long, metrics


def cross_entropy(log_q_MV: Tensor, token_M: Tensor) -> Tensor:
    """- sum_t log q_t(y_t) over the tokens of written responses (L_pt, and the baseline sft)."""
    return -pick(log_q_MV, token_M).sum()


def distillation(log_q_MV: Tensor, log_p_MV: Tensor, token_M: Tensor, alpha: float, temperature: float) -> Tensor:
    """Equation 3 on written responses: sum_t alpha T^2 KL(p || q at T) + (1 - alpha) CE.

    log_q_MV, log_p_MV: log-probabilities at temperature 1, from which those at T follow.
    """
    hard = cross_entropy(log_q_MV, token_M)
    soft_q, soft_p = (torch.log_softmax(x / temperature, dim=-1) for x in (log_q_MV, log_p_MV))
    return alpha * temperature**2 * kl(soft_p, soft_q).sum() + (1 - alpha) * hard


def forward_kl(log_q_MV: Tensor, log_p_MV: Tensor) -> Tensor:
    """sum_t KL(p_t || q_t): the half that the preset `reference` adds to the language-modelling term."""
    return kl(log_p_MV, log_q_MV).sum()


def alignment(z_student_BND: Tensor, z_teacher_BND: Tensor) -> Tensor:
    """1/2 sum over image tokens of || A z_S - z_T ||^2 (equation 4, as a distance to minimise)."""
    return 0.5 * F.mse_loss(z_student_BND.float(), z_teacher_BND.float(), reduction="sum")
