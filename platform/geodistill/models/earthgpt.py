"""EarthGPT's visual encoder: several layers of a ViT and several scales of a ConvNet, joined along channels.

A ViT relates distant places of an image, a ConvNet keeps its local texture and edges; EarthGPT shows both to the language
model (Zhang et al., TGRS 2024, doi:10.1109/TGRS.2024.3409624; no code is published). `VitConvNetModel` is one vision tower
to transformers' own LLaVA, so that everything else in GeoDistill is the same code for both kinds of tower. Importing this
module makes the Auto classes of transformers know it.

What the paper leaves open is decided here:
- One resolution: the ViT's patch grid, for an image token must be one place in every part. `alignment` brings maps there.
- One scale: each part of each token is normalised to mean 0 and variance 1 over its channels. Residual streams differ in
  size by orders of magnitude, and the projector would hear only the loudest. The normalisation has no weights: the
  projector starts with a linear map, which can learn any, and so the tower holds the weights of its two parts alone.

Shapes: B images, N patches in row-major order, H joined channels (the ViT's layers first, both as listed in the config).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, ConvNextConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

VITS = ("clip_vision_model", "dinov2")
CONVNETS = ("convnext", "convnextv2")


class VitConvNetConfig(PreTrainedConfig):
    """Sizes of a `VitConvNetModel`.

    vit_config, convnet_config: transformers configs of the parts, or their dictionaries (`VITS`, `CONVNETS`).
    vit_layers: hidden states of the ViT that are read; 0: embeddings, 1: after the first layer, -1: the last.
    conv_stages: stages of the ConvNet that are read, from 1; stage s has one cell for 4 * 2**(s - 1) pixels.
    image_size and patch_size (pixels), num_channels and hidden_size (H) follow from these, and are what a CLIP tower has.

    Raises ValueError where the parts do not fit together, or where a value given does not follow.
    """

    model_type = "vit_convnet"
    base_config_key = "vision_config"
    sub_configs = {"vit_config": AutoConfig, "convnet_config": AutoConfig}  # noqa: RUF012

    def __init__(self, vit_config=None, convnet_config=None, vit_layers=(-2, -4), conv_stages=(1, 2, 3, 4), **kwargs):
        vit = _config(CLIPVisionConfig() if vit_config is None else vit_config, VITS)
        convnet = _config(ConvNextConfig() if convnet_config is None else convnet_config, CONVNETS)
        self.vit_config, self.convnet_config = vit, convnet
        self.vit_layers, self.conv_stages = list(vit_layers), list(conv_stages)
        depth, stages = vit.num_hidden_layers, len(convnet.hidden_sizes)
        if not self.vit_layers or not all(-depth - 1 <= layer <= depth for layer in self.vit_layers):
            raise ValueError(f"vit_layers={self.vit_layers}: name hidden states of the ViT, {-depth - 1} to {depth}")
        if not self.conv_stages or not all(1 <= stage <= stages for stage in self.conv_stages):
            raise ValueError(f"conv_stages={self.conv_stages}: name stages of the ConvNet, 1 to {stages}")
        if vit.num_channels != convnet.num_channels:
            raise ValueError(f"the ViT reads {vit.num_channels} channels, the ConvNet {convnet.num_channels}: give both as many")
        follows = {
            "image_size": vit.image_size,
            "patch_size": vit.patch_size,
            "num_channels": vit.num_channels,
            "hidden_size": vit.hidden_size * len(self.vit_layers) + sum(convnet.hidden_sizes[s - 1] for s in self.conv_stages),
        }
        for name, value in follows.items():
            if kwargs.pop(name, value) != value:
                raise ValueError(f"{name} of a {self.model_type} follows from its parts: {value}; leave it out")
            setattr(self, name, value)
        super().__init__(**kwargs)


def _config(given, kinds: tuple[str, ...]):
    """The config of a part, which may be a dictionary. Raises ValueError unless it is one of `kinds`."""
    config = AutoConfig.for_model(**given) if isinstance(given, dict) else given
    if config.model_type not in kinds:
        raise ValueError(f"{config.model_type} cannot be this part of a {VitConvNetConfig.model_type}; use {' or '.join(kinds)}")
    return config


def alignment(patches: int, patch: int, cells: int, stride: int, device=None) -> Tensor:
    """float32 [patches, cells]: the weights with which each patch along one side reads the cells of a feature map.

    Patches are `patch` pixels long, cells `stride`. A weight falls linearly with the distance between the two centres and
    reaches zero at the longer of the two lengths. For larger cells this is bilinear interpolation (EarthGPT's upsampling);
    for smaller ones it averages all cells around the patch, where plain bilinear interpolation would read two and skip the
    rest. Centres are pixels of the image, so a map stays in place although a ConvNet drops a border that fills no cell.
    A matrix, and not F.interpolate, whose gradient is not deterministic on a GPU.
    """
    cell = (torch.arange(cells, device=device, dtype=torch.float32) + 0.5) * stride
    center = (torch.arange(patches, device=device, dtype=torch.float32) + 0.5) * patch
    center = center.clamp(0.5 * stride, (cells - 0.5) * stride)  # beyond the outermost cells: their values
    weights = (1 - (center[:, None] - cell).abs() / max(patch, stride)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


class VitConvNetModel(PreTrainedModel):
    """The tower. Both parts see the same pixels, normalised the same way.

    Its features have the form of a CLIP tower's: a token of the whole image (the ViT's class token, the mean of each map),
    then the N patches. So LLaVA reads it with vision_feature_layer=-1 and its default strategy, which drops the first token.
    """

    config_class = VitConvNetConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True  # the ViT; transformers' ConvNeXt knows none
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VitConvNetConfig):
        super().__init__(config)
        self.vit = AutoModel.from_config(config.vit_config)
        self.convnet = AutoModel.from_config(config.convnet_config, attn_implementation="eager")  # it has none; refuses "sdpa"
        self.post_init()

    def forward(self, pixel_values: Tensor, return_dict: bool = True, **kwargs):
        """pixel_values [B, channels, image_size, image_size] -> last_hidden_state [B, 1 + N, H], in fact the only one.

        `hidden_states` holds it alone; what else a caller of transformers may ask for (attentions) is not given.
        """
        config = self.config
        pixel_values = pixel_values.to(self.dtype)
        layers = self.vit(pixel_values, output_hidden_states=config.vit_layers).hidden_states
        maps = self.convnet(pixel_values, output_hidden_states=config.conv_stages).hidden_states
        parts = [layers[i] for i in config.vit_layers] + [self._tokens(maps[s], s, pixel_values) for s in config.conv_stages]
        joined = torch.cat([F.layer_norm(part, part.shape[-1:]) for part in parts], dim=-1)
        output = BaseModelOutputWithPooling(last_hidden_state=joined, pooler_output=joined[:, 0], hidden_states=(joined,))
        return output if return_dict else output.to_tuple()

    def _tokens(self, map_BCHW: Tensor, stage: int, pixel_values: Tensor) -> Tensor:
        """The map of a stage -> tokens [B, 1 + N, C]: its mean, then what lies at each patch."""
        patch, stride = self.config.patch_size, self.config.convnet_config.patch_size * 2 ** (stage - 1)
        down, across = (
            alignment(pixels // patch, patch, cells, stride, map_BCHW.device).to(map_BCHW.dtype)
            for pixels, cells in zip(pixel_values.shape[2:], map_BCHW.shape[2:], strict=True)
        )
        at_patches = down @ map_BCHW @ across.T
        return torch.cat([map_BCHW.mean((2, 3))[:, None], at_patches.flatten(2).transpose(1, 2)], dim=1)

    @classmethod
    def from_parts(cls, vit: str | Path, convnet: str | Path, vit_layers: list[int], conv_stages: list[int]) -> "VitConvNetModel":
        """A float32 tower with the weights of two transformers folders: a CLIP (whole, or its tower) or DINOv2, and a ConvNeXt.

        The image size is the ViT's. The two should have been trained on pixels normalised alike, as CLIP's ViT and ConvNeXt are.
        Raises ValueError where a folder lacks weights or holds another kind of model.
        """
        parts = [_load_part(vit), _load_part(convnet)]
        config = VitConvNetConfig(parts[0].config, parts[1].config, vit_layers, conv_stages)
        with torch.device("meta"):  # every weight comes from the parts
            tower = cls(config)
        tower.vit, tower.convnet = parts
        return tower.eval()


def _load_part(folder: str | Path) -> PreTrainedModel:
    model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks weights of a {model.config.model_type}: {sorted(info['missing_keys'])[:3]}")
    return model.vision_model if model.config.model_type == "clip" else model


def new_vit_convnet(
    vit: PreTrainedConfig, conv_widths: list[int], conv_depths: list[int], vit_layers: list[int]
) -> VitConvNetModel:
    """A tower with random weights: `vit`, and a ConvNeXt of one stage a width, `conv_depths` blocks each, all stages read.

    Raises ValueError unless there is a depth for each width.
    """
    if len(conv_widths) != len(conv_depths):
        raise ValueError(f"conv_widths={conv_widths} and conv_depths={conv_depths} must name as many stages")
    convnet = ConvNextConfig(
        num_channels=vit.num_channels,
        num_stages=len(conv_widths),
        hidden_sizes=list(conv_widths),
        depths=list(conv_depths),
        layer_scale_init_value=0.1,  # for a shallow net (CaiT, arXiv:2103.17239); the default of 1e-6 is for dozens of blocks
        image_size=vit.image_size,
    )
    return VitConvNetModel(VitConvNetConfig(vit, convnet, vit_layers, range(1, len(conv_widths) + 1)))


AutoConfig.register(VitConvNetConfig.model_type, VitConvNetConfig)
AutoModel.register(VitConvNetConfig, VitConvNetModel)
