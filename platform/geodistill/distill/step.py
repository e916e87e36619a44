"""One rollout and the passes of one update, on plain torch modules: testable without ray or deepspeed.

A step is: roll out every micro-batch, count tokens over all workers, then one backward per pass. `Distiller` holds what
stays the same from step to step; the loop in train/loop.py owns the optimizer.
Shapes as in losses.py; R rows, n branches, P prompt and C response columns as in data/rows.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geodistill.config import LossConfig
from geodistill.data.rows import Responses, Rows, respond
from geodistill.distill import losses
from geodistill.distill.decode import decode, log_probabilities


@dataclass
class Experience:
    """One micro-batch after the generation stage: everything that an update needs, teacher included."""

    rows: Rows
    responses: Responses
    features: Tensor | None  # the student's tower features, None where its tower is trained
    pixels: Any
    z_teacher: Tensor
    batch: losses.Batch
    length: float  # mean response length, tokens
    finished: float  # share of responses that ended by themselves


@dataclass
class Labelled:
    """One micro-batch whose responses come from the data."""

    rows: Rows
    responses: Responses
    features: Tensor | None
    pixels: Any
    log_p: Tensor | None = None  # the teacher's log-probabilities [M, V] on these responses, for kd

    @property
    def tokens(self) -> int:
        return int(self.responses.valid_RC.sum())


class Distiller:
    """Teacher and student over one vocabulary. teacher None: only `sft` passes can be made.

    forbidden: bool [V], tokens that no response may hold; end: the end token.
    """

    def __init__(
        self,
        student,
        teacher,
        loss: LossConfig,
        forbidden: Tensor,
        end: int,
        limit: int,
        shared_tower: bool = False,
    ):
        self.student, self.teacher, self.loss = student, teacher, loss
        self.forbidden, self.end, self.limit = forbidden, end, limit
        self.shared_tower = shared_tower

    def _features(self, pixels: Any, for_teacher: bool) -> tuple[Tensor | None, Tensor | None]:
        """(student's, teacher's) tower features; a shared frozen tower runs once."""
        with torch.no_grad():
            student = self.student.see(pixels) if self.student.tower_frozen else None
            if not for_teacher:
                return student, None
            shared = self.shared_tower and student is not None
            return student, student if shared else self.teacher.see(pixels)

    @torch.no_grad()
    def rollout(self, rows: Rows, pixels: Any, generator: torch.Generator) -> Experience:
        """Generation stage: p~ = alpha p + (1 - alpha) q writes the responses; the teacher's rows of it are kept."""
        features, features_teacher = self._features(pixels, for_teacher=True)
        z_teacher = self.teacher.project(features_teacher)
        seen = features if features is not None else self.student.see(pixels)
        rollout = decode(
            [self.teacher, self.student],
            [self.loss.alpha, 1 - self.loss.alpha],
            rows,
            [z_teacher, self.student.project(seen)],
            self.limit,
            self.forbidden,
            self.end,
            temperature=self.loss.temperature,
            keep=0,
            generator=generator,
        )
        responses = respond(rows, rollout.tokens_RnT, rollout.length_Rn)
        token, sequence, step = responses.flat
        assert rollout.kept_MV is not None
        batch = losses.Batch(token, sequence, step, rollout.kept_MV, rollout.mixture_M)
        branches = rows.alive_Rn.sum().clamp(min=1)
        return Experience(
            rows,
            responses,
            features,
            pixels,
            z_teacher,
            batch,
            length=float(rollout.length_Rn.sum() / branches),
            finished=float(rollout.finished_Rn.sum() / branches),
        )

    def labelled(self, rows: Rows, responses: Responses, pixels: Any, with_teacher: bool) -> Labelled:
        """A micro-batch of answers from the data, with the teacher's distribution on them where it is asked for."""
        features, features_teacher = self._features(pixels, for_teacher=with_teacher)
        log_p = None
        if with_teacher:
            with torch.no_grad():
                logits, _ = self.teacher(rows, responses, features_teacher)
                log_p = log_probabilities(logits, 1.0, self.forbidden)
        return Labelled(rows, responses, features, pixels, log_p)

    def on_policy_pass(
        self, forward: Callable, item: Experience, tokens: float, image_tokens: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one rollout, already divided: (L_single + L_long) / tokens + lambda_align L_align / image_tokens.

        forward: the student's RowModel, or an engine around it. tokens, image_tokens: counts over the whole step.
        metrics: sums, to be divided by the same counts.
        """
        logits, z_student = forward(item.rows, item.responses, item.features, item.pixels)
        log_q = log_probabilities(logits, self.loss.temperature, self.forbidden)
        if item.batch.log_q_old is None:  # first use: the policy that generated is the one that is updated
            item.batch.log_q_old = losses.pick(log_q, item.batch.token).detach()
        single, long, metrics = losses.reverse_kl(log_q, item.batch, self.loss)
        metrics |= {"single": single.detach(), "long": long.detach()}
        total = (self.loss.single * single + self.loss.long * long) / tokens
        if self.loss.align > 0:
            align = losses.alignment(z_student, item.z_teacher)
            metrics["align"] = align.detach()
            total = total + self.loss.align * align / image_tokens
        return total, metrics

    def labelled_pass(self, forward: Callable, item: Labelled, tokens: float, method: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch of written answers, already divided by `tokens`, the count over the whole step.

        method: sft (cross-entropy), kd (equation 3), pretrain (L_pt: cross-entropy, or half of it and half forward KL
        with the preset `reference`).
        """
        logits, _ = forward(item.rows, item.responses, item.features, item.pixels)
        log_q = log_probabilities(logits, 1.0, self.forbidden)
        token = item.responses.flat[0]
        entropy = losses.cross_entropy(log_q, token)
        metrics = {"cross_entropy": entropy.detach()}
        if method == "kd":
            assert item.log_p is not None
            total = losses.distillation(log_q, item.log_p, token, self.loss.kd_alpha, self.loss.kd_temperature)
        elif method == "pretrain" and item.log_p is not None:
            total = 0.5 * entropy + 0.5 * losses.forward_kl(log_q, item.log_p)
        else:
            total = entropy
        return total / tokens, metrics
