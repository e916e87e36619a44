"""The KV cache of a decode loop, and steps of fixed shapes over it.

Shapes: R rows, W branches of a row fed in a step, K columns that were read.
"""

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


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

    def join(self, kept: Tensor, order: Tensor, other: "GrowingLayer | None") -> None:
        """Go on with the rows `kept` [r], of each its columns `order` [r, k], and behind them the rows of `other`."""
        mine = order.shape[1]
        theirs = other.keys.shape[::2] if other else (0, 0)
        room, (heads, size) = max(mine, theirs[1]), self.keys.shape[1::2]
        grown = self.buffer.new_zeros((2, len(kept) + theirs[0], heads, room + min(room // 2, 256), size))
        for part, old in zip(grown, (self.keys, self.values), strict=True):
            part[: len(kept), :, :mine] = old[kept[:, None], :, order].transpose(1, 2)
        if other:
            grown[:, len(kept) :, :, : theirs[1]] = torch.stack([other.keys, other.values])
        self.buffer = grown
        self.show(room)

    def add(self, into: Tensor, other: "GrowingLayer", known: int) -> None:
        """Put the columns of `other` behind its first `known` ones into the rows `into`, behind what is there."""
        used = self.get_seq_length()
        columns = self.reserve(other.get_seq_length() - known)
        self.buffer[0, into, :, used:columns], self.buffer[1, into, :, used:columns] = (
            other.keys[:, :, known:],
            other.values[:, :, known:],
        )
        self.show(columns)

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
    """Fixed steps for a model that can make them: not where it takes no row mask, or its cache is of another kind, or a step
    waits for the host, as kernels of quantised weights do, and rotary positions that follow the length."""
    text = model.model.config.get_text_config()
    waits = getattr(model.model, "is_quantized", False) or "dynamic" in str(getattr(text, "rope_parameters", None))
    grows = all(type(layer) is GrowingLayer for layer in cache.layers)
    return FixedStep(model, cache) if grows and model.takes_rows and not waits else None


def beginning(cache: DynamicCache, row: int, columns: int) -> list[Tensor]:
    """A copy of what `cache` keeps of the first columns of a row: of each layer [2, heads, columns, D]."""
    return [torch.stack([layer.keys[row, :, :columns], layer.values[row, :, :columns]]) for layer in cache.layers]


def begun(model, rows: list[list[Tensor]]) -> DynamicCache:
    """A cache whose rows begin with what `beginning` gave of each."""
    cache = new_cache(model)
    for layer, parts in zip(cache.layers, zip(*rows, strict=True), strict=True):
        layer.update(*torch.stack(parts, 1))
    return cache


def shared(model, cache: DynamicCache, rows: Tensor, columns: int) -> DynamicCache:
    """A cache whose rows begin with the first columns of the rows `rows` of another, all of GrowingLayers."""
    found = new_cache(model)
    for layer, other in zip(found.layers, cache.layers, strict=True):
        layer.update(other.keys[rows, :, :columns], other.values[rows, :, :columns])  # type: ignore[index]
    return found
