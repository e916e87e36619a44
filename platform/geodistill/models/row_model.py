"""RowModel: one face for every image-text-to-text model of transformers, so that rows, decoding and losses know no family.

LLaVA is read in its parts: its tower runs once for every use of an image. Of any other family, tower and projector are one
function, `get_image_features`; what this file assumes of it is checked against the model's own forward pass when it is made.
Shapes: B images, N image tokens, R rows, Q columns fed, K columns seen, D width, V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geodistill.data.rows import PADDING, Responses, Rows, attends
from geodistill.models.attention import NAMES, attend_by, block_mask, by_sdpa
from geodistill.models.vision import normalize

# what a family writes around its image tokens, where its chat template does not
AROUND = {
    "internvl": ("<img>", "</img>"),
    "smolvlm": ("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    "idefics3": ("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
}
NESTED = ("smolvlm", "idefics3")  # their image processors take a list of images for each text
NOISE = 0.1  # rounding may make up that share of the effect that a fault would have


def is_llava(config) -> bool:
    """Does it read an image as LLaVA-1.5 does: one layer of a tower without its first token, CLIP's mean and deviation?"""
    return (
        config.model_type == "llava"
        and config.vision_config.model_type in ("clip_vision_model", "vit_convnet")
        and config.vision_feature_select_strategy == "default"
        and isinstance(config.vision_feature_layer, int)
    )


def language_model(model) -> nn.Module:
    """The language model of a transformers image-text-to-text model, without its head."""
    return model.model.language_model if hasattr(model.model, "language_model") else model.model.text_model


def projector(model) -> nn.Module:
    """What leads from its vision tower to its language model. Raises ValueError where that part is not known."""
    for owner, name in ((model.model, "multi_modal_projector"), (model.model, "connector"), (tower(model), "merger")):
        if hasattr(owner, name):
            return getattr(owner, name)
    raise ValueError(f"{type(model).__name__} has no projector that is known: this family cannot be trained in parts")


def tower(model) -> nn.Module:
    """Its vision tower (Qwen2.5-VL: with the merger). Raises ValueError where that part is not known."""
    for name in ("vision_tower", "visual", "vision_model"):
        if hasattr(model.model, name):
            return getattr(model.model, name)
    raise ValueError(f"{type(model).__name__} has no vision tower that is known: this family cannot be read yet")


class RowModel(nn.Module):
    """A LLaVA that reads image rows. `align`: the learned map A of L_align, trained with the student, never exported.

    vocabulary: tokens of the tokenizer; rows of the head past it, which only fill it up, are cut off.
    takes_rows: does it read several questions in a row? False: rows must hold one question.
    """

    def __init__(self, model, align: nn.Module | None = None, freeze_tower: bool = True, vocabulary: int | None = None):
        super().__init__()
        assert model.config._attn_implementation in ("sdpa", NAMES["sdpa"]), "only SDPA reads a boolean row mask as a mask"
        self.model = model
        self.align = align
        self.vocabulary = vocabulary
        self.takes_rows = True
        self.attend_by("sdpa")
        self.tower_frozen = freeze_tower
        if freeze_tower:
            self._freeze()

    def _freeze(self) -> None:
        tower(self.model).requires_grad_(False)

    @property
    def image_token(self) -> int:
        """The id that stands for each part of an image."""
        return self.model.config.image_token_id

    def image_tokens(self, side: int) -> int:
        """N of an image of `side` pixels."""
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def around(self) -> tuple[str, str]:
        """What stands before and behind the image tokens, beside the chat template's own words."""
        return "", ""

    def begin(self, prefix: list[int], prompt: list[int], side: int) -> None:
        """Look once at how this model reads: `prefix` are the tokens of an image, `prompt` those of any question.

        Sets `takes_rows`. Raises ValueError for a model that cannot be read.
        """
        self.takes_rows = self._reads(prompt)

    @torch.no_grad()
    def _reads(self, text: list[int]) -> bool:
        """Do two branches in one row give what they give alone? If not: does one behind padding?

        The measure is what a wrong mask would change. Raises ValueError where neither does.
        """
        device = next(language_model(self.model).parameters()).device
        text = (text * 10)[:10]
        ids = torch.tensor([text], device=device)
        branch = torch.tensor([[0] * 4 + [1] * 3 + [2] * 3], device=device)
        position = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]], device=device)

        def run(branch: Tensor, columns: Sequence[int] = tuple(range(10))) -> Tensor:
            own, at = branch[:, [*columns]], position[:, [*columns]]
            return self.hidden(ids[:, [*columns]], at, attends(own, at, own, at))[0, -3:].float()

        self.takes_rows = False  # a plain mask first: every model takes it
        alone, padded = run(branch, [0, 1, 2, 3, 7, 8, 9]), run(torch.where(branch == 1, PADDING, branch))
        limit = NOISE * (run(branch) - alone).norm()
        self.takes_rows = True
        with suppress(ValueError, TypeError, RuntimeError, IndexError):  # what models say to a mask of four dimensions
            if (run(branch) - alone).norm() < limit:
                return True
        if (padded - alone).norm() < limit:
            return False
        raise ValueError(f"{type(self.model).__name__} reads neither a row mask nor padding between prompt and answer")

    def prepare(self, images_BHWC: Tensor, blind: bool = False) -> Any:
        """uint8 images -> what `see` takes, on their device; blind: without what they show."""
        pixels = normalize(images_BHWC).to(self.model.dtype)
        return torch.zeros_like(pixels) if blind else pixels

    def see(self, pixels: Any) -> Tensor:
        """Normalised images [B, 3, S, S] -> tower features [B, N, H]."""
        config = self.model.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.tower_frozen):
            output = self.model.model.vision_tower(pixel_values=pixels.to(self.model.dtype), output_hidden_states=True)
        return output.hidden_states[config.vision_feature_layer][:, 1:]

    def project(self, features_BNH: Tensor) -> Tensor:
        """Tower features -> image embeddings z [B, N, D]."""
        return self.model.model.multi_modal_projector(features_BNH)

    def hidden(self, ids_RQ: Tensor, position_RQ: Tensor, mask_R1QK: Tensor, z_RND: Tensor | None = None, cache=None) -> Tensor:
        """Last hidden states [R, Q, D]. `z_RND` replaces the image tokens of `ids_RQ`; `cache` is extended in place."""
        embeds = self.model.get_input_embeddings()(ids_RQ)
        if z_RND is not None:
            at_image = (ids_RQ == self.model.config.image_token_id)[..., None]
            embeds = embeds.masked_scatter(at_image, z_RND.to(embeds.dtype))
        mask = mask_R1QK if self.takes_rows else mask_R1QK.any(2)[:, 0].long()
        flex = self.attention == "flex" and cache is None
        with by_sdpa(self.model) if self.attention == "flex" and cache is not None else nullcontext():
            return language_model(self.model)(
                inputs_embeds=embeds,
                position_ids=self._places(position_RQ),
                attention_mask=block_mask(mask) if flex else mask,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state

    def attend_by(self, name: str) -> None:
        """Read whole rows by `name`, sdpa or flex; with a cache it is always sdpa."""
        self.attention = name
        attend_by(self.model, name)

    def _places(self, position_RQ: Tensor) -> Tensor:
        """Positions in a branch -> those that the language model takes."""
        return position_RQ

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V]."""
        return self.model.lm_head(hidden)[..., : self.vocabulary]

    def head_weights(self) -> list[nn.Parameter]:
        """The weights of `head`."""
        return [*self.model.lm_head.parameters()]

    def forward(
        self,
        rows: Rows,
        responses: Responses,
        features_BNH: Tensor | None,
        pixels: Any = None,
        judge: Callable[[Tensor], Any] | None = None,
    ) -> tuple[Any, Tensor]:
        """(what `judge` makes of the hidden states [M, D] of the valid response tokens; without one: their logits [M, V]),
        and z [B, N, D] (through `align` where there is one).

        features_BNH: tower features; None: the tower runs here, on `pixels`, because it is trained or not apart.
        """
        if features_BNH is None:
            assert pixels is not None
            features_BNH = self.see(pixels)
        z = self.project(features_BNH)
        branch = torch.cat([rows.branch_RP, responses.branch_RC], 1)
        position = torch.cat([rows.position_RP, responses.position_RC], 1)
        ids = torch.cat([rows.ids_RP, responses.ids_RC], 1)
        hidden = self.hidden(ids, position, attends(branch, position, branch, position), z[rows.image_I])
        found = (judge or self.head)(hidden[:, rows.ids_RP.shape[1] :][responses.valid_RC])
        return found, z if self.align is None else self.align(z)


class AnyRowModel(RowModel):
    """Any other family: its image processor prepares, `get_image_features` sees and projects in one.

    So a frozen tower runs again for every use of an image, and `see` gives z [B, N, D] at once.
    """

    rope_3P: Tensor | None = None  # Qwen's positions of the prefix in time, height and width

    def __init__(
        self,
        model,
        image_processor,
        align: nn.Module | None = None,
        freeze_tower: bool = True,
        vocabulary: int | None = None,
    ):
        super().__init__(model, align, freeze_tower, vocabulary)
        self.tower_frozen = False  # there are no features to keep
        self.image_processor = image_processor

    def _freeze(self) -> None:
        trained = [(p, p.requires_grad) for p in projector(self.model).parameters()]
        tower(self.model).requires_grad_(False)
        for parameter, was in trained:  # Qwen's projector is a part of its tower
            parameter.requires_grad_(was)

    def image_tokens(self, side: int) -> int:
        return self.see(self.prepare(self._some_image(side))).shape[1]

    def around(self) -> tuple[str, str]:
        return AROUND.get(self.model.config.model_type, ("", ""))

    def _some_image(self, side: int) -> Tensor:
        noise = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
        return torch.from_numpy(noise).to(self.model.device)

    def prepare(self, images_BHWC: Tensor, blind: bool = False) -> dict[str, Tensor]:
        images = [*np.zeros(images_BHWC.shape, np.uint8)] if blind else [*images_BHWC.cpu().numpy()]
        nested = self.model.config.model_type in NESTED
        made = self.image_processor([[image] for image in images] if nested else images, return_tensors="pt")
        taken = inspect.signature(self.model.model.get_image_features).parameters
        return {k: v.to(images_BHWC.device) for k, v in made.items() if k in taken}

    def see(self, pixels: Any) -> Tensor:
        given = {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in pixels.items()}
        found = self.model.model.get_image_features(**given).pooler_output
        return found if isinstance(found, Tensor) else torch.stack([*found])

    def project(self, features_BNH: Tensor) -> Tensor:
        return features_BNH

    def _places(self, position_RQ: Tensor) -> Tensor:
        if self.rope_3P is None:
            return position_RQ
        prefix = self.rope_3P.shape[1]
        behind = position_RQ + self.rope_3P.max() + 1 - prefix
        return torch.where(position_RQ < prefix, self.rope_3P[:, position_RQ.clamp(max=prefix - 1)], behind)

    @torch.no_grad()
    def begin(self, prefix: list[int], prompt: list[int], side: int) -> None:
        """As above; and raises ValueError where an image read in this way gives other logits than the model's own forward."""
        super().begin(prefix, prompt, side)
        pixels = self.prepare(self._some_image(side))
        ids = torch.tensor([prefix + prompt], device=self.model.device)
        own = {**pixels, "mm_token_type_ids": (ids == self.image_token).int()}
        if hasattr(self.model.model, "get_rope_index"):
            taken = inspect.signature(self.model.model.get_rope_index).parameters
            places, _ = self.model.model.get_rope_index(ids, **{k: own[k] for k in own if k in taken})
            self.rope_3P = places[:, 0, : len(prefix)]
        position = torch.arange(ids.shape[1], device=ids.device)[None]
        mask = attends(position * 0, position, position * 0, position)
        z = self.see(pixels)
        taken = inspect.signature(self.model.model.forward).parameters
        theirs = self.model(input_ids=ids, **{k: own[k] for k in own if k in taken}).logits[0, -1, : self.vocabulary]
        ours, unseen = (self.head(self.hidden(ids, position, mask, image)[0, -1]) for image in (z, z * 0))
        error, effect = ((other - theirs).float().norm().item() for other in (ours, unseen))
        if not error < NOISE * effect:
            raise ValueError(
                f"{type(self.model).__name__} does more with an image than put it in place of its image tokens (logits differ by "
                f"{error:.2g}, without the image by {effect:.2g}): this family cannot be distilled yet"
            )


def row_model(model, image_processor, align: nn.Module | None = None, freeze_tower: bool = True, vocabulary: int | None = None):
    """The RowModel for `model`, a transformers image-text-to-text model with its image processor."""
    if is_llava(model.config):
        return RowModel(model, align, freeze_tower, vocabulary)
    return AnyRowModel(model, image_processor, align, freeze_tower, vocabulary)
