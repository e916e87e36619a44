"""Parameters and FLOPs of a saved model from its config.json alone: on the meta device, without weights or memory."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

TOKENS = 512  # of text, in one forward pass


def size_of(folder: str | Path) -> dict[str, float]:
    """`size` of a model folder. Raises ValueError where it holds no config.json."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (config.json is missing); run the job that writes it, or correct the path")
    return size(AutoConfig.from_pretrained(folder))


def size(config) -> dict[str, float]:
    """Size of the LLaVA of a transformers config, as the paper's Table 8 counts, and of all of it.

    parameters (M): language model with its head, projector, and the position embedding of the vision tower, whose other
    weights are left out. This count gives the table's 6760.72 and 13048.66 exactly (LLaMA-7B and 13B, CLIP ViT-L/14 at 504
    pixels: 6738.42 + 20.98 + 1.33; 13015.86 + 31.47 + 1.33).
    flops (G): one forward pass of the language model with its head over `TOKENS` tokens, without an image. A multiply-add
    is two operations; attention is counted in full, not its causal half; element-wise operations are not counted. This gives
    6903.09 and 13374.80, where the table has 6904.53 and 13377.05 (0.02 % more: as much as element-wise operations take).
    all_parameters (M): every weight. image_flops (G): one image through tower and projector, then its tokens and `TOKENS`
    tokens of text through the language model.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        vision, width = model.config.vision_config, model.config.text_config.hidden_size
        pixels = torch.empty(1, vision.num_channels, vision.image_size, vision.image_size)
        words, patches = torch.empty(1, TOKENS, width), (vision.image_size // vision.patch_size) ** 2
        row = torch.empty(1, patches + TOKENS, width)
    tower, projector, language, head = (
        model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model, model.lm_head,
    )  # fmt: skip

    def write(embeds: torch.Tensor) -> None:
        mask = torch.empty(1, 1, embeds.shape[1], embeds.shape[1], dtype=torch.bool)  # none: transformers looks at values
        head(language(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state)

    def look_and_write() -> None:
        model.model.get_image_features(pixels)
        write(row)

    position = sum(p.numel() for name, p in tower.named_parameters() if "position_embedding" in name)
    return {
        "parameters": (_parameters(nn.ModuleList([language, head, projector])) + position) / 1e6,
        "flops": _flops(lambda: write(words)) / 1e9,
        "all_parameters": _parameters(model) / 1e6,
        "image_flops": _flops(look_and_write) / 1e9,
    }


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())  # a shared weight counts once


def _flops(forward) -> int:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()
