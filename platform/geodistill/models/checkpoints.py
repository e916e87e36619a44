"""A published checkpoint, read: what a folder holds, told by its contents alone, and every reason not to convert it.

It is a transformers LLaVA, an original LLaVA-1.5 or GeoChat, or a LoRA adapter of either over its base. Every published name is
turned into the one that is written, so layouts, versions and wrappers differ here only. Weights stay in their files until used.
"""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# The names that are written: those of published transformers LLaVAs, which every version reads.
TOWER, PROJECTOR, TEXT, HEAD = "vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."  # fmt: skip  # noqa: E501
POSITIONS, EMBEDDING = f"{TOWER}embeddings.position_embedding.weight", f"{TEXT}embed_tokens.weight"
# A published name may begin with WRAPPERS (peft's, LLaVA's and transformers'); then the first pattern that fits is replaced.
WRAPPERS = r"(base_model\.)?(model\.)*"
NAMES = (
    (r"vision_tower\.(vision_tower\.)?(vision_model\.)?", TOWER),
    (r"multi_modal_projector\.", PROJECTOR),
    (r"mm_projector\.0\.", f"{PROJECTOR}linear_1."),
    (r"mm_projector\.2\.", f"{PROJECTOR}linear_2."),
    (r"(language_model\.)?lm_head\.", HEAD),
    (r"language_model\.(model\.)?", TEXT),
    (r"(?=(layers|embed_tokens|norm)\.)", TEXT),
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


class Stored(NamedTuple):
    name: str  # as published
    tensor: Tensor  # mapped into memory, not read


@dataclass
class Checkpoint:
    """A model folder as it was read; names are those that are written."""

    layout: str  # of the model itself: transformers or original
    folder: Path
    base: Path  # folder of the model itself: `folder`, or what lies under an adapter
    published: dict  # config.json of the LLaVA
    config: LlavaConfig  # the same, as transformers has it; the image size is that of the weights
    weights: dict[str, Stored]  # every one that `config` asks for, an adapter's whole ones in place of the base's
    trained: set[str]  # which of them came with the adapter
    lora: dict[str, tuple[Tensor, Tensor, float]]  # weight -> A [r, in], B [out, r], what B A is multiplied by
    left_out: list[str]  # published names of buffers that are computed anew
    files: list[Path]
    tokenizer: Path

    @property
    def kind(self) -> str:
        return f"adapter over {self.layout}" if self.lora or self.trained else self.layout


def ours(name: str) -> str:
    """A published name -> the one that is written; names of nothing known stay as they are."""
    bare = re.sub(f"^{WRAPPERS}", "", name)
    for pattern, prefix in NAMES:
        if found := re.match(pattern, bare):
            return prefix + bare[found.end() :]
    return name


def listed(names: Iterable[str]) -> str:
    """Names for a message, those that differ only in their layer as one: `layers.*.mlp.fc1.weight (24)`."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(re.sub(r"layers\.\d+\.", "layers.*.", name), []).append(name)
    return ", ".join(same[0] if len(same) == 1 else f"{group} ({len(same)})" for group, same in groups.items())


def shapes(config: LlavaConfig) -> dict[str, torch.Size]:
    """Every weight of a model, by the name that is written."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return {ours(name): tensor.shape for name, tensor in model.state_dict().items()}


def _json(file: Path) -> dict:
    if not file.is_file():
        raise ValueError(f"{file} is missing; {file.parent} is no model folder: correct the path, or download all of it")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no settings by name; download it again")
    return found


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
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())[:200]}); download it again") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{file} is refused: it must hold a dictionary of name -> tensor and nothing else")
    return {name: tensor.detach() for name, tensor in found.items()}  # a parameter would want gradients


def _stored(folder: Path, *names: str) -> tuple[dict[str, Tensor], list[Path]]:
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


def _named(stored: dict[str, Tensor], files: list[Path]) -> dict[str, Stored]:
    """The same by the names that are written. Raises ValueError where two are the same weight."""
    found: dict[str, Stored] = {}
    for name, tensor in stored.items():
        if (other := found.setdefault(ours(name), Stored(name, tensor))).name != name:
            raise ValueError(f"{files[0]}: {other.name} and {name} are the same weight; take a checkpoint that holds it once")
    return found


def _folder(given: str | Path | None, named: str | None, beside: Path, what: str) -> Path:
    """The folder of a part: the one given, or what a config.json names, as a path or beside the checkpoint."""
    if given and not Path(given).is_dir():
        raise ValueError(f"{what}={given} is no folder; correct the path")
    places = [Path(given)] if given else [Path(named), beside.parent / named, beside.parent / Path(named).name] if named else []
    for place in places:
        if place.is_dir():
            return place
    raise ValueError(f"{beside} does not hold its {what}, and {named!r}, which it names, is not here; give {what}=FOLDER")


def _adapter(folder: Path, settings: dict) -> tuple[dict[str, Stored], dict[str, tuple[Tensor, Tensor, float]], list[Path]]:
    """(whole weights, LoRA, files) of an adapter folder. Raises ValueError for what cannot be merged."""
    odd = {key: value for key, value in settings.items() if LORA_FIELDS.fullmatch(key) and value}
    odd |= {} if settings.get("peft_type") == "LORA" else {"peft_type": settings.get("peft_type")}
    if (start := settings.get("init_lora_weights", True)) not in (True, False, "gaussian"):
        odd["init_lora_weights"] = start  # PiSSA and its like change the base too
    if not isinstance(alpha := settings.get("lora_alpha"), int | float):
        odd["lora_alpha"] = alpha
    if odd:
        raise ValueError(f"{folder}/adapter_config.json: {odd} cannot be merged; merge it with the code that trained it")
    stored, files = _stored(folder, "adapter_model.safetensors", "adapter_model.bin")
    if list(folder.glob("non_lora_trainables.*")):  # LLaVA's code stores there what was trained whole
        others, more = _stored(folder, "non_lora_trainables.safetensors", "non_lora_trainables.bin")
        stored, files = stored | others, files + more
    whole, halves = {}, {"A": {}, "B": {}}  # type: ignore[var-annotated]
    for name, tensor in stored.items():
        base, lora, half = name.partition(".lora_")
        if lora and half not in ("A.weight", "B.weight"):
            raise ValueError(f"{files[0]}: {name} is no lora_A or lora_B of a linear layer; only those can be merged")
        target = halves[half[0]] if lora else whole
        target[f"{base}.weight" if lora else name] = tensor
    if lone := halves["A"].keys() ^ halves["B"].keys():
        raise ValueError(f"{files[0]}: lora_A or lora_B is lacking for {listed(lone)}; download it again")
    root = math.sqrt if settings.get("use_rslora") else float
    a, b = _named(halves["A"], files), _named(halves["B"], files)
    lora_of = {name: (a[name].tensor, b[name].tensor, alpha / root(len(a[name].tensor))) for name in a}  # type: ignore[operator]
    return _named(whole, files), lora_of, files


def _tower(place: Path) -> tuple[dict, dict[str, Stored], list[Path]]:
    """(config.json of the tower, weights, files) of a CLIPVisionModel or a CLIPModel. Raises ValueError for anything else."""
    vision = _json(place / "config.json")
    vision = vision.get("vision_config", vision)
    if (named := vision.get("model_type", "clip_vision_model")) != "clip_vision_model":
        raise ValueError(f"{place}/config.json: model_type {named!r} is no CLIP vision tower; give tower=FOLDER of one")
    stored, files = _stored(place, "model.safetensors", "pytorch_model.bin")
    if any(name.startswith("vision_model.") for name in stored):  # the rest of a CLIPModel reads text
        stored = {name.removeprefix("vision_model."): t for name, t in stored.items() if name.startswith("vision_model.")}
    return vision, {TOWER + name: Stored(f"vision_model.{name}", tensor) for name, tensor in stored.items()}, files


def _transformers_config(file: Path, published: dict) -> LlavaConfig:
    """The LlavaConfig of a transformers LLaVA. Raises ValueError for another kind of model."""
    if (named := published.get("model_type")) != "llava":
        raise ValueError(f"{file}: model_type {named!r} is not supported, only llava")
    config = LlavaConfig.from_dict(published)
    if (parts := (config.vision_config.model_type, config.text_config.model_type)) != ("clip_vision_model", "llama"):
        raise ValueError(f"{file}: a LLaVA of {' and '.join(parts)} is not supported, only of clip_vision_model and llama")
    if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"{file}: only one vision_feature_layer without its class token (default) can be converted")
    return config


def _original_config(file: Path, published: dict, weights: dict[str, Stored], vision: dict | None) -> LlavaConfig:
    """The LlavaConfig of an original LLaVA; its tower by `vision` or, without, by its weights. Raises ValueError."""
    named = str(published.get("model_type"))
    if not re.search("llama|geochat|llava$", named):
        raise ValueError(f"{file}: model_type {named!r} is not supported, only LLaVAs over LLaMA or Vicuna")
    for field, (absent, good) in FIELDS.items():
        if (value := published.get(field, absent)) not in good:
            raise ValueError(f"{file}: {field} {value!r} is not supported, only {good}; choose another checkpoint")
    names = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
    if lost := [TOWER + name for name in names if TOWER + name not in weights]:
        raise ValueError(f"{file.parent}: the vision tower lacks {listed(lost)}; give tower=FOLDER of the whole one")
    (width, _, _, patch), (rows, _), (inner, _) = (weights[TOWER + name].tensor.shape for name in names)
    if not vision and width % 64:
        raise ValueError(f"{file.parent}: nothing tells the heads of the tower, which is {width} wide; give tower=FOLDER")
    inferred = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len({name.split(".")[4] for name in weights if name.startswith(f"{TOWER}encoder.layers.")}),
        "num_attention_heads": width // 64,  # as in every CLIP of OpenAI that LLaVA has used
        "patch_size": patch,
        "projection_dim": width,
    }
    tower = CLIPVisionConfig.from_dict(vision or inferred)
    tower.image_size = math.isqrt(rows - 1) * tower.patch_size  # GeoChat's config.json says 336, its rows decide
    return LlavaConfig(
        vision_config=tower,
        text_config=LlamaConfig.from_dict({key: value for key, value in published.items() if TEXT_FIELDS.fullmatch(key)}),
        vision_feature_layer=published.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        tie_word_embeddings=False,
    )


def _fit(folder: Path, config: LlavaConfig, weights: dict[str, Stored]) -> None:
    """Raises ValueError with every weight that `config` does not ask for, or asks for otherwise."""
    expected = shapes(config)
    shared = {name: stored for name, stored in weights.items() if name in expected}
    lists = {
        "lacks": [name for name in expected if name not in weights],
        "surplus": [stored.name for name, stored in weights.items() if name not in expected],
        "shape": [
            f"{stored.name} {list(stored.tensor.shape)} (config.json asks for {list(expected[name])})"
            for name, stored in shared.items()
            if stored.tensor.shape != expected[name]
        ],
        "neither bf16, fp16 nor fp32": [s.name for s in shared.values() if s.tensor.dtype not in DTYPES.values()],
    }
    if wrong := [f"{what}: {listed(names)}" for what, names in lists.items() if names]:
        raise ValueError(f"{folder}: its weights do not fit its config.json; {'; '.join(wrong)}. Nothing was written")


def read(folder: str | Path, base: str | Path | None = None, tower: str | Path | None = None) -> Checkpoint:
    """Recognise a model folder by its contents. Raises ValueError where it is none of ours, or a part lacks or does not fit.

    base: the model under an adapter; tower: a CLIPVisionModel or CLIPModel, where an original does not hold it.
    """
    folder = under = Path(folder)
    whole, lora, files = {}, {}, []  # type: ignore[var-annotated]
    if adapted := (folder / "adapter_config.json").is_file():
        settings = _json(folder / "adapter_config.json")
        whole, lora, files = _adapter(folder, settings)
        under = _folder(base, settings.get("base_model_name_or_path"), folder, "base")
    elif base:
        raise ValueError(f"base={base} is for adapters, and {folder} holds no adapter_config.json; leave it away")
    source = folder / "config.json"  # LLaVA's code stores the LLaVA's beside an adapter, peft none
    if adapted and not (source.is_file() and "mm_projector_type" in _json(source)):
        source = under / "config.json"
    published = _json(source)
    stored, more = _stored(under, "model.safetensors", "pytorch_model.bin")
    weights, files = _named(stored, more) | whole, files + more
    projector = next((weight.name for name, weight in weights.items() if name.startswith(PROJECTOR)), None)
    if projector is None:
        raise ValueError(
            f"{folder} holds neither a LLaVA (multi_modal_projector.* or model.mm_projector.*) nor an adapter of one with "
            "non_lora_trainables.bin; correct the path. A language model alone can only be the base= of an adapter"
        )
    layout = "original" if "mm_projector." in projector else "transformers"
    if layout == "transformers":
        if tower:
            raise ValueError(f"tower={tower} is for original checkpoints, and {under} holds its own; leave it away")
        config = _transformers_config(source, published)
    else:
        vision = None
        lacks = f"{TOWER}embeddings.patch_embedding.weight" not in weights
        if tower or lacks:
            vision, parts, more = _tower(_folder(tower, published.get("mm_vision_tower"), folder, "tower"))
            if lacks:  # some of it may be there all the same: what was trained wins
                weights, files = parts | weights, files + more
        config = _original_config(source, published, weights, vision)
    left_out = [weights.pop(name).name for name in list(weights) if name.endswith(HARMLESS)]
    sizes = {name: [*b.shape[:1], *a.shape[1:]] if b.shape[1:] == a.shape[:1] else None for name, (a, b, _) in lora.items()}
    if lost := [name for name, size in sizes.items() if name not in weights or [*weights[name].tensor.shape] != size]:
        raise ValueError(f"base={under} does not hold what the adapter changes: {listed(lost)}; give the base it was trained on")
    _fit(folder, config, weights)
    tokens = [place for place in (folder, under) if any((place / f"tokenizer.{end}").is_file() for end in ("json", "model"))]
    if not tokens:
        raise ValueError(f"{under} holds no tokenizer.json and no tokenizer.model; copy those of the model it was trained from")
    return Checkpoint(layout, folder, under, published, config, weights, set(whole), lora, left_out, files, tokens[0])
