"""The one decode loop over image rows: a weighted mixture of one or two models, sampled or greedy.

A `Decoder` feeds one token per unfinished branch to every model that writes, so n questions on one image advance together on
one KV cache per model. Teacher-mixed sampling and evaluation `decode` a batch of rows to its end; in serving, rows join between
two steps.
Shapes: R rows, n branches a row, B branches in hand, T steps, W branches of a row fed in a step, K columns that were read,
M response tokens in all, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from geodistill.data.rows import PADDING, STRIDE, Rows, attends
from geodistill.distill.cache import GrowingLayer, fixed_step, new_cache, shared

NO_TOKEN = -1  # what is not a response token has no number
NOTHING = -1  # what a row shows of which nobody said it
FAR = 2**40  # a position behind all others


@dataclass
class Rollout:
    """Responses that the mixture wrote. The order of the M tokens is that of `Responses.flat`: by row, branch, step."""

    tokens_RnT: Tensor
    length_Rn: Tensor
    finished_Rn: Tensor  # False: the branch was cut at the limit, without an end token
    mixture_M: Tensor  # log p~(y_t), the probability of the token under the sampling mixture
    log_pM: list[Tensor | None]  # the same of each model, [M]; None where it wrote nothing
    kept_MD: Tensor | None  # last hidden states of the kept model: its head gives p(. | x, y_<t) at every response position


def log_probabilities(logits: Tensor, temperature: float, forbidden: Tensor) -> Tensor:
    """log softmax(logits / T) in float32 over the tokens that a response may hold. logits [..., V], forbidden bool [V]."""
    return torch.log_softmax(logits.float().masked_fill(forbidden, -torch.inf) / temperature, dim=-1)


def mix(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log sum_i w_i exp(parts_i), the log-probabilities of a mixture; a weight of 0 takes no part."""
    used = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
    if len(used) == 1:
        return used[0][0]
    return torch.logsumexp(torch.stack([part + torch.log(torch.tensor(weight)) for part, weight in used]), dim=0)


class Follower:
    """A model that writes nothing, and so reads only now and then: what the others have written since waits for it.

    Shapes: Q columns that wait, K columns that it has read.
    """

    def __init__(self, model, rows: Rows, z_IND: Tensor):
        self.model, self.cache = model, new_cache(model.model)
        self.z: Tensor | None = z_IND
        self.waiting = [(rows.ids_RP, rows.branch_RP, rows.position_RP, torch.full_like(rows.ids_RP, NO_TOKEN))]
        self.branch_RK = self.position_RK = rows.ids_RP[:, :0]
        self.hidden: list[Tensor] = []  # of the response tokens that it has read, [m, D] each
        self.numbers: list[Tensor] = []  # and which those are

    def wait(self, ids_RW: Tensor, branch_RW: Tensor, position_RW: Tensor, number_RW: Tensor) -> None:
        """Columns to be read later; number: of each response token, NO_TOKEN of others."""
        self.waiting.append((ids_RW, branch_RW, position_RW, number_RW))

    def read(self) -> None:
        """Read all that waits, in one pass."""
        ids, branch, position, number = (torch.cat(part, 1) for part in zip(*self.waiting, strict=True))
        used = branch != PADDING
        order = torch.argsort((~used).to(torch.uint8), dim=1, stable=True)[:, : int(used.sum(1).max())]
        ids, branch, position, number = (part.gather(1, order) for part in (ids, branch, position, number))
        self.branch_RK, self.position_RK = torch.cat([self.branch_RK, branch], 1), torch.cat([self.position_RK, position], 1)
        mask = attends(branch, position, self.branch_RK, self.position_RK)
        hidden = self.model.hidden(ids, position, mask, self.z, self.cache)
        wanted = (number != NO_TOKEN) & (branch != PADDING)
        self.hidden.append(hidden[wanted])
        self.numbers.append(number[wanted])
        self.waiting, self.z = [], None  # the image has been read

    def keep_rows(self, left: Tensor) -> None:
        """Go on with the rows `left` of those that are there."""
        self.read()
        self.cache.batch_select_indices(left)
        self.branch_RK, self.position_RK = self.branch_RK[left], self.position_RK[left]


@dataclass
class Branches:
    """The branches in hand, row by row: what each is called by who asked, where it is, and what it is fed next."""

    number_B: Tensor
    row_B: Tensor  # in the caches
    code_B: Tensor  # in the row mask
    position_B: Tensor  # of the token to be fed
    token_B: Tensor  # to be fed
    left_B: Tensor  # tokens that it may still get

    def __getitem__(self, which: Tensor | slice) -> "Branches":
        return Branches(*(part[which] for part in vars(self).values()))

    def __add__(self, other: "Branches") -> "Branches":
        return Branches(*(torch.cat(parts) for parts in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __len__(self) -> int:
        return len(self.number_B)


@dataclass
class Step:
    """One token of every branch in hand. finished: it was the end token, or the last that the branch may have."""

    number_B: Tensor
    token_B: Tensor
    finished_B: Tensor
    mixture_B: Tensor  # log p~ of the token
    log_pB: dict[int, Tensor]  # the same of each model that writes
    hidden_BD: Tensor | None  # last hidden states of the kept model, where it writes


class Decoder:
    """Models that write together, token by token, and the branches that they have in hand; rows join between two steps.

    models: RowModels over one vocabulary; weights: their shares, summing to 1. forbidden: bool [V], tokens that no response may
    hold. end: the end token, part of the response. keep: the number of the model whose hidden states at every response position
    are wanted; with a share of 0 it writes nothing, and `follower` reads behind the others (no row can join then). fixed: steps
    of fixed shapes, as CUDA graphs on a GPU; None: there alone.
    """

    def __init__(
        self,
        models: Sequence,
        weights: Sequence[float],
        forbidden: Tensor,
        end: int,
        temperature: float = 1.0,
        keep: int | None = None,
        fixed: bool | None = None,
    ):
        assert abs(sum(weights) - 1) < 1e-6
        self.models, self.weights = models, weights
        self.forbidden, self.end, self.temperature, self.keep = forbidden, end, temperature, keep
        self.writers = [i for i, weight in enumerate(weights) if weight > 0]
        self.fixed = forbidden.device.type == "cuda" if fixed is None else fixed
        self.caches: dict[int, DynamicCache] = {}
        self.branches = Branches(*[torch.zeros(0, dtype=torch.long, device=forbidden.device)] * 6)
        self.follower: Follower | None = None
        self.shown_R = torch.zeros(0, dtype=torch.long, device=forbidden.device)
        self.changed = False  # since where each branch is fed was chosen

    def join(
        self,
        rows: Rows,
        images: Sequence[Tensor | None],
        number_Rn: Tensor,
        limit_Rn: Tensor,
        begun: dict[int, DynamicCache] | None = None,
        shown_R: Tensor | None = None,
    ) -> dict[int, DynamicCache]:
        """Read the prompts of `rows`; their branches are written from the next step on. Returns what each writer keeps of them.

        images: for each model the image embeddings [B, N, D] behind its projector. number: what to call each branch by; limit:
        tokens that it gets at most. begun: caches of the writers that have read the first columns of the rows, all image tokens
        among them; they are extended in place. shown: what each row of one piece shows, by a number of the caller's, for `add`.
        """
        caches = begun or {i: new_cache(self.models[i].model) for i in self.writers}
        self._read(rows, images, caches)
        if self.keep is not None and self.keep not in self.writers:
            assert self.follower is None, "a model that follows cannot have rows join"
            self.follower = Follower(self.models[self.keep], rows, images[self.keep][rows.image_I])  # type: ignore[index]
        shown_R = torch.full_like(rows.ids_RP[:, 0], NOTHING) if shown_R is None else shown_R
        if len(self.branches):
            self._make_room(caches, rows.branch_RP)
            self.shown_R = torch.cat([self.shown_R, shown_R])
        else:
            self.caches, self.branch_RK, self.shown_R = dict(caches), rows.branch_RP, shown_R
            self.branches = self.branches[:0]
        first = len(self.branch_RK) - len(rows.ids_RP)
        self._begin(
            rows, torch.arange(first, len(self.branch_RK), device=rows.ids_RP.device), rows.branch_Rn, number_Rn, limit_Rn
        )
        self.fixed_steps = {i: fixed_step(self.models[i], self.caches[i]) if self.fixed else None for i in self.writers}
        return caches

    def _read(self, rows: Rows, images: Sequence[Tensor | None], caches: dict[int, DynamicCache]) -> None:
        """Read what `caches` have not read yet of the prompts."""
        known = caches[self.writers[0]].get_seq_length()
        fed = slice(known, None)
        mask = attends(rows.branch_RP[:, fed], rows.position_RP[:, fed], rows.branch_RP, rows.position_RP)
        for i in self.writers:
            z = None if known else images[i][rows.image_I]  # type: ignore[index]
            self.models[i].hidden(rows.ids_RP[:, fed], rows.position_RP[:, fed], mask, z, caches[i])

    def _begin(self, rows: Rows, row_R: Tensor, code_Rn: Tensor, number_Rn: Tensor, limit_Rn: Tensor) -> None:
        """Take the branches of `rows` in hand, which lie in the rows `row` here."""
        alive = rows.alive_Rn
        row = row_R[:, None].expand_as(alive)[alive]
        self.branches += Branches(
            number_Rn[alive], row, code_Rn[alive], rows.start_Rn[alive], rows.last_Rn[alive], limit_Rn[alive]
        )
        self.changed = True

    def row_for(self, shown: int, questions: int) -> int | None:
        """The row in hand that shows `shown`, where so many more questions in it cost less than in a row of their own."""
        rows = (self.shown_R == shown).nonzero()[:, 0].tolist() if len(self.branches) else []
        count_R = torch.bincount(self.branches.row_B, minlength=len(self.branch_RK)) if rows else None
        for row in rows[::-1]:
            assert count_R is not None
            width, own = int(count_R.max()), int(count_R[row])
            if own and len(count_R) * max(width, own + questions) <= (len(count_R) + 1) * max(width, questions):
                return row if int(self.branch_RK[row].max()) + questions < STRIDE else None
        return None

    def add(self, rows: Rows, into_R: Tensor, number_Rn: Tensor, limit_Rn: Tensor) -> None:
        """Read further questions on what rows in hand show: `rows`, of one piece each, go behind the rows `into`."""
        known = int((rows.branch_RP[0] == 0).sum())
        caches = {i: shared(self.models[i].model, self.caches[i], into_R, known) for i in self.writers}
        self._read(rows, [], caches)
        last_R = self.branch_RK[into_R].amax(1, keepdim=True)
        fed_RQ = rows.branch_RP[:, known:]
        self.branch_RK = pad(self.branch_RK, (0, fed_RQ.shape[1]), value=PADDING)
        self.branch_RK[into_R, -fed_RQ.shape[1] :] = torch.where(fed_RQ == PADDING, PADDING, fed_RQ + last_R)
        for i in self.writers:
            for layer, other in zip(self.caches[i].layers, caches[i].layers, strict=True):
                assert isinstance(layer, GrowingLayer) and isinstance(other, GrowingLayer), "rows join where `can_join` says so"
                layer.add(into_R, other, known)
        self._begin(rows, into_R, rows.branch_Rn + last_R, number_Rn, limit_Rn)
        self.branches = self.branches[torch.argsort(self.branches.row_B, stable=True)]
        if 2 * int(self._used()[1].sum(1).max()) < self.branch_RK.shape[1]:
            self._make_room({}, self.branch_RK[:0])

    def _used(self) -> tuple[Tensor, Tensor]:
        """The rows with branches in hand; which of their columns these may still see, bool [r, K]."""
        mine = self.branches
        seen_BK = attends(mine.code_B[:, None], torch.full_like(mine.code_B[:, None], FAR), *self._columns(mine.row_B))[:, 0, 0]
        used_RK = torch.zeros_like(self.branch_RK).index_add_(0, mine.row_B, seen_BK.long()) > 0
        kept = used_RK.any(1).nonzero()[:, 0]
        return kept, used_RK[kept]

    def _make_room(self, caches: dict[int, DynamicCache], branch_RP: Tensor) -> None:
        """Put the rows of `caches` behind those in hand, of which only what a branch in hand may still see is kept."""
        kept, used = self._used()
        self.branches.row_B = torch.searchsorted(kept, self.branches.row_B)
        self.shown_R = self.shown_R[kept]
        order = torch.argsort((~used).to(torch.uint8), dim=1, stable=True)[:, : int(used.sum(1).max())]
        branch = torch.where(used, self.branch_RK[kept], PADDING).gather(1, order)
        columns = max(branch.shape[1], branch_RP.shape[1]) if caches else branch.shape[1]
        parts = (branch, branch_RP) if caches else (branch,)
        self.branch_RK = torch.cat([pad(part, (0, columns - part.shape[1]), value=PADDING) for part in parts])
        for i in self.writers:
            others = caches[i].layers if caches else [None] * len(self.caches[i].layers)
            for layer, other in zip(self.caches[i].layers, others, strict=True):
                assert isinstance(layer, GrowingLayer), "rows join where `can_join` says so"
                layer.join(kept, order, other)
        self.changed = True

    @property
    def can_join(self) -> bool:
        """Can rows join others? Not those of models with caches of other kinds (windows, states)."""
        caches = [self.caches.get(i) or new_cache(self.models[i].model) for i in self.writers]
        return all(isinstance(layer, GrowingLayer) for cache in caches for layer in cache.layers)

    def _columns(self, row: Tensor) -> tuple[Tensor, Tensor]:
        branch = self.branch_RK[row]
        return branch, torch.zeros_like(branch)

    def leave(self, gone_B: Tensor) -> None:
        """Write the branches `gone_B` (bool) no further."""
        self.branches = self.branches[~gone_B]
        self.changed = True

    def _lay_out(self) -> None:
        """Choose where each branch is fed, and what it sees of the columns so far. Rows without branches leave caches and masks
        once they are half of all."""
        mine = self.branches
        count_R = torch.bincount(mine.row_B, minlength=len(self.branch_RK))
        writing = count_R > 0
        if 2 * int(writing.sum()) <= len(writing):
            left = writing.nonzero()[:, 0]
            self.branch_RK, self.shown_R, count_R = self.branch_RK[left], self.shown_R[left], count_R[left]
            for i in self.writers:
                self.caches[i].batch_select_indices(left)
            if self.follower:
                self.follower.keep_rows(left)
            mine.row_B = torch.searchsorted(left, mine.row_B)
        first_R = count_R.cumsum(0) - count_R
        self.place = mine.row_B, torch.arange(len(mine), device=first_R.device) - first_R[mine.row_B]
        width = int(count_R.max())
        self.nothing = count_R.new_zeros((len(count_R), width))
        self.fed_branch = self.nothing.fill_(PADDING).index_put(self.place, mine.code_B)
        self.nothing.zero_()
        known = self.branch_RK.shape[1]
        room = known + width * int(mine.left_B.max())
        self.seen = torch.zeros((len(count_R), 1, width, room), dtype=torch.bool, device=first_R.device)
        far = torch.full_like(self.fed_branch, FAR)
        self.seen[..., :known] = attends(self.fed_branch, far, self.branch_RK, torch.zeros_like(self.branch_RK))
        self.own = torch.eye(width, dtype=torch.bool, device=first_R.device) & (self.fed_branch != PADDING)[:, None, None, :]
        self.changed = False

    def step(self, draw: Callable[[Tensor], Tensor], number_B: Tensor | None = None) -> Step:
        """One token more of every branch in hand. draw: log p~ [B, V] -> tokens [B]. number: of these tokens, for `follower`."""
        if self.changed:
            self._lay_out()
        mine = self.branches
        ids, position = (self.nothing.index_put(self.place, part) for part in (mine.token_B, mine.position_B))
        known = self.branch_RK.shape[1]
        columns = known + ids.shape[1]
        self.seen[..., known:columns] = self.own
        self.branch_RK = torch.cat([self.branch_RK, self.fed_branch], 1)
        if self.follower:
            assert number_B is not None
            self.follower.wait(ids, self.fed_branch, position, self.nothing.index_put(self.place, number_B))
        log_p, kept = {}, None
        for i in self.writers:
            if step := self.fixed_steps[i]:
                hidden = step(ids, position, self.seen[..., :columns])[self.place]
            else:
                hidden = self.models[i].hidden(ids, position, self.seen[..., :columns], None, self.caches[i])[self.place]
            log_p[i] = log_probabilities(self.models[i].head(hidden), self.temperature, self.forbidden)
            if i == self.keep:
                kept = hidden
        mixed = mix([log_p.get(i, torch.empty(0)) for i in range(len(self.models))], self.weights)
        drawn = draw(mixed)
        mine.token_B, mine.position_B, mine.left_B = drawn, mine.position_B + 1, mine.left_B - 1
        finished = (drawn == self.end) | (mine.left_B == 0)
        own = {i: log_p[i].gather(-1, drawn[:, None])[:, 0] for i in self.writers}
        found = Step(mine.number_B, drawn, finished, mixed.gather(-1, drawn[:, None])[:, 0], own, kept)
        if bool(finished.any()):
            self.leave(finished)
        return found


@torch.no_grad()
def decode(
    models: Sequence,
    weights: Sequence[float],
    rows: Rows,
    images: Sequence[Tensor],
    limit: int,
    forbidden: Tensor,
    end: int,
    temperature: float = 1.0,
    greedy: bool = False,
    keep: int | None = None,
    generator: torch.Generator | None = None,
    fixed: bool | None = None,
) -> Rollout:
    """Let `models` write the responses of `rows` together, to the end token or `limit` tokens. The rest is as in `Decoder`."""
    R, n = rows.last_Rn.shape
    decoder = Decoder(models, weights, forbidden, end, temperature, keep, fixed)
    number_Rn = torch.arange(R * n, device=forbidden.device).view(R, n)
    decoder.join(rows, images, number_Rn, torch.full_like(number_Rn, limit))

    def draw(log_p: Tensor) -> Tensor:
        return log_p.argmax(-1) if greedy else torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]

    steps: list[Step] = []
    number_steps = []
    while len(decoder.branches):
        number_steps.append(decoder.branches.number_B * limit + len(steps))
        steps.append(decoder.step(draw, number_steps[-1]))
    if decoder.follower:
        decoder.follower.read()
        kept, kept_numbers = decoder.follower.hidden, decoder.follower.numbers
    else:
        kept, kept_numbers = [step.hidden_BD for step in steps if step.hidden_BD is not None], number_steps
    number_M = torch.cat(number_steps)
    order = torch.argsort(number_M)
    drawn_M = torch.cat([step.token_B for step in steps])
    tokens = torch.zeros(R * n * limit, dtype=torch.long, device=forbidden.device)
    tokens[number_M] = drawn_M
    length = torch.bincount(number_M // limit, minlength=R * n)
    finished = torch.zeros(R * n, dtype=torch.bool, device=forbidden.device)
    finished[number_M[drawn_M == end] // limit] = True
    return Rollout(
        tokens_RnT=tokens.view(R, n, limit)[..., : len(steps)],
        length_Rn=length.view(R, n),
        finished_Rn=finished.view(R, n),
        mixture_M=torch.cat([step.mixture_B for step in steps])[order],
        log_pM=[
            torch.cat([step.log_pB[i] for step in steps])[order] if i in decoder.writers else None for i in range(len(models))
        ],
        kept_MD=torch.cat(kept)[torch.argsort(torch.cat(kept_numbers))] if keep is not None else None,
    )
