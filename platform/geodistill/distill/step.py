"""One rollout and the passes of one update, on plain torch modules: testable without ray or deepspeed.

A step is: roll out every micro-batch, count tokens over all workers, then one backward per pass. `Distiller` holds what
stays the same from step to step; the loop in train/loop.py owns the optimizer.
Shapes as in losses.py; R rows, n branches, P prompt and C response columns as in data/rows.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from geodistill.config import LossConfig
from geodistill.data.rows import Responses, Rows, respond
from geodistill.distill import losses
from geodistill.distill.decode import Rollout, decode


@dataclass
class Experience:
    """One micro-batch after the generation stage: everything that an update needs, teacher included."""

    rows: Rows
    responses: Responses
    features: Tensor | None  # the student's tower features, None where its tower is trained
    pixels: Any
    z_teacher: Tensor
    kept: Tensor  # the teacher's last hidden states [M, D] at the response tokens: its head gives its distributions
    batch: losses.Batch
    guess: losses.Terms | None  # log q(y_t) and log p(y_t) as they were in decoding, until the first update; None: not known
    length: float  # mean response length, tokens
    finished: float  # share of responses that ended by themselves


@dataclass
class Labelled:
    """One micro-batch whose responses come from the data."""

    rows: Rows
    responses: Responses
    features: Tensor | None
    pixels: Any
    kept: Tensor | None = None  # the teacher's last hidden states [M, D] at these response tokens, for kd

    @property
    def tokens(self) -> int:
        return int(self.responses.valid_RC.sum())


@dataclass
class Seen:
    """In place of images: stored features [B, N, H] of the tower that student and teacher share."""

    features: Tensor


class Distiller:
    """Teacher and student over one vocabulary. teacher None: only `sft` passes can be made.

    forbidden: bool [V], tokens that no response may hold; end: the end token; chunk: logits that a loss has in hand at a time;
    fixed: as in `decode`.
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
        chunk: int = losses.CHUNK,
        fixed: bool | None = None,
    ):
        self.student, self.teacher, self.loss = student, teacher, loss
        self.forbidden, self.end, self.limit = forbidden, end, limit
        self.shared_tower, self.chunk, self.fixed = shared_tower, chunk, fixed

    def _features(self, pixels: Any, for_teacher: bool) -> tuple[Tensor | None, Tensor | None]:
        """(student's, teacher's) tower features; a shared frozen tower runs once, and not at all where they are stored."""
        if isinstance(pixels, Seen):
            return pixels.features, pixels.features
        with torch.no_grad():
            student = self.student.see(pixels) if self.student.tower_frozen else None
            if not for_teacher:
                return student, None
            shared = self.shared_tower and student is not None
            return student, student if shared else self.teacher.see(pixels)

    @torch.no_grad()
    def rollout(self, rows: Rows, pixels: Any, generator: torch.Generator) -> Experience:
        """Generation stage: p~ = alpha p + (1 - alpha) q writes the responses; the teacher's rows of it are kept.

        With preset=gkd the teacher writes a share alpha of the micro-batches alone, and the student the others.
        """
        alpha = self.loss.alpha
        if self.loss.preset == "gkd":
            alpha = float(torch.rand(1, generator=generator, device=generator.device) < alpha)
        features, features_teacher = self._features(pixels, for_teacher=True)
        z_teacher = self.teacher.project(features_teacher)
        seen = features if features is not None else self.student.see(pixels)
        rollout = decode(
            [self.teacher, self.student],
            [alpha, 1 - alpha],
            rows,
            [z_teacher, self.student.project(seen)],
            self.limit,
            self.forbidden,
            self.end,
            temperature=self.loss.temperature,
            keep=0,
            generator=generator,
            fixed=self.fixed,
        )
        responses = respond(rows, rollout.tokens_RnT, rollout.length_Rn)
        token, sequence, step = responses.flat
        assert rollout.kept_MD is not None
        batch = losses.Batch(token, sequence, step, rollout.mixture_M)
        branches = rows.alive_Rn.sum().clamp(min=1)
        return Experience(
            rows,
            responses,
            features,
            pixels,
            z_teacher,
            rollout.kept_MD,
            batch,
            self._guess(rollout),
            length=float(rollout.length_Rn.sum() / branches),
            finished=float(rollout.finished_Rn.sum() / branches),
        )

    def _guess(self, rollout: Rollout) -> losses.Terms | None:
        """What decoding tells of the terms: enough for the weights and returns of the first update, unless one of the models took
        no part in it and L_long, which needs both, does."""
        teacher, student = rollout.log_pM
        needed = self.loss.preset not in losses.BASELINES and (self.loss.long > 0 or not self.loss.decompose)
        if student is None or (teacher is None and needed):
            return None
        none = torch.zeros_like(student)
        return losses.Terms(student, none, none if teacher is None else teacher, none, none, none)

    def labelled(self, rows: Rows, responses: Responses, pixels: Any, with_teacher: bool) -> Labelled:
        """A micro-batch of answers from the data, with the teacher's view of them where it is asked for."""
        features, features_teacher = self._features(pixels, for_teacher=with_teacher)
        kept = None
        if with_teacher:
            with torch.no_grad():
                kept, _ = self.teacher(rows, responses, features_teacher, judge=lambda hidden: hidden)
        return Labelled(rows, responses, features, pixels, kept)

    def _compare(self, hidden: Tensor, token: Tensor, kept: Tensor | None = None, method: str = "distill") -> losses.Terms:
        """Hidden states of student and teacher (or none) at the same tokens -> terms, the heads' logits in between."""
        with torch.no_grad():
            logits_p = None if kept is None else self.teacher.head(kept)
        logits_q = self.student.head(hidden)
        if method == "distill":
            terms = losses.compare(logits_q, logits_p, token, self.loss.temperature, self.forbidden)
            if logits_p is None or self.loss.preset != "gkd":
                return terms
            settings = self.loss.temperature, self.forbidden, self.loss.gkd_beta
            return terms._replace(forward_kl=losses.generalised_jsd(logits_q, logits_p, *settings))
        T = self.loss.kd_temperature if method == "kd" else 1.0
        hard = losses.compare(logits_q, logits_p, token, 1.0, self.forbidden, soft=T == 1)
        if T == 1:
            return hard
        return hard._replace(forward_kl=losses.compare(logits_q, logits_p, token, T, self.forbidden, soft=True).forward_kl)

    def chunks(self, tokens: int) -> int:
        """Into how many chunks a pass over that many response tokens is cut."""
        return losses.chunks_of(tokens, len(self.forbidden), self.chunk)

    def _judge(
        self,
        item: Experience | Labelled,
        objective: Callable[[losses.Terms], Tensor],
        guess: losses.Terms | None,
        chunks: int,
        method: str,
    ) -> Callable[[Tensor], tuple[Tensor, losses.Terms]]:
        """What a forward pass does with its hidden states [M, D]: (value of `objective`, terms of the tokens).

        guess: terms at which the objective's derivatives are taken, those of the policy that wrote; None: they are not known.
        chunks: 0, or how many at least where the head's weights lie in shards, and so logits are computed twice.
        """
        token = item.responses.flat[0]
        inputs = (token,) if item.kept is None else (token, item.kept)
        count = max(chunks, self.chunks(len(token)))
        make = partial(self._compare, method=method)

        def judge(hidden: Tensor) -> tuple[Tensor, losses.Terms]:
            if guess is None or not torch.is_grad_enabled():
                terms = losses.in_chunks(make, count, hidden, *inputs)
                return objective(terms), terms
            weighs = losses.derivatives(objective, guess)
            if chunks:
                terms = losses.in_chunks(make, count, hidden, *inputs)
                return losses.weighed(objective, terms, weighs), terms
            weights = [w for w in self.student.head_weights() if w.requires_grad]
            return losses.at_once(make, objective, weighs, count, weights, hidden, *inputs)

        return judge

    def on_policy_pass(
        self, forward: Callable, item: Experience, tokens: float, image_tokens: float, chunks: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one rollout, already divided: (L_single + L_long) / tokens + lambda_align L_align / image_tokens.

        With the presets of losses.BASELINES their objective takes the place of L_single, and L_long is 0.

        forward: the student's RowModel, or an engine around it. tokens, image_tokens: counts over the whole step.
        chunks: of the response tokens, where the head's weights lie in shards and all workers must fetch them equally often; 0:
        they do not. metrics: sums, to be divided by the same counts.
        """
        batch = item.batch
        metrics: dict[str, Tensor] = {}

        def objective(terms: losses.Terms) -> Tensor:
            if batch.log_q_old is None:  # first use: the policy that generated is the one that is updated
                batch.log_q_old = terms.log_q.detach()
            single, long, found = losses.reverse_kl(terms, batch, self.loss)
            if self.loss.preset in losses.BASELINES:
                single, long = losses.baseline(terms, self.loss.preset), torch.zeros_like(long)
            metrics.update(found, single=single.detach(), long=long.detach())
            return (self.loss.single * single + self.loss.long * long) / tokens

        judge = self._judge(item, objective, item.guess, chunks, "distill")
        (total, _), z_student = forward(item.rows, item.responses, item.features, item.pixels, judge)
        item.guess = None  # the student moves
        if self.loss.align > 0:
            align = losses.alignment(z_student, item.z_teacher)
            metrics["align"] = align.detach()
            total = total + self.loss.align * align / image_tokens
        return total, metrics

    def labelled_pass(
        self, forward: Callable, item: Labelled, tokens: float, method: str, chunks: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch of written answers, already divided by `tokens`, the count over the whole step.

        method: sft (cross-entropy), kd (equation 3), pretrain (L_pt: cross-entropy, or half of it and half forward KL
        with the preset `reference`). chunks: as above.
        """
        assert method != "kd" or item.kept is not None

        def objective(terms: losses.Terms) -> Tensor:
            entropy = losses.cross_entropy(terms)
            if method == "kd":
                return losses.distillation(terms, self.loss.kd_alpha, self.loss.kd_temperature) / tokens
            if method == "pretrain" and item.kept is not None:
                return (0.5 * entropy + 0.5 * terms.forward_kl.sum()) / tokens
            return entropy / tokens

        guess = losses.Terms(*torch.zeros(6, item.tokens, device=self.forbidden.device))  # linear: the same everywhere
        judge = self._judge(item, objective, guess, chunks, method)
        (total, terms), _ = forward(item.rows, item.responses, item.features, item.pixels, judge)
        return total, {"cross_entropy": losses.cross_entropy(terms).detach()}
