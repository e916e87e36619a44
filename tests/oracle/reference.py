"""The terms of the objective in float64, written from the method's page with loops over sequences and tokens.

Nothing here comes from the library. Forbidden tokens are left out of every distribution instead of masked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sequence:
    """One response: its tokens, and logits [L, V] in float64 of the student now, the teacher, and the student that wrote it."""

    tokens: list[int]
    student: Tensor
    teacher: Tensor
    writer: Tensor


def relative_error(value: Tensor, expected: Tensor) -> float:
    """|| value - expected || / || expected ||."""
    return float((value.detach().double() - expected.detach()).norm() / expected.detach().norm())


def softmax(logits_V: Tensor, allowed: list[int], temperature: float = 1.0) -> dict[int, Tensor]:
    top = max(float(logits_V[v].detach()) for v in allowed)
    raised = {v: torch.exp((logits_V[v] - top) / temperature) for v in allowed}
    total = sum(raised.values())
    return {v: x / total for v, x in raised.items()}


def divergence(a: dict[int, Tensor], b: dict[int, Tensor]) -> Tensor:
    return sum(a[v] * (torch.log(a[v]) - torch.log(b[v])) for v in a)


def plain_returns(rewards: list[float], normalise: bool) -> list[float]:
    n = len(rewards)
    found = []
    for t in range(n):
        total = sum(rewards[k] for k in range(t + 1, n))
        found.append((total / (n - 1 - t) if t < n - 1 else 0.0) if normalise else total)
    return found


def minillm_returns(rewards: list[list[float]]) -> list[list[float]]:
    """From t on, discount 0.95 over the undiscounted count, reward / 0.5 clipped to +-100, whitened over all tokens."""
    scaled = [[min(max(r / 0.5, -100.0), 100.0) for r in row] for row in rewards]
    raw = [
        [sum(0.95 ** (k - t) * row[k] for k in range(t, len(row))) / (len(row) - t) for t in range(len(row))] for row in scaled
    ]
    flat = [x for row in raw for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / len(flat)
    return [[(x - mean) / (variance + 1e-8) ** 0.5 for x in row] for row in raw]


def reverse_kl(
    sequences: list[Sequence],
    allowed: list[int],
    alpha: float = 0.2,
    temperature: float = 1.0,
    weighted_single: bool = False,
    importance: str = "token",
    length_norm: bool = True,
    preset: str = "paper",
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(L_single, L_long) as sums over tokens. clip: the rollout is used again."""
    q, p, log_q, rewards, ratios = [], [], [], [], []
    for s in sequences:
        q.append([softmax(row, allowed, temperature) for row in s.student])
        p.append([softmax(row, allowed, temperature) for row in s.teacher])
        wrote = [softmax(row, allowed, temperature) for row in s.writer]
        log_q.append([torch.log(q_t[y]) for q_t, y in zip(q[-1], s.tokens, strict=True)])
        rewards.append([float(torch.log(a[y]) - torch.log(b[y])) for a, b, y in zip(p[-1], wrote, s.tokens, strict=True)])
        mixture = [alpha * float(a[y]) + (1 - alpha) * float(b[y]) for a, b, y in zip(p[-1], wrote, s.tokens, strict=True)]
        ratios.append([q_t[y] / m for q_t, y, m in zip(q[-1], s.tokens, mixture, strict=True)])
    advantages = minillm_returns(rewards) if preset == "reference" else [plain_returns(r, length_norm) for r in rewards]

    single = long = torch.zeros((), dtype=torch.float64)
    for i, s in enumerate(sequences):
        product = 1.0
        for ratio in ratios[i]:
            product *= float(ratio.detach())
        for t in range(len(s.tokens)):
            w = product if importance == "sequence" else float(ratios[i][t].detach())
            single = single + (w if weighted_single or importance == "sequence" else 1.0) * divergence(q[i][t], p[i][t])
            if clip is None:
                long = long - w * advantages[i][t] * log_q[i][t]
            else:
                rho = ratios[i][t]
                held = min(max(float(rho.detach()), 1 - clip), 1 + clip)
                free, bound = rho * advantages[i][t], held * advantages[i][t]
                long = long - (free if float(free.detach()) <= bound else bound)
    return single, long


def cross_entropy(sequences: list[Sequence], allowed: list[int]) -> Tensor:
    return -sum(torch.log(softmax(s.student[t], allowed)[y]) for s in sequences for t, y in enumerate(s.tokens))


def forward_kl(sequences: list[Sequence], allowed: list[int], temperature: float = 1.0) -> Tensor:
    return sum(
        divergence(softmax(s.teacher[t], allowed, temperature), softmax(s.student[t], allowed, temperature))
        for s in sequences
        for t in range(len(s.tokens))
    )


def generalised_jsd(sequences: list[Sequence], allowed: list[int], beta: float, temperature: float = 1.0) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for s in sequences:
        for row_q, row_p in zip(s.student, s.teacher, strict=True):
            q, p = softmax(row_q, allowed, temperature), softmax(row_p, allowed, temperature)
            if beta in (0, 1):
                total = total + (divergence(p, q) if beta == 0 else divergence(q, p))
                continue
            m = {v: beta * p[v] + (1 - beta) * q[v] for v in allowed}
            total = total + beta * divergence(p, m) + (1 - beta) * divergence(q, m)
    return total


def distillation(sequences: list[Sequence], allowed: list[int], alpha: float, temperature: float) -> Tensor:
    soft = forward_kl(sequences, allowed, temperature)
    return alpha * temperature**2 * soft + (1 - alpha) * cross_entropy(sequences, allowed)


def alignment(z_student: Tensor, z_teacher: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for a_ND, b_ND in zip(z_student, z_teacher, strict=True):
        for a_D, b_D in zip(a_ND, b_ND, strict=True):
            total = total + 0.5 * sum((x - y) ** 2 for x, y in zip(a_D, b_D, strict=True))
    return total
