"""What a model costs: weights and FLOPs, from a config.json or the settings alone, on the meta device, without memory.

What a run of it costs follows in train/plan.py. Units: weights, bytes, and FLOPs, of which a multiply-add is two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlavaConfig

from geodistill.config import ModelConfig, TrainConfig
from geodistill.data.files import local
from geodistill.models.assemble import config_of
from geodistill.models.tuning import projector, tune
from geodistill.models.vision import new_tower  # and the Auto classes know EarthGPT's tower from here on

TOKENS = 512  # of text, in the forward pass that Table 8 counts
QUESTION = 60  # tokens of text beside an image, in the forward pass that is reported beside it


@dataclass(frozen=True)
class Shape:
    """One model: numbers of weights, and the widths that activations and caches follow from."""

    weights: int  # all of them
    paper: int  # those that the paper's Table 8 counts
    language: int  # those of the language model and its head
    linear: int  # in linear layers of the language model, but its head
    embedding: int  # V d, elements of the head and of the token embedding
    hidden: int
    layers: int
    heads: int
    key_heads: int
    head: int  # width of an attention head
    intermediate: int
    vocabulary: int
    patches: int  # tokens of an image
    pixels: int  # side of an image
    tower_hidden: int
    tower_layers: int  # 0: not known
    image_flops: float  # one image through tower and projector
    trained: int  # weights that the stage trains
    trains_tower: bool

    def text_flops(self, queries: float, keys: float, logits: float) -> float:
        """The language model over `queries` tokens that attend to `keys` (in full, masked or not); its head on `logits`."""
        attention = 4 * queries * keys * self.heads * self.head * self.layers
        return 2 * queries * self.linear + attention + 2 * logits * self.embedding

    def cache(self, columns: int, size: int) -> float:
        """Keys and values of one row of `columns` tokens, `size` bytes a number; grouped heads are stored once."""
        return 2 * self.layers * self.key_heads * self.head * columns * size


def architecture(sizes: ModelConfig, vocabulary: int) -> LlavaConfig:
    """The transformers config of a model that is made from the settings (its tower: of the folder `sizes.tower`, if given)."""
    if sizes.tower:
        found = AutoConfig.from_pretrained(local(sizes.tower, weights=False))
        tower = getattr(found, "vision_config", found)
    else:
        with torch.device("meta"):
            tower = new_tower(sizes.vision).config
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, pad_token_id=0,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=3, vision_feature_layer=sizes.vision.feature_layer,
        image_seq_length=(tower.image_size // tower.patch_size) ** 2, tie_word_embeddings=False,
    )  # fmt: skip


def shape(config, train: TrainConfig | None = None, freeze_tower: bool = True) -> Shape:
    """The shape of the model of a transformers config: a LLaVA, or any other that AutoModelForImageTextToText builds.

    train: the stage that trains it; None: it is frozen.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text, vision = config.get_text_config(), config.vision_config
    language, head = model.get_decoder(), model.get_output_embeddings()
    try:
        bridge = projector(model)
    except ValueError:  # not known: counted with the tower
        bridge = nn.Module()
    counted = nn.ModuleList([language, head, bridge])
    tower = _parameters(model) - _parameters(counted)
    positions = sum(p.numel() for name, p in model.named_parameters() if "vision" in name and "position_embedding" in name)
    pixels, patch = _side(getattr(vision, "image_size", 448)), _side(vision.patch_size)  # some towers take any size
    side = pixels // (patch * getattr(vision, "spatial_merge_size", 1))
    if config.model_type == "llava":
        with torch.device("meta"):
            image = torch.empty(1, vision.num_channels, pixels, pixels)
        image_flops = _flops(lambda: model.model.get_image_features(image))
    else:  # its pixels come in a form of its own: two operations a weight and token, as of any transformer
        image_flops = 2 * side**2 * (tower + _parameters(bridge))
    linear = sum(m.weight.numel() for m in language.modules() if isinstance(m, nn.Linear))
    paper, speaks = _parameters(counted) + positions, _parameters(nn.ModuleList([language, head]))
    if train is not None:
        with torch.device("meta"):
            tune(model, train.tuning, train.lora)  # which may add weights
    trains_tower = train is not None and train.tuning == "full" and not freeze_tower
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if train is not None else 0
    if train is not None and train.tuning == "full" and freeze_tower:
        trained -= tower
    return Shape(
        weights=_parameters(model),
        paper=paper,
        language=speaks,
        linear=linear,
        embedding=text.vocab_size * text.hidden_size,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        key_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        patches=side**2,
        pixels=pixels,
        tower_hidden=vision.hidden_size,
        tower_layers=getattr(vision, "num_hidden_layers", 0) or getattr(vision, "depth", 0),
        image_flops=image_flops,
        trained=trained,
        trains_tower=trains_tower,
    )


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    """Of a square, however its config writes it."""
    return size if isinstance(size, int) else size[0]


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())  # a shared weight counts once


def _flops(forward: Callable[[], object]) -> int:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def size(config) -> dict[str, float]:
    """Size of the model of a transformers config, as the paper's Table 8 counts it, and all of it.

    parameters (M): language model with its head, projector, and the position embedding of the vision tower, whose other
    weights are left out. flops (G): one forward pass of language model and head over N = `TOKENS` tokens without an image,
        F = 2 [N (L (4 d^2 + 3 d f) + V d) + 2 N^2 d L + L h N^2 + L N f + (2 L + 1) 2 N d]:
    attention in full, not its causal half; then softmax, activation and norms as one multiply-add an element (f: MLP width,
    h: heads). Both give the table's printed digits. torch's FlopCounterMode leaves the last three terms out, 0.02 %.
    all_parameters (M): every weight. image_flops (G): one image through tower and projector, then its tokens and
    `QUESTION` tokens of text through language model and head.
    """
    s = shape(config)
    n, d, layers = TOKENS, s.hidden, s.layers
    extra = layers * s.heads * n**2 + layers * n * s.intermediate + (2 * layers + 1) * 2 * n * d
    prefill = s.patches + QUESTION
    return {
        "parameters": s.paper / 1e6,
        "flops": (s.text_flops(n, n, n) + 2 * extra) / 1e9,
        "all_parameters": s.weights / 1e6,
        "image_flops": (s.image_flops + s.text_flops(prefill, prefill, prefill)) / 1e9,
    }


def size_of(folder: str | Path) -> dict[str, float]:
    """`size` of a model folder. Raises ValueError where it holds no config.json."""
    return size(config_of(folder))
