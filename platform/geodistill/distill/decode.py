"""The one decode loop over image rows: a weighted mixture of one or two models, sampled or greedy.

Teacher-mixed sampling, evaluation and serving all call `decode`. Each step feeds one token per unfinished branch to every
model, so n questions on one image advance together on one KV cache per model.
Shapes: R rows, n branches, T steps, W branches fed in a step, M response tokens in all, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from geodistill.data.rows import PADDING, Rows, attends


@dataclass
class Rollout:
    """Responses that the mixture wrote. The order of the M tokens is that of `Responses.flat`: by row, branch, step."""

    tokens_RnT: Tensor
    length_Rn: Tensor
    finished_Rn: Tensor  # False: the branch was cut at the limit, without an end token
    mixture_M: Tensor  # log p~(y_t), the probability of the token under the sampling mixture
    kept_MV: Tensor | None  # log p(. | x, y_<t) of the kept model over the vocabulary


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

    `keys` and `values` [R, heads, K, D] are views of that buffer.
    """

    keys: Tensor
    values: Tensor
    buffer: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffer = key_states.new_empty(0)
        used = self.get_seq_length()
        columns = used + key_states.shape[2]
        if self.buffer.numel() == 0 or columns > self.buffer.shape[3]:
            rows, heads, _, width = key_states.shape
            grown = key_states.new_empty((2, rows, heads, columns + min(columns // 2, 256), width))
            if used:
                grown[0, :, :, :used], grown[1, :, :, :used] = self.keys, self.values
            self.buffer = grown
        self.buffer[0, :, :, used:columns], self.buffer[1, :, :, used:columns] = key_states, value_states
        self.keys, self.values = self.buffer[0, :, :, :columns], self.buffer[1, :, :, :columns]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`; the buffer is made anew at the next step."""
        super().batch_select_indices(indices)
        self.buffer = self.keys.new_empty(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("branches of an image row are no beams")


def new_cache(model) -> DynamicCache:
    """An empty key-value cache for the language model of `model`, a transformers model."""
    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


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
) -> Rollout:
    """Let `models` write the responses of `rows` together.

    models: RowModels over one vocabulary; weights: their shares, summing to 1 (a share of 0 still runs its model if it
    is kept). images: for each model the image embeddings [B, N, D] behind its projector. limit: tokens at most.
    forbidden: bool [V], tokens that no response may hold. end: the end token, part of the response.
    keep: the number of the model whose whole distribution at every response position is returned.
    """
    assert abs(sum(weights) - 1) < 1e-6
    device = rows.ids_RP.device
    R, n = rows.last_Rn.shape
    running = [i for i, weight in enumerate(weights) if weight > 0 or i == keep]
    caches = {i: new_cache(models[i].model) for i in running}
    prompt_mask = attends(rows.branch_RP, rows.position_RP, rows.branch_RP, rows.position_RP)
    for i in running:
        models[i].hidden(rows.ids_RP, rows.position_RP, prompt_mask, images[i][rows.image_R], caches[i])

    # `kept_rows`: the rows that are still written, by their number in `rows`; finished ones leave caches and masks.
    kept_rows = torch.arange(R, device=device)
    branch_RK, position_RK = rows.branch_RP, rows.position_RP
    token, alive = rows.last_Rn.clone(), rows.alive_Rn.clone()
    tokens = torch.zeros((R, n, limit), dtype=torch.long, device=device)
    length = torch.zeros((R, n), dtype=torch.long, device=device)
    mixture_steps, kept_steps, index_steps = [], [], []
    steps = 0
    while steps < limit:
        writing = alive[kept_rows].any(1)
        if not bool(writing.any()):
            break
        if 2 * int(writing.sum()) <= len(kept_rows):
            left = writing.nonzero()[:, 0]
            kept_rows, branch_RK, position_RK = kept_rows[left], branch_RK[left], position_RK[left]
            for i in running:
                caches[i].batch_select_indices(left)
        unfinished = alive[kept_rows]
        width = int(unfinished.sum(1).max())
        chosen = torch.argsort((~unfinished).to(torch.uint8), dim=1, stable=True)[:, :width]
        live = unfinished.gather(1, chosen)
        branch = torch.where(live, chosen + 1, PADDING)
        position = torch.where(live, rows.start_Rn[kept_rows].gather(1, chosen) + steps, 0)
        branch_RK, position_RK = torch.cat([branch_RK, branch], 1), torch.cat([position_RK, position], 1)
        mask = attends(branch, position, branch_RK, position_RK)
        fed = token[kept_rows].gather(1, chosen)
        log_p = {}
        for i in running:
            hidden = models[i].hidden(fed, position, mask, None, caches[i])
            log_p[i] = log_probabilities(models[i].head(hidden[live]), temperature, forbidden)
        mixed = mix([log_p.get(i, torch.empty(0)) for i in range(len(models))], weights)
        drawn = mixed.argmax(-1) if greedy else torch.multinomial(mixed.exp(), 1, generator=generator)[:, 0]
        row, column = live.nonzero(as_tuple=True)
        row, at = kept_rows[row], chosen[row, column]
        tokens[row, at, steps] = drawn
        token[row, at] = drawn
        length[row, at] += 1
        alive[row, at] = drawn != end
        mixture_steps.append(mixed.gather(-1, drawn[:, None])[:, 0])
        index_steps.append((row * n + at) * limit + steps)
        if keep is not None:
            kept_steps.append(log_p[keep])
        steps += 1
    order = torch.argsort(torch.cat(index_steps))
    return Rollout(
        tokens_RnT=tokens[..., :steps],
        length_Rn=length,
        finished_Rn=rows.alive_Rn & ~alive,
        mixture_M=torch.cat(mixture_steps)[order],
        kept_MV=torch.cat(kept_steps)[order] if keep is not None else None,
    )
