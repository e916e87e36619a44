"""Build, load, save and check the models: a transformers LLaVA (CLIP tower, two-layer projector, Llama) and its processor."""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from geodistill.config import ModelConfig
from geodistill.data.rows import Responses, Rows, attends
from geodistill.language import BOS, EOS, IMAGE, PAD, chat_template
from geodistill.models.vision import load_tower, new_tower


def new_tokenizer(texts: Iterable[str], vocabulary: int, system: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from `texts`, in which every number from 0 to 100 is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = "".join(f"<{i}>" for i in range(181)) + "{<0><0><0><0>|<0>}"

    def corpus() -> Iterable[str]:
        yield system + " USER: ASSISTANT:"
        for text in texts:
            yield " " + text
        for _ in range(10_000):
            yield numbers

    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        chat_template=chat_template(system),
        padding_side="left",
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, or of the shards. Raises ValueError where there is none."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{folder} holds no tokenizer.json; run jobs/prepare.py first, or correct the path")
    return AutoTokenizer.from_pretrained(folder)


def new_processor(tokenizer: PreTrainedTokenizerFast, image_size: int, patch: int) -> LlavaProcessor:
    """The processor of a model: square images of `image_size` pixels, GeoChat's prompt."""
    size = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
    )


def new_model(sizes: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights (and the tower of `sizes.tower`, where given, read at the layer its model reads)."""
    tower, layer = load_tower(sizes.tower) if sizes.tower else (new_tower(sizes.vision), None)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=sizes.vision.feature_layer if layer is None else layer,
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    if sizes.tower:
        model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def load(folder: str | Path, dtype: torch.dtype = torch.float32, bits: int = 0):
    """(model, processor) of a saved folder, its weights in `dtype`; its linear layers in 8 or 4 `bits` where they are given.

    Raises ValueError where the folder is missing, its weights do not fit, or bitsandbytes is.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (config.json is missing); run the job that writes it, or correct the path")
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, quantization_config=_quantised(bits, dtype)
    )
    wrong = {k: sorted(v) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if (v := info.get(k))}
    if wrong:
        raise ValueError(f"{folder}: the weights do not fit its config.json: {wrong}")
    return model, AutoProcessor.from_pretrained(folder)


def _quantised(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings: LLM.int8 or NF4, for every linear layer but head, tower and projector."""
    if not bits:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"a teacher in {bits} bits needs bitsandbytes: pip install 'geodistill[quantised]', or teacher_bits=0")
    kept = ["lm_head", "vision_tower", "multi_modal_projector"]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
    )


def save(model, processor, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a folder that plain transformers loads, whole or not at all. `weights`: in place of those of `model`."""
    folder = Path(folder)
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():  # an earlier save was killed between its two renames
        old.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(partial, state_dict=weights)
    processor.save_pretrained(partial)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def weights_digest(folder: str | Path) -> str:
    """sha256 over the weights of a saved model; raises ValueError where there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no model (no *.safetensors); run the job that writes it, or correct the path")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def image_tokens(model) -> int:
    """How many tokens an image takes in a LLaVA."""
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def forbidden_tokens(tokenizer, vocabulary: int) -> Tensor:
    """bool [vocabulary]: tokens that no response may hold: image, padding, start, unknown, and rows of the head that the
    tokenizer does not know. The end token may."""
    forbidden = torch.arange(vocabulary) >= len(tokenizer)
    names = (IMAGE, tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token)
    forbidden[[tokenizer.convert_tokens_to_ids(name) for name in names if name]] = True
    forbidden[tokenizer.eos_token_id] = False  # some tokenizers pad with it
    return forbidden


def image_shape_of(folder: str | Path) -> tuple[int, int]:
    """(image_size, patch_size) in pixels of a saved model or tower, from its config.json alone. Raises ValueError."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no model (config.json is missing); run the job that writes it, or correct the path")
    config = json.loads(file.read_text())
    vision = config.get("vision_config", config)
    return vision["image_size"], vision["patch_size"]


def vocabulary_of(folder: str | Path) -> dict[str, int]:
    """Token -> id of a saved model, from its tokenizer.json alone. Raises ValueError where there is none."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no tokenizer.json; run the job that writes it, or correct the path")
    return Tokenizer.from_file(str(file)).get_vocab()


def check_pair(teacher: str | Path, student_vocabulary: dict[str, int], student_image: tuple[int, int]) -> None:
    """Raise ValueError before any weight is loaded if teacher and student cannot write one response together.

    student_image: (image_size, patch_size) in pixels.
    """
    size, patch = image_shape_of(teacher)
    if (size, patch) != student_image:
        raise ValueError(
            f"the teacher {teacher} sees {(size // patch) ** 2} image tokens ({size} pixels in patches of {patch}), the student "
            f"{(student_image[0] // student_image[1]) ** 2} ({student_image[0]} in {student_image[1]}): "
            "give student.model.vision the teacher's image_size and patch"
        )
    vocabulary = vocabulary_of(teacher)
    if vocabulary != student_vocabulary:
        odd = sorted(set(vocabulary.items()) ^ set(student_vocabulary.items()))[:3]
        raise ValueError(
            f"teacher {teacher} ({len(vocabulary)} tokens) and student ({len(student_vocabulary)} tokens) have different "
            f"vocabularies, for example {odd}: token distributions can only be compared over one vocabulary"
        )


def same_tower(a, b, dtype: torch.dtype = torch.float32) -> bool:
    """Do two models hold the same vision tower, weight for weight in `dtype`, and read the same layers of it?"""
    left, right = a.model.vision_tower.state_dict(), b.model.vision_tower.state_dict()
    read = [
        (m.config.vision_feature_layer, *(getattr(m.config.vision_config, k, None) for k in ("vit_layers", "conv_stages")))
        for m in (a, b)
    ]
    return (
        left.keys() == right.keys()
        and read[0] == read[1]
        and all(left[k].shape == right[k].shape and torch.equal(left[k].to(dtype), right[k].to(dtype)) for k in left)
    )


class RowModel(nn.Module):
    """A LLaVA that reads image rows. `align`: the learned map A of L_align, trained with the student, never exported."""

    def __init__(self, model, align: nn.Module | None = None, freeze_tower: bool = True):
        super().__init__()
        assert model.config._attn_implementation == "sdpa", "only SDPA reads a boolean row mask as a mask"
        self.model = model
        self.align = align
        self.tower_frozen = freeze_tower
        if freeze_tower:
            model.model.vision_tower.requires_grad_(False)

    def see(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalised images -> tower features [B, N, H]."""
        config = self.model.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.tower_frozen):
            output = self.model.model.vision_tower(pixel_values=pixels_BCHW.to(self.model.dtype), output_hidden_states=True)
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
        return self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=position_RQ,
            attention_mask=mask_R1QK,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V]."""
        return self.model.lm_head(hidden)

    def forward(
        self, rows: Rows, responses: Responses, features_BNH: Tensor | None, pixels_BCHW: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [M, V] of the valid response tokens, and z [B, N, D] (through `align` where there is one).

        features_BNH: tower features; None: the tower is trained and runs here, on `pixels_BCHW`.
        """
        if features_BNH is None:
            assert pixels_BCHW is not None
            features_BNH = self.see(pixels_BCHW)
        z = self.project(features_BNH)
        branch = torch.cat([rows.branch_RP, responses.branch_RC], 1)
        position = torch.cat([rows.position_RP, responses.position_RC], 1)
        ids = torch.cat([rows.ids_RP, responses.ids_RC], 1)
        hidden = self.hidden(ids, position, attends(branch, position, branch, position), z[rows.image_R])
        logits = self.head(hidden[:, rows.ids_RP.shape[1] :][responses.valid_RC])
        return logits, z if self.align is None else self.align(z)
