"""Published checkpoints -> a folder that plain transformers loads, proved by equal logits.

A folder is recognised by what it holds: a transformers LLaVA; an original LLaVA-1.5 or GeoChat; or a LoRA adapter of one with
its `non_lora_trainables.bin`, over a Vicuna or LLaVA. Weights stay in their files until they are written, a shard at a time.
Shapes: R rows of a position embedding (class row first), D features.
"""

import gc
import json
import math
import pickle
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from geodistill.language import BOS, EOS, IMAGE, PAD, SYSTEM, chat_template
from geodistill.models.assemble import new_processor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The largest difference of a logit, over the largest logit, that rounding weights to the written dtype can explain. Where none
# is rounded, float32's holds. Of a tiny adapter a scale wrong by 10 % is refused in each, by 1 % in float32 and float16 only.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}
SHARD = "2GB"  # and so the most that is held at once
GEOCHAT_PIXELS = 504  # GeoChat's code widens its tower to this, whatever the files say

# The names that are written: those of published transformers LLaVAs, which every version reads.
TOWER, PROJECTOR, TEXT, HEAD = "vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."  # fmt: skip  # noqa: E501
POSITIONS, EMBEDDING = f"{TOWER}embeddings.position_embedding.weight", f"{TEXT}embed_tokens.weight"
Prefixes = tuple[tuple[str, str], ...]  # (theirs, ours); the first that fits holds
THEIR_TOWER = "model.vision_tower.vision_tower.vision_model."
ORIGINAL: Prefixes = (
    (THEIR_TOWER, TOWER),
    ("model.mm_projector.0.", f"{PROJECTOR}linear_1."),
    ("model.mm_projector.2.", f"{PROJECTOR}linear_2."),
    ("model.", TEXT),
    ("lm_head.", HEAD),
)
TRANSFORMERS: Prefixes = (
    *((f"{outer}vision_tower.{inner}", TOWER) for outer in ("model.", "") for inner in ("vision_model.", "")),
    *((f"{outer}multi_modal_projector.", PROJECTOR) for outer in ("model.", "")),
    *((theirs, TEXT) for theirs in (TEXT, "model.language_model.")),
    *((theirs, HEAD) for theirs in (HEAD, "lm_head.")),
)
HARMLESS = ("rotary_emb.inv_freq", "embeddings.position_ids")  # buffers that older versions stored
FIELDS = {  # of an original config.json: what holds where it is absent, and what can be converted
    "mm_projector_type": ("linear", ("mlp2x_gelu",)),
    "mm_vision_select_feature": ("patch", ("patch",)),
    "mm_use_im_start_end": (False, (False,)),
    "image_aspect_ratio": ("square", ("square", "pad")),
}
TEXT_FIELDS = re.compile(
    "(vocab|hidden|intermediate)_size|num_.*(layers|heads)|head_dim|hidden_act|rms_norm_eps|rope_.*|max_position.*|.*_bias"
)
LORA_FIELDS = re.compile("use_dora|alpha_pattern|lora_bias|layer_replication|use_qalora|trainable_token_indices|arrow_config")


@dataclass
class Checkpoint:
    """A model folder as it was read. The tensors lie in their files, under the names of the left side of `names`."""

    kind: str  # transformers, original or adapter
    folder: Path
    config: dict  # config.json of the LLaVA
    weights: dict[str, Tensor]
    files: list[Path]
    tokenizer: Path
    lora: dict[str, tuple[Tensor, Tensor]]  # name of a weight -> A [r, in], B [out, r]
    scale: Callable[[int], float]  # r -> what B A is multiplied by
    vision: dict | None  # config.json of the tower's own folder

    @property
    def names(self) -> Prefixes:
        return TRANSFORMERS if self.kind == "transformers" else ORIGINAL


def interpolate_positions(weight_RD: Tensor, grid: int) -> Tensor:
    """Position embedding of a square grid of patches -> the same of `grid` x `grid` patches, [1 + grid^2, D], as GeoChat does it.

    The class row (the first) is kept; the others are bicubic samples (a = -0.75) of the grid they had, whose corners stay
    corners. Computed in float32, returned in the dtype given. Raises ValueError where the rows are no square and a class row.
    """
    old = math.isqrt(len(weight_RD) - 1)
    if old * old != len(weight_RD) - 1:
        raise ValueError(f"{POSITIONS} has {len(weight_RD)} rows, which are not a class row and a square of patches")
    if old == grid:
        return weight_RD
    square = weight_RD[1:].float().T.reshape(1, -1, old, old)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=True)
    return torch.cat([weight_RD[:1], square[0].flatten(1).T.to(weight_RD.dtype)])


def _json(file: Path) -> dict:
    if not file.is_file():
        raise ValueError(f"{file} is missing; {file.parent} is no model folder: correct the path, or download all of it")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); download it again") from error


def _tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped into memory, not read. Raises ValueError where it holds anything else."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is refused, and nothing in it was run: it is no whole pickle of tensors alone. Download it again, take the "
            "safetensors file of the model, or, where you trust its author, store its tensors anew with safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())[:200]}); download it again") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{file} is refused: it must hold a dictionary of name -> tensor and nothing else")
    return found


def _weights(folder: Path, *names: str) -> tuple[dict[str, Tensor], list[Path]]:
    """(tensors, files) of the first of `names` that lies in the folder, whole or in shards with an index."""
    for name in names:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted({Path(shard).name for shard in _json(index).get("weight_map", {}).values()})
        elif (folder / name).is_file():
            shards = [name]
        else:
            continue
        files = [folder / shard for shard in shards]
        if gone := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{index} names {', '.join(gone)}, missing in {folder}; download what is missing")
        return {key: tensor for file in files for key, tensor in _tensors(file).items()}, files
    raise ValueError(f"{folder} holds no weights ({' or '.join(names)}); correct the path, or download all of it")


def _folder(given: str | Path | None, named: str | None, beside: Path, what: str) -> Path:
    """The folder of a part: the one given, or what a config.json names, as a path or beside the checkpoint."""
    if given and not Path(given).is_dir():
        raise ValueError(f"{what}={given} is no folder; correct the path")
    places = [Path(given)] if given else [Path(named), beside.parent / named, beside.parent / Path(named).name] if named else []
    for place in places:
        if place.is_dir():
            return place
    raise ValueError(f"{beside} does not hold its {what}, and {named!r}, which it names, is not here; give {what}=FOLDER")


def _plain(name: str) -> str:
    """A name of an adapter's file -> that of the model under it; how many wrappers it shows depends on who stored it."""
    name = name.removeprefix("base_model.").replace(".modules_to_save", "").replace(".default.", ".")
    while name.startswith(("model.model.", "model.lm_head.")):
        name = name.removeprefix("model.")
    return name


def _adapter(folder: Path, settings: dict) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]], list[Path]]:
    """(whole weights, LoRA pairs, files) of an adapter folder. Raises ValueError for what cannot be merged."""
    odd = {key: value for key, value in settings.items() if LORA_FIELDS.fullmatch(key) and value}
    odd |= {} if settings.get("peft_type") == "LORA" else {"peft_type": settings.get("peft_type")}
    if (start := settings.get("init_lora_weights", True)) not in (True, False, "gaussian"):
        odd["init_lora_weights"] = start  # PiSSA and its like change the base too
    if odd:
        raise ValueError(f"{folder}/adapter_config.json: {odd} cannot be merged; merge it with the code that trained it")
    stored, files = _weights(folder, "adapter_model.safetensors", "adapter_model.bin")
    whole: dict[str, Tensor] = {}
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        base, lora, half = _plain(name).partition(".lora_")
        if not lora:
            whole[base] = tensor
        elif half in ("A.weight", "B.weight"):
            halves.setdefault(f"{base}.weight", {})[half[0]] = tensor
        else:
            raise ValueError(f"{files[0]}: {name} is no lora_A or lora_B of a linear layer; only those can be merged")
    if lone := [name for name, pair in halves.items() if len(pair) < 2]:
        raise ValueError(f"{files[0]}: lora_A or lora_B is lacking for {_listed(lone)}; download it again")
    if list(folder.glob("non_lora_trainables.*")):
        others, more = _weights(folder, "non_lora_trainables.safetensors", "non_lora_trainables.bin")
        whole, files = whole | {_plain(name): tensor for name, tensor in others.items()}, files + more
    return whole, {name: (pair["A"], pair["B"]) for name, pair in halves.items()}, files


def read(folder: str | Path, base: str | Path | None = None, tower: str | Path | None = None) -> Checkpoint:
    """Recognise a model folder by its contents. Raises ValueError where it is none of ours or a part of it is not to be found.

    base: the model under an adapter; tower: a CLIPVisionModel or CLIPModel, where the checkpoint does not hold it.
    """
    folder = under = Path(folder)
    adapted = (folder / "adapter_config.json").is_file()
    config = _json(folder / "config.json") if not adapted or (folder / "config.json").is_file() else {}
    settings, whole, lora, files = {}, {}, {}, []  # type: ignore[var-annotated]
    if adapted:
        settings = _json(folder / "adapter_config.json")
        whole, lora, files = _adapter(folder, settings)
        under = _folder(base, settings.get("base_model_name_or_path"), folder, "base")
        config = config if "mm_projector_type" in config else _json(under / "config.json")
    elif base:
        raise ValueError(f"base={base} is for adapters, and {folder} holds no adapter_config.json; leave it away")
    weights, more = _weights(under, "model.safetensors", "pytorch_model.bin")
    kind = "adapter" if adapted else "transformers" if {"text_config", "vision_config"} <= config.keys() else "original"
    if adapted and any("language_model." in name for name in weights):
        raise ValueError(f"base={under} has transformers' names; give the Vicuna or original LLaVA under the adapter")
    weights |= whole
    if lost := [name for name, (a, b) in lora.items() if name not in weights or weights[name].shape != (len(b), a.shape[1])]:
        raise ValueError(f"base={under} does not hold what the adapter changes: {_listed(lost)}; give the base it was trained on")
    if kind != "transformers" and not any("mm_projector." in name for name in weights):
        raise ValueError(
            f"{folder} holds neither a LLaVA (multi_modal_projector.* or model.mm_projector.*) nor an adapter of one with "
            "non_lora_trainables.bin; correct the path. A language model alone can only be the base= of an adapter"
        )
    vision = None
    lacks_tower = kind != "transformers" and f"{THEIR_TOWER}embeddings.patch_embedding.weight" not in weights
    if tower or lacks_tower:
        place = _folder(tower, config.get("mm_vision_tower"), folder, "tower")
        vision = _json(place / "config.json")
        vision = vision.get("vision_config", vision)
        if (named := vision.get("model_type", "clip_vision_model")) != "clip_vision_model":
            raise ValueError(f"{place}/config.json: model_type {named!r} is no CLIP vision tower; give tower=FOLDER of one")
        if lacks_tower:  # a part of it may be there all the same: what was trained wins
            seen, found = _weights(place, "model.safetensors", "pytorch_model.bin")
            mark = "vision_model." if any(name.startswith("vision_model.") for name in seen) else ""  # the rest reads text
            marked = {name.removeprefix(mark): tensor for name, tensor in seen.items() if name.startswith(mark)}
            weights, more = {THEIR_TOWER + name: tensor for name, tensor in marked.items()} | weights, more + found
    tokens = [place for place in (folder, under) if any((place / f"tokenizer.{end}").is_file() for end in ("json", "model"))]
    if not tokens:
        raise ValueError(f"{under} holds no tokenizer.json and no tokenizer.model; copy those of the model it was trained from")
    alpha, rooted = settings.get("lora_alpha", 0), settings.get("use_rslora")
    scale = lambda r: alpha / (math.sqrt(r) if rooted else r)  # noqa: E731
    return Checkpoint(kind, folder, config, weights, files + more, tokens[0], lora, scale, vision)


def _listed(names: Iterable[str]) -> str:
    """Names for a message, those that differ only in their layer as one: `layers.*.mlp.fc1.weight (24)`."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(re.sub(r"layers\.\d+\.", "layers.*.", name), []).append(name)
    return ", ".join(same[0] if len(same) == 1 else f"{group} ({len(same)})" for group, same in groups.items())


def _ours(name: str, names: Prefixes) -> str:
    """A tensor's name in the folder that is written; unknown names stay as they are."""
    return next((new + name.removeprefix(old) for old, new in names if name.startswith(old)), name)


def _config(c: Checkpoint) -> LlavaConfig:
    """The LlavaConfig of a checkpoint as it is. Raises ValueError for a kind of model that cannot be converted."""
    file = c.folder / "config.json"
    if c.kind == "transformers":
        if c.config.get("model_type") != "llava":
            raise ValueError(f"{file}: model_type {c.config.get('model_type')!r} is not supported, only llava")
        config = LlavaConfig.from_dict(c.config)
        if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
            raise ValueError(f"{file}: only one vision_feature_layer without its class token (default) can be converted")
        return config
    named = str(c.config.get("model_type"))
    if not re.search("llama|geochat|llava$", named):
        raise ValueError(f"{file}: model_type {named!r} is not supported, only LLaVAs over LLaMA or Vicuna")
    for field, (absent, good) in FIELDS.items():
        if (value := c.config.get(field, absent)) not in good:
            raise ValueError(f"{file}: {field} {value!r} is not supported, only {good}; choose another checkpoint")
    text = LlamaConfig.from_dict({key: value for key, value in c.config.items() if TEXT_FIELDS.fullmatch(key)})
    at = {name.removeprefix(THEIR_TOWER): tensor.shape for name, tensor in c.weights.items() if name.startswith(THEIR_TOWER)}
    needed = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
    if lost := [THEIR_TOWER + name for name in needed if name not in at]:
        raise ValueError(f"{c.folder}: the vision tower lacks {_listed(lost)}; give tower=FOLDER of the whole one")
    (width, _, _, patch), (rows, _), (inner, _) = (at[name] for name in needed)
    if not c.vision and width % 64:
        raise ValueError(f"{c.folder}: nothing tells the heads of the tower, which is {width} wide; give tower=FOLDER")
    inferred = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len({name.split(".")[2] for name in at if name.startswith("encoder.layers.")}),
        "num_attention_heads": width // 64,  # as in every CLIP of OpenAI that LLaVA has used
        "patch_size": patch,
        "projection_dim": width,
    }
    vision = CLIPVisionConfig.from_dict(c.vision or inferred)
    vision.image_size = math.isqrt(rows - 1) * vision.patch_size  # GeoChat's config.json says 336, its rows decide
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=c.config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        tie_word_embeddings=False,
    )


def _shapes(config: LlavaConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return {_ours(name, TRANSFORMERS): tensor.shape for name, tensor in model.state_dict().items()}


def _fit(c: Checkpoint, config: LlavaConfig) -> tuple[dict[str, str], list[str]]:
    """({our name: their name}, names left out). Raises ValueError with every name that does not fit."""
    expected, found = _shapes(config), {}
    left_out = [name for name in c.weights if name.endswith(HARMLESS)]
    surplus, misfit = [], []
    for name in c.weights.keys() - set(left_out):
        ours = _ours(name, c.names)
        if ours not in expected or ours in found:
            surplus.append(name)
        elif c.weights[name].shape != expected[ours]:
            misfit.append(f"{name} {list(c.weights[name].shape)} (config.json asks for {list(expected[ours])})")
        found[ours] = name
    theirs: Prefixes = tuple((new, old) for old, new in ORIGINAL) if c.names is ORIGINAL else ()
    lacking = [_ours(name, theirs) for name in expected.keys() - found.keys()]
    lists = {"lacks": lacking, "surplus": surplus, "shape": misfit}
    wrong = [f"{what}: {_listed(names)}" for what, names in lists.items() if names]
    if wrong:
        raise ValueError(f"{c.folder}: its weights do not fit its config.json; {'; '.join(wrong)}. Nothing was written")
    return found, left_out


def _tokenizer(c: Checkpoint, system: str) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer, with `<image>`, a padding token and the prompt template. Raises ValueError."""
    folder = c.tokenizer
    if (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    elif find_spec("sentencepiece") is None:
        raise ValueError(f"{folder} holds only tokenizer.model, which needs sentencepiece: pip install sentencepiece")
    else:
        slow = LlamaTokenizer.from_pretrained(folder, add_bos_token=True, add_eos_token=False)
        special = {key: value for key, value in slow.special_tokens_map.items() if isinstance(value, str)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=slow.backend_tokenizer, **special)
    if (ends := (tokenizer.bos_token, tokenizer.eos_token)) != (BOS, EOS):
        raise ValueError(f"{folder}: a text begins and ends with {ends}; the prompt is made for {(BOS, EOS)}")
    tokenizer.padding_side, tokenizer.chat_template = "left", chat_template(system)
    tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    if c.kind != "transformers":
        # LLaVA tokenises what stands before and after an image each by itself: both begin as a text begins
        split = tokenizer.backend_tokenizer.pre_tokenizer
        if isinstance(split, pre_tokenizers.Metaspace) and split.prepend_scheme == "first":
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split.replacement, "always", split.split)
        before, after = "USER: ", "\nWhat is it? ASSISTANT:"
        image = tokenizer.convert_tokens_to_ids(IMAGE)
        parts = [*tokenizer(before).input_ids, image, *tokenizer(after, add_special_tokens=False).input_ids]
        if tokenizer(before + IMAGE + after).input_ids != parts or parts[0] != tokenizer.bos_token_id:
            raise ValueError(f"{folder}: this tokenizer does not split a prompt at {IMAGE} as LLaVA does; take the model's own")
    return tokenizer


def _prepare(c: Checkpoint, config: LlavaConfig, found: dict[str, str], dtype: torch.dtype) -> Callable[[str], Tensor]:
    """our name -> the tensor to write: merged, interpolated, with new rows, in `dtype`. Raises ValueError for NaN or infinity."""
    grid = config.vision_config.image_size // config.vision_config.patch_size
    pairs = {_ours(name, c.names): pair for name, pair in c.lora.items()}

    def tensor(name: str) -> Tensor:
        weight = c.weights[found[name]]
        if name in pairs:  # fan_in_fan_out plays no part: a LLaMA's layers are nn.Linear, for which peft ignores it
            a, b = (half.float() for half in pairs[name])
            weight = weight.float() + c.scale(len(a)) * (b @ a)
        if name == POSITIONS:
            weight = interpolate_positions(weight, grid)
        if name in (EMBEDDING, f"{HEAD}weight") and (new := config.text_config.vocab_size - len(weight)) > 0:
            # <image> is replaced by the image and padding is masked, so any row does; the mean stays harmless where one is not
            weight = torch.cat([weight, weight.float().mean(0, keepdim=True).to(weight.dtype).expand(new, -1)])
        weight = weight.to(dtype).contiguous()
        if not weight.isfinite().all():
            raise ValueError(f"{c.folder}: {found[name]} is not finite in {dtype}; download it again, or give dtype=bf16 or fp32")
        return weight

    return tensor


def _write(shapes: dict[str, torch.Size], dtype: torch.dtype, tensor: Callable[[str], Tensor], folder: Path) -> None:
    """The weights as safetensors, a shard in memory at a time, with a line of progress a shard."""
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD)
    total, done, start = plan.metadata["total_size"], 0, time.monotonic()
    for file, names in plan.filename_to_tensors.items():
        shard = {name: tensor(name) for name in names}
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file} cannot be written ({error}); is the disk full?") from error
        done += sum(t.nbytes for t in shard.values())
        rate = done / max(time.monotonic() - start, 1e-6)
        print(f"written: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s", flush=True)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _in_float32(model: nn.Module) -> None:
    """Let a model of any dtype compute in float32, without a float32 copy of it: each layer is widened while it runs."""
    layers = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
    narrow = {parameter for layer in layers for parameter in layer.parameters()}
    for parameter in set(model.parameters()) - narrow:
        parameter.data = parameter.data.float()
    for layer in layers:
        kept: list[tuple[nn.Parameter, Tensor]] = []

        def widen(module, args, kept=kept):
            kept[:] = [(parameter, parameter.data) for parameter in module.parameters()]
            for parameter, data in kept:
                parameter.data = data.float()

        def restore(module, args, output, kept=kept):
            for parameter, data in kept:
                parameter.data = data

        layer.register_forward_pre_hook(widen)
        layer.register_forward_hook(restore)


def _reference_logits(c: Checkpoint, config: LlavaConfig, pixels: Tensor, before: list[int], after: list[int]) -> Tensor:
    """Logits [T, V] of the source itself: its own tower, projector and language model, an adapter left unmerged by peft.

    Shares no renaming and no merging with what is written. `config`: of the folder written, for its image size.
    """
    if c.kind == "transformers":
        model = AutoModelForImageTextToText.from_pretrained(c.folder)
        tower = model.model.vision_tower.state_dict()
        projector, layer, text = model.model.multi_modal_projector, model.config.vision_feature_layer, model.model.language_model
    else:
        tower = {"vision_model." + n.split(".vision_model.")[1]: t for n, t in c.weights.items() if ".vision_model." in n}
        parts = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
        own = {name: tensor for name, tensor in c.weights.items() if name.startswith(parts)}
        rows = {"vocab_size": len(own["model.embed_tokens.weight"]), "pad_token_id": None}
        settings = LlamaConfig.from_dict({**c.config, **rows, "model_type": "llama"})
        model = LlamaForCausalLM.from_pretrained(None, config=settings, state_dict=own, dtype=own["lm_head.weight"].dtype)
        if c.kind == "adapter":
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, c.folder).eval().get_base_model()  # its layers still add B A x
        weight = {name.split("mm_projector.")[1]: t.float() for name, t in c.weights.items() if "mm_projector." in name}
        projector = nn.Sequential(nn.Linear(*weight["0.weight"].T.shape), nn.GELU(), nn.Linear(*weight["2.weight"].T.shape))
        projector.load_state_dict(weight)
        layer, text = c.config.get("mm_vision_select_layer", -2), model.model
    grid = config.vision_config.image_size // config.vision_config.patch_size
    tower = {n: interpolate_positions(t, grid) if n.endswith("position_embedding.weight") else t for n, t in tower.items()}
    eye = CLIPVisionModel.from_pretrained(None, config=config.vision_config, state_dict=tower, dtype=torch.float32)
    _in_float32(model)
    image = projector.float()(eye(pixels, output_hidden_states=True).hidden_states[layer][:, 1:])
    words = [model.get_input_embeddings()(torch.tensor([ids])) for ids in (before, after)]
    return model.lm_head(text(inputs_embeds=torch.cat([words[0], image, words[1]], 1), use_cache=False).last_hidden_state)[0]


@torch.no_grad()
def _largest_difference(c: Checkpoint, config: LlavaConfig, folder: Path) -> float:
    """The largest difference of a logit between source and written folder, over the largest logit, on noise and a prompt."""
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image in detail."}]}]
    before, after = processor.apply_chat_template(messages, add_generation_prompt=True).split(IMAGE)
    ids = [processor.tokenizer(before).input_ids, processor.tokenizer(after, add_special_tokens=False).input_ids]
    size = config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    reference = _reference_logits(c, config, pixels, *ids)
    gc.collect()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    _in_float32(model)
    row = torch.tensor([[*ids[0], *[config.image_token_index] * config.image_seq_length, *ids[1]]])
    logits = model(input_ids=row, pixel_values=pixels, use_cache=False).logits[0]
    vocabulary = min(logits.shape[-1], reference.shape[-1])
    return float((logits[:, :vocabulary] - reference[:, :vocabulary]).abs().max() / reference.abs().max())


def convert(
    source: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    tower: str | Path | None = None,
    image_size: int | None = None,
    dtype: str | None = None,
    check: bool = True,
    system: str = SYSTEM,
) -> dict:
    """Write `source` to `output` as a transformers LLaVA with its processor; returns what `output`/convert.json holds.

    base, tower: as in `read`. image_size: pixels of a side; None: the checkpoint's own, 504 for a GeoChat. dtype: bf16, fp16,
    fp32; None: the language model's. check: compare the logits of source and output (takes the weights' size in memory).
    The processor resizes images to a square, as all of this project does. Raises ValueError, and then leaves nothing behind.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"output={output} is there already; give another folder, or remove it")
    c = read(source, base, tower)
    config = _config(c)
    found, left_out = _fit(c, config)
    own, vision, text = c.weights[found[EMBEDDING]].dtype, config.vision_config, config.text_config
    if own not in TOLERANCE:
        raise ValueError(f"{c.folder}: {found[EMBEDDING]} is {own}, but quantised weights cannot be converted; take the others")
    kind = DTYPES[dtype] if dtype else own
    had, rows, patch = vision.image_size, text.vocab_size, vision.patch_size
    if image_size is None and c.config.get("model_type") == "geochat" and patch == 14:
        image_size = GEOCHAT_PIXELS
    vision.image_size = image_size or had
    if vision.image_size % patch:
        raise ValueError(f"image_size={image_size} is no multiple of the tower's patches of {patch} pixels")
    tokenizer = _tokenizer(c, system)
    text.vocab_size = max(rows, len(tokenizer))
    text.pad_token_id, config.image_token_index = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids(IMAGE)
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.image_seq_length = (vision.image_size // patch) ** 2
    config.architectures = [LlavaForConditionalGeneration.__name__]
    for part in (config, text, vision):
        part.dtype = kind
    shapes = _shapes(config)
    parameters = sum(shape.numel() for shape in shapes.values())
    report: dict = {
        "source": str(c.folder.absolute()),
        "kind": c.kind,
        "files": {str(file.absolute()): file.stat().st_size for file in c.files},
        "parameters": parameters,
        "dtype": str(kind).removeprefix("torch."),
        "image_size": {"source": had, "output": vision.image_size},
        "rows": {"source": rows, "output": text.vocab_size},
        "merged": len(c.lora),
        "left_out": left_out,
    }
    print(f"{c.folder}: {c.kind}, {parameters / 1e6:.2f} M parameters in {report['dtype']}", flush=True)
    print(f"image {had} -> {vision.image_size} pixels, vocabulary {rows} -> {text.vocab_size} rows, {len(c.lora)} weights merged")
    if left_out:
        print(f"left out, computed anew: {_listed(left_out)}")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        config.save_pretrained(partial)
        ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
        GenerationConfig(**ends).save_pretrained(partial)
        new_processor(tokenizer, vision.image_size, patch).save_pretrained(partial)
        _write(shapes, kind, _prepare(c, config, found, kind), partial)
        if check:
            rounded = c.lora or any(c.weights[name].dtype != kind for name in found.values())
            difference, limit = _largest_difference(c, config, partial), TOLERANCE[kind if rounded else torch.float32]
            print(f"logits differ by {difference:.1e} of the largest at most (limit {limit:.0e})", flush=True)
            if not difference <= limit:
                raise ValueError(f"{output} was removed: its logits are not those of {source} ({difference:.1e} > {limit:.0e})")
            report |= {"largest_difference": difference, "tolerance": limit}
        (partial / "convert.json").write_text(json.dumps(report, indent=1))
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report
