"""Which weights a stage trains, and how they are handed over to plain transformers.

full                the language model and the projector (and the vision tower where freeze_tower is false)
lora                adapters of rank r on every linear layer of the language model but its head; the projector
bias                biases (made, as zeros, where the architecture knows them) and norms of the language model; the projector
attention_and_norm  self-attention and norms of the language model; the projector
projector           the projector alone
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from geodistill.config import LoraConfig
from geodistill.models.row_model import language_model, projector

ADAPTER = "default"
Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager]


def tune(model, policy: str, lora: LoraConfig) -> None:
    """Leave `model`, a transformers image-text-to-text model, with requires_grad on what `policy` trains, in place.

    The vision tower is not looked at where policy is full (RowModel freezes it), and frozen by every other policy.
    """
    if policy == "full":
        return
    language = language_model(model)
    model.requires_grad_(False)
    if policy == "lora":
        from peft import LoraConfig as PeftConfig  # here: it takes seconds, and imports bitsandbytes with a warning
        from peft import inject_adapter_in_model

        inside = {id(part) for part in language.modules() if isinstance(part, nn.Linear)}
        linear = [name for name, part in model.named_modules() if id(part) in inside]
        adapter = PeftConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=linear)
        inject_adapter_in_model(adapter, model, ADAPTER)
    elif policy == "bias":
        _make_biases(model)
    projector(model).requires_grad_(True)  # after peft, which freezes all but its adapters
    for name, parameter in language.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        wanted = (
            (policy == "lora" and "lora_" in name)
            or (policy == "bias" and (kind == "bias" or "norm" in name))
            or (policy == "attention_and_norm" and ("self_attn" in name or "norm" in name))
        )
        parameter.requires_grad_(wanted)


def _make_biases(model) -> None:
    """Zero biases on the linear layers whose bias is a field of the language model's config, so that it is saved and read."""
    text = model.config.get_text_config()
    for field, part in (("attention_bias", "self_attn"), ("mlp_bias", "mlp")):
        if not hasattr(text, field):
            continue
        setattr(text, field, True)
        for name, module in language_model(model).named_modules():
            if f".{part}." in name and isinstance(module, nn.Linear) and module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))


def _whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
    return nullcontext()


@torch.no_grad()
def merged_weights(model, gather: Gather = _whole, keep: bool = True) -> dict[str, Tensor]:
    """The state dict of `model` as plain transformers names it, on the CPU, with W + (alpha / r) B A in place of adapters.

    gather: a context manager inside which parameters are whole (ZeRO-3: collective, so every worker calls this); one module
    at a time is. keep: False: take part in the gathering only, and return nothing. A weight that is tied appears once.
    """
    found: dict[str, Tensor] = {}
    adapters = {name for name, part in model.named_modules() if hasattr(part, "get_delta_weight")}
    seen: set[int] = set()
    for prefix, part in model.named_modules():
        if any(prefix.startswith(f"{name}.") for name in adapters):
            continue
        adapter = part if prefix in adapters else None
        layer = adapter.get_base_layer() if adapter else part
        own = {name: value for name, value in layer.named_parameters(recurse=False) if id(value) not in seen}
        seen |= {id(value) for value in own.values()}
        with gather([*adapter.parameters()] if adapter else [*own.values()]):
            if not keep:
                continue
            for name, value in own.items():
                if adapter and name == "weight":
                    value = value + adapter.get_delta_weight(ADAPTER).to(value.dtype)
                found[f"{prefix}.{name}" if prefix else name] = value.detach().to("cpu", copy=True).contiguous()
            for name, buffer in layer.named_buffers(recurse=False):
                if name not in layer._non_persistent_buffers_set:
                    found[f"{prefix}.{name}" if prefix else name] = buffer.detach().to("cpu", copy=True)
    return found
