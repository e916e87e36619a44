"""Tiny models with random weights of other families than LLaVA, saved as transformers saves them."""

import copy
from pathlib import Path

import torch
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from geodistill.language import IMAGE

SIDE = 56
MARKS = ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<img>", "</img>", "<fake_token_around_image>", "<global-img>"]
TEXT = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
CLIP = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16}


def words(tokenizer) -> PreTrainedTokenizerFast:
    """`tokenizer` with every mark that a family writes around an image."""
    found = copy.deepcopy(tokenizer)
    found.add_special_tokens({"additional_special_tokens": [IMAGE, *MARKS]})
    return found


def llava_next(words, hidden: int):
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **CLIP, "image_size": 28, "patch_size": 14, "projection_dim": 16},
        text_config={"model_type": "llama", "vocab_size": len(words) + 9, "hidden_size": hidden, **TEXT},
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=[[56, 56], [28, 56]],
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=[[56, 56], [28, 56]]
    )
    return LlavaNextForConditionalGeneration(config), images


def qwen(words, hidden: int):
    marks = {"image": IMAGE, "vision_start": MARKS[0], "vision_end": MARKS[1], "video": MARKS[2]}
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    rope = {
        "rope_type": "default",
        "mrope_section": [hidden // 2 // 4, hidden // 2 // 8, hidden // 2 // 8],
        "rope_theta": 10000.0,
    }
    text = {"vocab_size": len(words) + 5, "hidden_size": hidden, **TEXT, "rope_parameters": rope, "rope_scaling": rope}
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": hidden,
              "fullatt_block_indexes": [1], "window_size": 56}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return Qwen2_5_VLForConditionalGeneration(config), Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)


def internvl(words, hidden: int):
    config = InternVLConfig(
        vision_config={**CLIP, "image_size": [56, 56], "patch_size": [14, 14]},
        text_config={"model_type": "qwen2", "vocab_size": len(words), "hidden_size": hidden, **TEXT},
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        image_seq_length=4,
    )
    return InternVLForConditionalGeneration(config), GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=False
    )


def smolvlm(words, hidden: int):
    config = SmolVLMConfig(
        vision_config={**CLIP, "image_size": 56, "patch_size": 14},
        text_config={"model_type": "llama", "vocab_size": len(words), "hidden_size": hidden, **TEXT, "pad_token_id": 0},
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        scale_factor=2,
        pad_token_id=0,
    )
    images = SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 56}, do_image_splitting=False)
    return SmolVLMForConditionalGeneration(config), images


FAMILIES = {"llava_next": llava_next, "qwen2_5_vl": qwen, "internvl": internvl, "smolvlm": smolvlm}


def sharpen(model) -> None:
    """Weights that make peaked distributions, so that faults show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)


def save_pair(family: str, tokenizer, folder: Path) -> dict[str, Path]:
    """Write a teacher and a student of one family."""
    made, marked = {}, words(tokenizer)
    for name, hidden in (("teacher", 64), ("student", 32)):
        torch.manual_seed(len(made))
        model, images = FAMILIES[family](marked, hidden)
        sharpen(model)
        made[name] = folder / name
        for part in (model, marked, images):
            part.save_pretrained(made[name])
    return made
