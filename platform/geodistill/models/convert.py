"""A published checkpoint -> a folder that plain transformers loads, proved by equal logits.

Shapes: R rows of a position embedding (class row first), D features, T tokens, V words.
"""

import copy
import gc
import json
import math
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
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
from geodistill.models.checkpoints import DTYPES, EMBEDDING, HEAD, POSITIONS, Checkpoint, listed, ours, read, shapes

TOLERANCE = 1e-4  # the largest difference of a logit, over the largest logit, that the order of float32 sums can explain
SHARD = "2GB"  # and so the most that is held at once
GEOCHAT_PIXELS = 504  # GeoChat's code widens its tower to this, whatever the files say


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
    if c.layout == "original":
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


def _config(c: Checkpoint, tokenizer: PreTrainedTokenizerFast, image_size: int | None, dtype: torch.dtype) -> LlavaConfig:
    """config.json of the folder that is written. Raises ValueError where the image size does not suit the tower."""
    config = copy.deepcopy(c.config)
    vision, text = config.vision_config, config.text_config
    if image_size is None and c.published.get("model_type") == "geochat" and vision.patch_size == 14:
        image_size = GEOCHAT_PIXELS
    if image_size is not None:
        vision.image_size = image_size
    if vision.image_size < 1 or vision.image_size % vision.patch_size:
        raise ValueError(f"image_size={image_size} is no multiple of the tower's patches of {vision.patch_size} pixels")
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    text.pad_token_id, config.image_token_index = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids(IMAGE)
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2
    config.architectures = [LlavaForConditionalGeneration.__name__]
    for part in (config, text, vision):
        part.dtype = dtype
    return config


def _exact(c: Checkpoint, config: LlavaConfig, name: str) -> Tensor:
    """A weight before it is rounded, in float32 and memory of its own: merged, interpolated, with new rows."""
    weight = c.weights[name].tensor.to(torch.float32, copy=True)
    if name in c.lora:  # fan_in_fan_out plays no part: it is for other layers than nn.Linear
        a, b, scale = c.lora[name]
        weight += scale * (b.float() @ a.float())
    if name == POSITIONS:
        weight = interpolate_positions(weight, config.vision_config.image_size // config.vision_config.patch_size)
    if name in (EMBEDDING, f"{HEAD}weight") and (new := config.text_config.vocab_size - len(weight)) > 0:
        # <image> is replaced by the image and padding is masked, so any row does; the mean stays harmless where one is not
        weight = torch.cat([weight, weight.mean(0, keepdim=True).expand(new, -1)])
    return weight.contiguous()


def _write(c: Checkpoint, config: LlavaConfig, folder: Path) -> None:
    """The weights as safetensors, a shard in memory at a time, with a line of progress a shard.

    Raises ValueError for a weight that is not finite in the dtype of `config`.
    """

    def rounded(name: str) -> Tensor:
        weight = _exact(c, config, name).to(config.dtype)
        if not weight.isfinite().all():
            said = f"{c.folder}: {c.weights[name].name} is not finite in {config.dtype}"
            raise ValueError(f"{said}; download it again, or give dtype=bf16 or fp32")
        return weight

    empty = {name: torch.empty(shape, dtype=config.dtype, device="meta") for name, shape in shapes(config).items()}
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD)
    total, done, start = plan.metadata["total_size"], 0, time.monotonic()
    for file, names in plan.filename_to_tensors.items():
        shard = {name: rounded(name) for name in names}
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


def _in_float32(model: nn.Module, exact: Callable[[str, Tensor], Tensor]) -> None:
    """Let a model of any dtype compute with what `exact` makes of each weight's name and value, in float32.

    A decoder layer holds that only while it runs, so no float32 copy of the model is ever whole.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    layers = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
    for parameter in names.keys() - {parameter for layer in layers for parameter in layer.parameters()}:
        parameter.data = exact(names[parameter], parameter.data)
    for layer in layers:
        kept: list[tuple[nn.Parameter, Tensor]] = []

        def widen(module, args, kept=kept):
            kept[:] = [(parameter, parameter.data) for parameter in module.parameters()]
            for parameter, data in kept:
                parameter.data = exact(names[parameter], data)

        def restore(module, args, output, kept=kept):
            for parameter, data in kept:
                parameter.data = data

        layer.register_forward_pre_hook(widen)
        layer.register_forward_hook(restore)


def _original(c: Checkpoint) -> LlamaForCausalLM:
    """The modules of an original LLaVA where its own code has them, filled by what the published names say."""

    def part(mark: str) -> dict[str, Tensor]:
        return {s.name.split(mark)[1]: s.tensor for s in c.weights.values() if mark in s.name}

    text = {f"model.{key}.{name}": t for key in ("layers", "embed_tokens", "norm") for name, t in part(f"model.{key}.").items()}
    state, projection = text | {"lm_head.weight": part("lm_head.")["weight"]}, part("mm_projector.")
    settings = LlamaConfig.from_dict({**c.published, "pad_token_id": None, "model_type": "llama"})
    model = LlamaForCausalLM.from_pretrained(None, config=settings, state_dict=state, dtype=state["lm_head.weight"].dtype)
    model.load_state_dict(state, assign=True)  # each in the dtype that it has
    tower = {f"vision_model.{name}": tensor for name, tensor in part("vision_model.").items()}
    eye = CLIPVisionModel.from_pretrained(None, config=c.config.vision_config, state_dict=tower, dtype=torch.float32)
    sizes = [projection[f"{i}.weight"].T.shape for i in (0, 2)]
    projector = nn.Sequential(nn.Linear(*sizes[0]), nn.GELU(), nn.Linear(*sizes[1]))
    projector.load_state_dict(projection)
    model.model.vision_tower, model.model.mm_projector = eye, projector
    return model


def _reference_logits(c: Checkpoint, grid: int, pixels: Tensor, before: list[int], after: list[int]) -> Tensor:
    """Logits [T, V] of the source itself: its own tower, projector and language model, an adapter left unmerged by peft.

    Shares no merging with what is written, and renaming only of what an adapter holds. grid: patches of a side of `pixels`.
    """
    original = c.layout == "original"
    dtypes = {weight.tensor.dtype for name, weight in c.weights.items() if name not in c.trained}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # config.json may name another, and would round
    model = _original(c) if original else AutoModelForImageTextToText.from_pretrained(c.base, dtype=dtype)
    if c.lora or c.trained:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        theirs = {ours(name): name for name in model.state_dict()}
        if not original:
            trained = {theirs[name]: c.weights[name].tensor for name in c.trained}
            model.load_state_dict(trained, strict=False, assign=True)
        settings = LoraConfig.from_pretrained(str(c.folder))
        settings.modules_to_save, settings.init_lora_weights = None, True  # a layer that no pair is stored for stays as it is
        stems = {name: f"base_model.model.{theirs[name].removesuffix('weight')}lora_" for name in c.lora}
        state = {f"{stem}{half}.weight": c.lora[name][i] for name, stem in stems.items() for i, half in enumerate("AB")}
        set_peft_model_state_dict(get_peft_model(model, settings).eval(), state)
    core, layer = model.model, c.config.vision_feature_layer
    text, projector = (core, core.mm_projector) if original else (core.language_model, core.multi_modal_projector)
    embeddings = next(module for module in core.vision_tower.modules() if hasattr(module, "position_embedding"))
    rows = interpolate_positions(embeddings.position_embedding.weight.float(), grid)
    embeddings.position_embedding, embeddings.position_ids = nn.Embedding.from_pretrained(rows), torch.arange(len(rows))[None]
    embeddings.image_size = pixels.shape[-1]
    _in_float32(model, lambda name, weight: weight.float())
    image = projector(core.vision_tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:])
    words = [model.get_input_embeddings()(torch.tensor([ids])) for ids in (before, after)]
    return model.lm_head(text(inputs_embeds=torch.cat([words[0], image, words[1]], 1), use_cache=False).last_hidden_state)[0]


@torch.no_grad()
def _largest_difference(c: Checkpoint, config: LlavaConfig, folder: Path) -> float:
    """The largest difference of a logit between source and written folder, over the largest logit, on noise and a prompt.

    Both compute in float32, with weights that are not rounded; raises ValueError where a weight of the folder, as transformers
    loads it, is not the rounded one bit for bit.
    """
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image in detail."}]}]
    before, after = processor.apply_chat_template(messages, add_generation_prompt=True).split(IMAGE)
    ids = [processor.tokenizer(before).input_ids, processor.tokenizer(after, add_special_tokens=False).input_ids]
    size = config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    reference = _reference_logits(c, size // config.vision_config.patch_size, pixels, *ids)
    gc.collect()
    model = AutoModelForImageTextToText.from_pretrained(folder)

    def verified(name: str, weight: Tensor) -> Tensor:
        exact = _exact(c, config, ours(name))
        if weight.dtype != config.dtype or not torch.equal(weight, exact.to(config.dtype)):
            raise ValueError(f"{folder}: {name} is not what was to be written; is the disk sound?")
        return exact

    _in_float32(model, verified)
    row = torch.tensor([[*ids[0], *[config.image_token_index] * config.image_seq_length, *ids[1]]])
    logits = model(input_ids=row, pixel_values=pixels, use_cache=False).logits[0]
    vocabulary = reference.shape[-1]
    return float((logits[:, :vocabulary] - reference).abs().max() / reference.abs().max())


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
    tokenizer = _tokenizer(c, system)
    config = _config(c, tokenizer, image_size, DTYPES[dtype] if dtype else c.weights[EMBEDDING].tensor.dtype)
    report: dict = {
        "source": str(c.folder.absolute()),
        "kind": c.kind,
        "files": {str(file.absolute()): file.stat().st_size for file in c.files},
        "parameters": sum(shape.numel() for shape in shapes(config).values()),
        "dtype": str(config.dtype).removeprefix("torch."),
        "image_size": {"source": c.config.vision_config.image_size, "output": config.vision_config.image_size},
        "rows": {"source": c.config.text_config.vocab_size, "output": config.text_config.vocab_size},
        "merged": len(c.lora),
        "left_out": c.left_out,
    }
    print(f"{c.folder}: {c.kind}, {report['parameters'] / 1e6:.2f} M parameters in {report['dtype']}", flush=True)
    pixels, rows = (f"{part['source']} -> {part['output']}" for part in (report["image_size"], report["rows"]))
    print(f"image {pixels} pixels, vocabulary {rows} rows, {len(c.lora)} weights merged")
    if c.left_out:
        print(f"left out, computed anew: {listed(c.left_out)}")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        config.save_pretrained(partial)
        ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
        GenerationConfig(**ends).save_pretrained(partial)
        new_processor(tokenizer, config.vision_config.image_size, config.vision_config.patch_size).save_pretrained(partial)
        _write(c, config, partial)
        if check:
            difference = _largest_difference(c, config, partial)
            print(f"logits differ by {difference:.1e} of the largest at most (limit {TOLERANCE:.0e})", flush=True)
            if not difference <= TOLERANCE:
                raise ValueError(f"{output} was removed: its logits are not those of {source} ({difference:.1e} away)")
            report |= {"largest_difference": difference, "tolerance": TOLERANCE}
        (partial / "convert.json").write_text(json.dumps(report, indent=1))
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report
