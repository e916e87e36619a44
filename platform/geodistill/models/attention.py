"""The ways in which a model can read the row mask, and which of them is faster here.

sdpa: torch's scaled_dot_product_attention with a mask of booleans; every pair of tokens is computed. On a CPU in blocks of
queries, each with the keys up to its end alone: nothing behind a token is ever seen. flex: FlexAttention (Dong et al., 2024),
which skips blocks of the mask that nobody sees, such as other branches; torch has no backward pass of it on CPUs.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAMES = {"sdpa": "sdpa_in_blocks", "flex": "flex_attention"}  # ours -> transformers'
BLOCK = 128  # queries
REPEATS = 3


def sdpa_in_blocks(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest
) -> tuple[Tensor, None]:
    """transformers' sdpa for masks in which no query sees a key of a later column. query [R, heads, Q, D], key and value
    [R, heads, K, D], mask bool [R, 1, Q, K] (the last Q of K columns ask) -> [R, Q, heads, D]."""
    asked, known = query.shape[2], key.shape[2]
    if attention_mask is None or attention_mask.shape[2] != asked or query.is_cuda or asked <= BLOCK:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
    found = []
    for first in range(0, asked, BLOCK):
        some, seen = slice(first, first + BLOCK), min(known - asked + first + BLOCK, known)
        part = query[:, :, some], key[:, :, :seen], value[:, :, :seen], attention_mask[:, :, some, :seen]
        found.append(sdpa_attention_forward(module, *part, **rest)[0])
    return torch.cat(found, 1), None


AttentionInterface.register(NAMES["sdpa"], sdpa_in_blocks)
AttentionMaskInterface.register(NAMES["sdpa"], sdpa_mask)


def block_mask(mask_R1QK: Tensor) -> BlockMask:
    """The row mask, bool [R, 1, Q, K], as FlexAttention takes it."""
    rows, _, queries, keys = mask_R1QK.shape

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_R1QK[row, 0, query, key]  # numbers, as tensors

    return create_block_mask(attends, rows, None, queries, keys, device=mask_R1QK.device.type)


def attend_by(model, name: str) -> None:
    """Let the language model of `model` (transformers) attend by `name`, sdpa or flex, from now on: also where gradient
    checkpointing runs a layer again."""
    model.config.get_text_config()._attn_implementation = NAMES[name]


@contextmanager
def by_sdpa(model) -> Iterator[None]:
    """Inside: the language model of `model` attends by sdpa."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAMES["sdpa"]
    try:
        yield
    finally:
        config._attn_implementation = before


def faster(row_model, rows: int, columns: int) -> tuple[str, str]:
    """Take whichever makes a forward and backward pass over `rows` x `columns` tokens faster: (sdpa or flex, what was measured).

    Three branches behind a prefix of four fifths of the columns, random embeddings. Flex takes part on GPUs alone; where it
    fails the reason is told and sdpa is taken.
    """
    device = next(row_model.parameters()).device
    if device.type != "cuda":
        return "sdpa", "FlexAttention has no backward pass on this device"
    if not row_model.takes_rows:
        return "sdpa", "this family does not take the row mask"
    column = torch.arange(columns, device=device)
    branch = torch.where(column < 4 * columns // 5, 0, 1 + column % 3)
    mask = ((branch[None, :] == 0) | (branch[None, :] == branch[:, None])) & (column[None, :] <= column[:, None])
    ids = torch.zeros(rows, columns, dtype=torch.long, device=device)
    seconds: dict[str, float] = {}
    was_training = row_model.training
    row_model.train()  # with gradient checkpointing, as an update
    for name in NAMES:
        row_model.attend_by(name)
        try:
            for _ in range(1 + REPEATS):
                torch.cuda.synchronize()
                start = time.perf_counter()
                hidden = row_model.hidden(ids, column.expand(rows, -1), mask.expand(rows, 1, -1, -1))
                if hidden.requires_grad:
                    parameters = [p for p in row_model.parameters() if p.requires_grad]
                    torch.autograd.grad(hidden.float().mean(), parameters, allow_unused=True)
                torch.cuda.synchronize()
                seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
        except RuntimeError as error:  # torch.compile's, Triton's and those of the card's memory
            if name == "sdpa":
                raise
            row_model.attend_by("sdpa")
            row_model.train(was_training)
            return "sdpa", f"FlexAttention cannot be used here: {str(error).splitlines()[0]}"
    told = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in seconds.items())
    best = min(seconds, key=lambda name: seconds[name])
    row_model.attend_by(best)
    row_model.train(was_training)
    return best, f"{told} for {rows} x {columns} tokens, forward and backward"
