"""The one decode loop over image rows: a weighted mixture of one or two models, sampled or greedy.

Teacher-mixed sampling, evaluation and serving all call `decode`. Each step feeds one token per unfinished branch to every
model that writes, so n questions on one image advance together on one KV cache per model.
Shapes: R rows, n branches, T steps, W branches fed in a step, M response tokens in all, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from geodistill.data.rows import PADDING, Rows, attends

NO_TOKEN = -1  # what is not a response token has no number
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


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with room to grow: a step copies its own columns, not all that came before.

    `keys` and `values` [R, heads, K, D] are views of that buffer. at [W]: the columns that a step of fixed shapes writes, as a
    tensor; it then attends to the whole buffer, so its mask must hide what is not written yet.
    """

    keys: Tensor
    values: Tensor
    buffer: Tensor
    at: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.at is not None:
            self.buffer[0].index_copy_(2, self.at, key_states)
            self.buffer[1].index_copy_(2, self.at, value_states)
            return self.buffer[0], self.buffer[1]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffer = key_states.new_empty((2, *key_states.shape[:2], 0, key_states.shape[3]))
        columns = self.reserve(key_states.shape[2])
        used = columns - key_states.shape[2]
        self.buffer[0, :, :, used:columns], self.buffer[1, :, :, used:columns] = key_states, value_states
        self.show(columns)
        return self.keys, self.values

    def reserve(self, width: int) -> int:
        """Make room for `width` more columns; how many there are then."""
        used = self.get_seq_length()
        columns = used + width
        if columns > self.buffer.shape[3]:
            rows, heads, _, size = self.buffer.shape[1:]
            grown = self.buffer.new_zeros((2, rows, heads, columns + min(columns // 2, 256), size))
            if used:
                grown[0, :, :, :used], grown[1, :, :, :used] = self.keys, self.values
            self.buffer = grown
        return columns

    def show(self, columns: int) -> None:
        """Take the first columns of the buffer as those that are there."""
        self.keys, self.values = self.buffer[0, :, :, :columns], self.buffer[1, :, :, :columns]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`; the buffer is made anew at the next step."""
        super().batch_select_indices(indices)
        rows, heads, _, size = self.keys.shape
        self.buffer = self.keys.new_empty((2, rows, heads, 0, size))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("branches of an image row are no beams")


def new_cache(model) -> DynamicCache:
    """An empty key-value cache for the language model of `model`, a transformers model."""
    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class FixedStep:
    """Decoding steps of one model with tensors that stay in place, so that a GPU replays them as one CUDA graph: launching the
    kernels of a step one by one takes longer than they run. Recorded anew where rows, branches or the cache's buffer change.

    model: a RowModel that takes the row mask; cache: its KV cache after the prompts, all of GrowingLayers.
    """

    def __init__(self, model, cache: DynamicCache):
        self.model, self.cache = model, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.shape: tuple[int, ...] = ()

    def __call__(self, ids_RW: Tensor, position_RW: Tensor, mask_R1WK: Tensor) -> Tensor:
        """Last hidden states [R, W, D], which the next step overwrites."""
        layers, width = self.cache.layers, ids_RW.shape[1]
        columns = [layer.reserve(width) for layer in layers][-1]
        shape = (*ids_RW.shape, layers[0].buffer.shape[3])
        if new := shape != self.shape:
            self.shape, self.graph = shape, None
            self.ids, self.position = torch.empty_like(ids_RW), torch.empty_like(position_RW)
            self.mask = mask_R1WK.new_zeros((len(ids_RW), 1, width, shape[-1]))
            self.at = torch.empty(width, dtype=torch.long, device=ids_RW.device)
        self.ids.copy_(ids_RW)
        self.position.copy_(position_RW)
        self.mask[..., :columns] = mask_R1WK
        torch.arange(columns - width, columns, out=self.at)
        for layer in layers:
            layer.at = self.at
        if new and ids_RW.is_cuda:
            self._record()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.hidden = self._run()
        for layer in layers:
            layer.at = None
            layer.show(columns)
        return self.hidden

    def _run(self) -> Tensor:
        return self.model.hidden(self.ids, self.position, self.mask, None, self.cache)

    def _record(self) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what libraries allocate at their first call must not be recorded
            self._run()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.hidden = self._run()


def fixed_step(model, cache: DynamicCache) -> FixedStep | None:
    """Fixed steps for a model that can make them: not where it takes no row mask, or is quantised (its kernels wait for the
    host), or its cache is of another kind."""
    grows = all(type(layer) is GrowingLayer for layer in cache.layers)
    return FixedStep(model, cache) if grows and model.takes_rows and not getattr(model.model, "is_quantized", False) else None


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
    """Let `models` write the responses of `rows` together.

    models: RowModels over one vocabulary; weights: their shares, summing to 1. images: for each model the image embeddings
    [B, N, D] behind its projector. limit: tokens at most. forbidden: bool [V], tokens that no response may hold. end: the end
    token, part of the response. keep: the number of the model whose hidden states at every response position are returned;
    with a share of 0 it writes nothing, and reads the responses in one pass behind the others (again where rows have ended).
    fixed: steps of fixed shapes, as CUDA graphs on a GPU; None: there alone.
    """
    assert abs(sum(weights) - 1) < 1e-6
    device = rows.ids_RP.device
    R, n = rows.last_Rn.shape
    writers = [i for i, weight in enumerate(weights) if weight > 0]
    follower = Follower(models[keep], rows, images[keep][rows.image_I]) if keep is not None and keep not in writers else None
    caches = {i: new_cache(models[i].model) for i in writers}
    prompt_mask = attends(rows.branch_RP, rows.position_RP, rows.branch_RP, rows.position_RP)
    for i in writers:
        models[i].hidden(rows.ids_RP, rows.position_RP, prompt_mask, images[i][rows.image_I], caches[i])
    fixed = device.type == "cuda" if fixed is None else fixed
    fixed_steps = {i: fixed_step(models[i], caches[i]) if fixed else None for i in writers}

    # `kept_rows`: the rows that are still written, by their number in `rows`; finished ones leave caches and masks.
    kept_rows = torch.arange(R, device=device)
    branch_RK = rows.branch_RP
    token, alive = rows.last_Rn.clone(), rows.alive_Rn.clone()
    tokens = torch.zeros((R, n, limit), dtype=torch.long, device=device)
    length = torch.zeros((R, n), dtype=torch.long, device=device)
    mixture_steps, kept_steps, number_steps = [], [], []
    own_steps: dict[int, list[Tensor]] = {i: [] for i in writers}
    steps, ended = 0, True
    while steps < limit:
        if ended:  # some branch has: choose anew which are fed, and what each of them sees of the columns so far
            writing = alive[kept_rows].any(1)
            if not bool(writing.any()):
                break
            if 2 * int(writing.sum()) <= len(kept_rows):
                left = writing.nonzero()[:, 0]
                kept_rows, branch_RK = kept_rows[left], branch_RK[left]
                for i in writers:
                    caches[i].batch_select_indices(left)
                if follower:
                    follower.keep_rows(left)
            unfinished = alive[kept_rows]
            width = int(unfinished.sum(1).max())
            chosen = torch.argsort((~unfinished).to(torch.uint8), dim=1, stable=True)[:, :width]
            live = unfinished.gather(1, chosen)
            branch = torch.where(live, rows.branch_Rn[kept_rows].gather(1, chosen), PADDING)
            row, column = live.nonzero(as_tuple=True)
            slot, row = chosen[row, column], kept_rows[row]
            known = branch_RK.shape[1]
            seen = torch.zeros((len(kept_rows), 1, width, known + width * (limit - steps)), dtype=torch.bool, device=device)
            seen[..., :known] = attends(branch, torch.full_like(branch, FAR), branch_RK, torch.zeros_like(branch_RK))
            own = torch.eye(width, dtype=torch.bool, device=device) & live[:, None, None, :]
        position = torch.where(live, rows.start_Rn[kept_rows].gather(1, chosen) + steps, 0)
        fed = token[kept_rows].gather(1, chosen)
        seen[..., known : known + width] = own
        known += width
        branch_RK = torch.cat([branch_RK, branch], 1)
        if follower:
            follower.wait(fed, branch, position, (kept_rows[:, None] * n + chosen) * limit + steps)
        log_p = {}
        for i in writers:
            if step := fixed_steps[i]:
                hidden = step(fed, position, seen[..., :known])[live]
            else:
                hidden = models[i].hidden(fed, position, seen[..., :known], None, caches[i])[live]
            log_p[i] = log_probabilities(models[i].head(hidden), temperature, forbidden)
            if i == keep:
                kept_steps.append(hidden)
        mixed = mix([log_p.get(i, torch.empty(0)) for i in range(len(models))], weights)
        drawn = mixed.argmax(-1) if greedy else torch.multinomial(mixed.exp(), 1, generator=generator)[:, 0]
        tokens[row, slot, steps] = drawn
        token[row, slot] = drawn
        length[row, slot] += 1
        finished = drawn == end
        alive[row, slot] = ~finished
        ended = bool(finished.any())
        mixture_steps.append(mixed.gather(-1, drawn[:, None])[:, 0])
        for i in writers:
            own_steps[i].append(log_p[i].gather(-1, drawn[:, None])[:, 0])
        number_steps.append((row * n + slot) * limit + steps)
        steps += 1
    if follower:
        follower.read()
        kept_steps, kept_numbers = follower.hidden, follower.numbers
    else:
        kept_numbers = number_steps
    order = torch.argsort(torch.cat(number_steps))
    return Rollout(
        tokens_RnT=tokens[..., :steps],
        length_Rn=length,
        finished_Rn=rows.alive_Rn & ~alive,
        mixture_M=torch.cat(mixture_steps)[order],
        log_pM=[torch.cat(own_steps[i])[order] if i in own_steps else None for i in range(len(models))],
        kept_MD=torch.cat(kept_steps)[torch.argsort(torch.cat(kept_numbers))] if keep is not None else None,
    )
