"""Build, load, save and check the models: a transformers LLaVA (CLIP tower, two-layer projector, Llama) and its processor."""

import hashlib
import importlib.util
import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from geodistill.config import ModelConfig
from geodistill.data.files import local, written
from geodistill.language import BOS, EOS, IMAGE, PAD, chat_template
from geodistill.models.row_model import is_llava
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
    here = local(folder, weights=False)
    if not (here / "tokenizer.json").is_file():
        raise ValueError(f"{folder} holds no tokenizer.json; run jobs/prepare.py first, or correct the path")
    return AutoTokenizer.from_pretrained(here)


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


def config_of(folder: str | Path) -> PretrainedConfig:
    """The transformers config of a saved folder, without its weights. Raises ValueError where there is none."""
    here = local(folder, weights=False)
    if not (here / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (config.json is missing); run the job that writes it, or correct the path")
    return AutoConfig.from_pretrained(here)


def load(folder: str | Path, dtype: torch.dtype = torch.float32, bits: int = 0):
    """(model, processor) of a saved folder, its weights in `dtype`; its linear layers in 8 or 4 `bits` where they are given.

    Raises ValueError where the folder is missing, its weights do not fit, or bitsandbytes is.
    """
    config_of(folder)
    here = local(folder)
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns of its casts at every multiplication
    given = {"quantization_config": _quantised(bits, dtype)} if bits else {}  # None would undo that of a quantised folder
    model, info = AutoModelForImageTextToText.from_pretrained(
        here, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, **given
    )
    wrong = {k: sorted(v) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if (v := info.get(k))}
    if wrong:
        raise ValueError(f"{folder}: the weights do not fit its config.json: {wrong}")
    if is_llava(model.config):
        processor = AutoProcessor.from_pretrained(here)
    else:
        processor = Processor(AutoTokenizer.from_pretrained(here), _image_processor(here), here)
    legacy = here / "chat_template.json"  # transformers reads it into a processor, not into its tokenizer
    if not processor.tokenizer.chat_template and legacy.is_file():
        processor.tokenizer.chat_template = json.loads(legacy.read_text())["chat_template"]
    return model, processor


@dataclass
class Processor:
    """What is needed of the processor of another family than LLaVA: theirs cannot be built without torchvision, for videos."""

    tokenizer: Any
    image_processor: Any
    folder: Path

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both, and the settings beside them (of videos, of the whole processor) as they were."""
        for file in [*self.folder.glob("*processor*.json"), *self.folder.glob("chat_template*")]:
            shutil.copy(file, folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def _image_processor(folder: str | Path):
    processor = AutoImageProcessor.from_pretrained(folder)
    for name in ("do_image_splitting", "crop_to_patches"):  # whole images: parts multiply their tokens, and need texts between
        if hasattr(processor, name):
            setattr(processor, name, False)
    return processor


def _quantised(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """bitsandbytes' settings: LLM.int8 or NF4, for every linear layer but head, tower and projector."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"a teacher in {bits} bits needs bitsandbytes: pip install 'geodistill[quantised]', or teacher_bits=0")
    # the library matches whole names from their start
    kept = ["lm_head", r"model\.(vision_tower|visual|vision_model|multi_modal_projector|connector)"]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
    )


def save(model, processor, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a folder, local or s3://, that plain transformers loads; a local one whole or not at all. `weights`: in place of
    those of `model`."""
    if "://" in str(folder):
        with written(folder) as here:
            model.save_pretrained(here, state_dict=weights)
            processor.save_pretrained(here)
        return
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
    files = sorted(local(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no model (no *.safetensors); run the job that writes it, or correct the path")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def forbidden_tokens(tokenizer, vocabulary: int) -> Tensor:
    """bool [vocabulary]: tokens that no response may hold: image, padding, start, unknown and all other special ones, and rows
    of the head that the tokenizer does not know. The end token may."""
    forbidden = torch.arange(vocabulary) >= len(tokenizer)
    forbidden[[i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i < vocabulary]] = True
    forbidden[tokenizer.eos_token_id] = False  # some tokenizers pad with it
    return forbidden


def image_side(config, given: int) -> int:
    """Pixels of a side of the square that images are brought to: `given`, or what the tower sees, by the transformers config of a
    model. Raises ValueError."""
    side = given or getattr(config.vision_config, "image_size", 0)
    side = side[0] if isinstance(side, list | tuple) else side
    if not side:
        raise ValueError(f"{config.model_type} takes images of any size: set image_size=PIXELS, the side they are brought to")
    return side


def same_tower(a, b, dtype: torch.dtype = torch.float32) -> bool:
    """Do two models hold the same vision tower, weight for weight in `dtype`, and read the same layers of it?"""
    if not all(is_llava(m.config) for m in (a, b)):
        return False  # other families' towers are not apart from their projectors
    left, right = a.model.vision_tower.state_dict(), b.model.vision_tower.state_dict()
    read = [
        (m.config.vision_feature_layer, *(getattr(m.config.vision_config, k, None) for k in ("vit_layers", "conv_stages")))
        for m in (a, b)
    ]
    return (
        left.keys() == right.keys()
        and read[0] == read[1]
        and all(left[k].shape == right[k].shape and torch.equal(*(of[k].to("cpu", dtype) for of in (left, right))) for k in left)
    )
