"""Checkpoints in the key layout of the originals, but tiny, become transformers folders with the same logits.

The logits before are computed here from the modules whose weights were stored, by this file's own splice.
"""

import copy
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from geodistill.language import IMAGE, SYSTEM
from geodistill.models import assemble, checkpoints, pair
from geodistill.models import convert as conversion
from geodistill.models.checkpoints import ours
from geodistill.models.convert import convert, interpolate_positions

JOB = Path(__file__).parents[2] / "jobs" / "convert.py"
TOWER = "model.vision_tower.vision_tower.vision_model."
ROWS = 200
BROKEN: list[str] = []


@pytest.fixture(scope="module")
def tokenizer():
    """A LLaMA-like one: word starts marked, only at the very start of a text; no <image> and no padding token."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=["\n"], show_progress=False
    )
    made.train_from_iterator(
        [SYSTEM + " USER: ASSISTANT: What is it? Describe the image in detail." + " ships at a quay" * 9], trainer
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny(seed: int = 0, pixels: int = 48, dtype: torch.dtype = torch.float32, patch: int = 2):
    """The parts of a LLaVA with peaked distributions: a 2-pixel patch, so 48 pixels are 577 rows and 72 are 1297."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=48, num_hidden_layers=3, num_attention_heads=1, image_size=pixels, patch_size=patch
    )
    text = LlamaConfig(
        hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=ROWS
    )
    tower, language = CLIPVisionModel(vision).eval(), LlamaForCausalLM(text).eval()
    projector = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    for part in (tower, projector, language):
        for name, parameter in part.named_parameters():
            std = 0.5 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5
            parameter.data = (parameter.data if "norm" in name else std * torch.randn(parameter.shape)).to(dtype).float()
    return SimpleNamespace(tower=tower, projector=projector, language=language)


def keys(model, tower: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The state of an original checkpoint."""
    state = dict(model.language.state_dict())
    state |= {f"model.mm_projector.{name}": tensor for name, tensor in model.projector.state_dict().items()}
    if tower:
        state |= {TOWER + name.removeprefix("vision_model."): tensor for name, tensor in model.tower.state_dict().items()}
    return {name: tensor.to(dtype, copy=True) for name, tensor in state.items()}


def half(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.half() for name, tensor in module.state_dict().items()}


def original_config(model, **changed) -> dict:
    text = model.language.config
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return {
        **{name: getattr(text, name) for name in kept},
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "float16", "use_mm_proj": True,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 64, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "pad_token_id": 0, **changed,
    }  # fmt: skip


def store(folder: Path, state: dict, config: dict, tokenizer=None, shards: int = 1, kind: str = "bin") -> Path:
    """A model folder: pytorch_model-*.bin with an index, or model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if kind == "safetensors":
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", metadata={"format": "pt"}
        )
    elif shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names, weight_map = sorted(state), {}
        for i in range(shards):
            file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
            torch.save({name: state[name] for name in names[i::shards]}, folder / file)
            weight_map |= dict.fromkeys(names[i::shards], file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


BEFORE, AFTER = [1, 40, 41, 42], [50, 51, 52, 53, 54]


@torch.no_grad()
def before(model, pixels) -> torch.Tensor:
    """Logits [T, V] of the parts: the second-to-last layer's patches, projected, between the words."""
    image = model.projector(model.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    words = [model.language.get_input_embeddings()(torch.tensor([ids])) for ids in (BEFORE, AFTER)]
    return model.language(inputs_embeds=torch.cat([words[0], image, words[1]], 1)).logits[0]


@torch.no_grad()
def after(folder: Path, pixels) -> torch.Tensor:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    image = [model.config.image_token_index] * (pixels.shape[-1] // 2) ** 2
    return model(input_ids=torch.tensor([[*BEFORE, *image, *AFTER]]), pixel_values=pixels).logits[0]


def same(model, folder: Path, pixels: int = 48, tolerance: float = 1e-5) -> None:
    noise = torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(3))
    want, found = before(model, noise), after(folder, noise)
    assert want.std() > 0.5
    assert (found[:, :ROWS] - want).abs().max() <= tolerance * want.abs().max()


def widen(model) -> None:
    """Give the tower 1297 rows by the reference of this file."""
    embeddings = getattr(model.tower, "vision_model", model.tower).embeddings
    rows = torch.tensor(bicubic(embeddings.position_embedding.weight.detach().double().numpy(), 36), dtype=torch.float32)
    model.tower.config.image_size = embeddings.image_size = 72
    embeddings.position_embedding = nn.Embedding.from_pretrained(rows)
    embeddings.position_ids = torch.arange(1297)[None]


def bicubic(rows: np.ndarray, grid: int, a: float = -0.75) -> np.ndarray:
    """Keys' cubic convolution in float64, corners on corners, edges repeated: [1 + n^2, D] -> [1 + grid^2, D]."""
    n = math.isqrt(len(rows) - 1)
    weights = np.zeros((grid, n))
    for i in range(grid):
        x = i * (n - 1) / (grid - 1)
        left = math.floor(x)
        for k in range(left - 1, left + 3):
            d = abs(x - k)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, min(max(k, 0), n - 1)] += near if d <= 1 else far if d < 2 else 0
    square = np.einsum("iy,jx,yxd->ijd", weights, weights, rows[1:].reshape(n, n, -1))
    return np.concatenate([rows[:1], square.reshape(grid * grid, -1)])


def test_positions_are_interpolated_as_an_independent_float64_bicubic_does():
    rows = torch.randn(577, 32, generator=torch.Generator().manual_seed(1))
    found = interpolate_positions(rows, 36)
    assert found.shape == (1297, 32) and torch.equal(found[0], rows[0])
    np.testing.assert_allclose(found.double().numpy(), bicubic(rows.double().numpy(), 36), atol=2e-5)
    corners = found[1:].reshape(36, 36, 32)[::35, ::35]
    torch.testing.assert_close(corners, rows[1:].reshape(24, 24, 32)[::23, ::23], atol=1e-5, rtol=0)
    assert torch.equal(interpolate_positions(rows, 24), rows) and interpolate_positions(rows.half(), 36).dtype == torch.float16
    with pytest.raises(ValueError, match="578 rows"):
        interpolate_positions(torch.zeros(578, 4), 36)


def test_an_original_checkpoint_in_shards_becomes_a_folder_of_the_same_logits(tmp_path, tokenizer, capsys):
    model = tiny(dtype=torch.float16)
    state = keys(model, dtype=torch.float16)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    state[TOWER + "embeddings.position_ids"] = torch.arange(577)[None]
    source = store(tmp_path / "bert-base-uncased", state, original_config(model), tokenizer, shards=3)  # a name that misleads
    report = convert(source, tmp_path / "out")
    same(model, tmp_path / "out")
    assert report == json.loads((tmp_path / "out/convert.json").read_text())
    assert report["kind"] == "original" and report["dtype"] == "float16"
    assert report["largest_difference"] <= 1e-5 and report["tolerance"] == 1e-4  # nothing was rounded
    assert len(report["left_out"]) == 2 and len(report["files"]) == 3 and report["rows"] == {"source": ROWS, "output": ROWS + 2}
    assert all(t.dtype == torch.float16 for t in load_file(tmp_path / "out/model.safetensors").values())
    assert "inv_freq" in (said := capsys.readouterr().out) and "MB/s" in said
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("form", ["split at spaces", "normalised"])
def test_the_project_loads_what_was_converted_and_its_prompt_has_the_tokens_of_the_original(tmp_path, tokenizer, form):
    model = tiny()
    if form == "normalised":  # LLaMA's older fast tokenizer writes the mark itself
        tokenizer = copy.deepcopy(tokenizer)
        mark = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.backend_tokenizer.pre_tokenizer = None
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(mark)
    convert(store(tmp_path / "a", keys(model), original_config(model), tokenizer), tmp_path / "out", system="Be brief.")
    loaded, processor = assemble.load(tmp_path / "out")
    config = loaded.config
    assert (config.vision_feature_layer, config.vision_feature_select_strategy, config.projector_hidden_act) == (
        -2,
        "default",
        "gelu",
    )
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (48, 2)
    assert pair.vocabulary_of(tmp_path / "out")[IMAGE] == ROWS
    assert loaded.generation_config.pad_token_id == config.text_config.pad_token_id == ROWS + 1
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "Be brief. USER: <image>\nWhat is it? ASSISTANT:"
    image = np.zeros((48, 48, 3), np.uint8)
    ids = processor(images=image, text=text, return_tensors="pt").input_ids[0].tolist()
    # the original tokenises both sides of the image each by itself, from a text's start
    left, right = (tokenizer(part, add_special_tokens=False).input_ids for part in text.split(IMAGE))
    assert ids == [1, *left, *[ROWS] * 576, *right]


@pytest.mark.parametrize("whole_clip, mark", [(False, "vision_model."), (False, ""), (True, "vision_model.")])
def test_a_tower_in_its_own_folder_is_widened_to_1297_rows(tmp_path, tokenizer, whole_clip, mark):
    model = tiny()
    source = store(tmp_path / "a", keys(model, tower=False), original_config(model), tokenizer)
    state = {mark + name.removeprefix("vision_model."): t for name, t in model.tower.state_dict().items()}
    vision = {**model.tower.config.to_dict(), "model_type": "clip_vision_model"}
    if whole_clip:
        state |= {
            "logit_scale": torch.zeros(()),
            "text_model.final_layer_norm.weight": torch.ones(4),
            "visual_projection.weight": torch.ones(4, 64),
        }
        vision = {"model_type": "clip", "vision_config": vision}
    with pytest.raises(ValueError, match="tower=FOLDER"):
        convert(source, tmp_path / "out")
    place = store(tmp_path / "clip-vit-large-patch14-336", state, vision, kind="safetensors")  # found beside, by its name
    report = convert(source, tmp_path / "out", image_size=72, tower=place if whole_clip else None)
    widen(model)
    same(model, tmp_path / "out", pixels=72, tolerance=1e-4)
    assert report["image_size"] == {"source": 48, "output": 72}
    assert load_file(tmp_path / "out/model.safetensors")[
        "vision_tower.vision_model.embeddings.position_embedding.weight"
    ].shape == (1297, 64)


def test_a_checkpoint_of_1297_rows_keeps_them_whatever_its_config_says(tmp_path, tokenizer, monkeypatch):
    model = tiny(pixels=72)
    source = store(tmp_path / "a", keys(model), original_config(model, model_type="geochat"), tokenizer, kind="safetensors")
    monkeypatch.setattr(conversion, "SHARD", "200KB")
    report = convert(source, tmp_path / "out")
    same(model, tmp_path / "out", pixels=72)
    assert report["image_size"] == {"source": 72, "output": 72}
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3


@pytest.mark.parametrize("held", [True, False])
def test_a_geochat_is_widened_to_504_pixels_unless_it_is_so(tmp_path, tokenizer, held):
    model = tiny(pixels=504 if held else 42, patch=14)
    rows = getattr(model.tower, "vision_model", model.tower).embeddings.position_embedding.weight.detach()
    source = store(tmp_path / "a", keys(model), original_config(model, model_type="geochat"), tokenizer)
    report = convert(source, tmp_path / "out")
    assert report["image_size"] == {"source": 504 if held else 42, "output": 504}
    found = load_file(tmp_path / "out/model.safetensors")["vision_tower.vision_model.embeddings.position_embedding.weight"]
    np.testing.assert_allclose(found.double().numpy(), bicubic(rows.double().numpy(), 36), atol=1e-5)


def test_parameters_and_a_weight_that_two_names_share_are_written(tmp_path, tokenizer):
    model = tiny()
    state = keys(model)
    model.language.lm_head.weight = model.language.model.embed_tokens.weight
    state["model.embed_tokens.weight"] = state["lm_head.weight"] = nn.Parameter(state["model.embed_tokens.weight"])
    convert(store(tmp_path / "a", state, original_config(model), tokenizer), tmp_path / "out")
    same(model, tmp_path / "out")


def test_weights_of_several_dtypes_are_compared_as_they_are(tmp_path, tokenizer):
    model = tiny()
    state = {n: t.half() if "mlp" in n else t.bfloat16() if "attn" in n else t for n, t in keys(model).items()}
    source = store(tmp_path / "a", state, original_config(model), tokenizer)
    assert convert(source, tmp_path / "hub", dtype="fp32")["largest_difference"] < 1e-5
    file = tmp_path / "hub/model.safetensors"
    save_file({n: t.half() if "mlp" in n else t.clone() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "hub/config.json").read_text())
    (tmp_path / "hub/config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert convert(tmp_path / "hub", tmp_path / "out", dtype="fp16")["largest_difference"] < 1e-5


def test_weights_that_the_dtype_cannot_hold_are_refused_by_name(tmp_path, tokenizer):
    model = tiny()
    model.language.model.norm.weight.data[3] = 1e6
    source = store(tmp_path / "a", keys(model), original_config(model), tokenizer)
    with pytest.raises(ValueError, match=r"model.norm.weight is not finite in torch.float16; .*dtype=bf16 or fp32"):
        convert(source, tmp_path / "out", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("prefix", ["base_model.model.model.", "model.model.", "model."])
@pytest.mark.parametrize("rooted", [False, True])
def test_an_adapter_is_merged_into_the_base_beside_it(tmp_path, tokenizer, prefix, rooted):
    model = tiny(dtype=torch.float16)
    store(tmp_path / "vicuna", half(model.language), {**original_config(model), "model_type": "llama"}, tokenizer)
    lora = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], use_rslora=rooted, lora_dropout=0.05, task_type="CAUSAL_LM"
    )
    model.language = get_peft_model(model.language, lora)
    for name, parameter in model.language.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    source = tmp_path / "adapter"
    model.language.eval().save_pretrained(source)
    settings = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "lmsys/vicuna"}))
    (source / "config.json").write_text(json.dumps(original_config(model)))
    others = {name: tensor for name, tensor in keys(model).items() if ".mm_projector." in name or ".vision_tower." in name}
    torch.save(
        {prefix + name.removeprefix("model."): tensor for name, tensor in others.items()}, source / "non_lora_trainables.bin"
    )
    report = convert(source, tmp_path / "out", dtype="fp32")
    assert report["kind"] == "adapter over original" and report["merged"] == 4
    same(model, tmp_path / "out")
    for dtype, tolerance in (("fp16", 1e-2), ("bf16", 1e-1)):  # rounded only after the logits were compared
        assert convert(source, tmp_path / dtype, dtype=dtype)["largest_difference"] < 1e-5
        same(model, tmp_path / dtype, tolerance=tolerance)


def test_what_was_trained_beside_an_adapter_wins_over_its_base(tmp_path, tokenizer):
    old, model = tiny(seed=1), tiny(seed=2)
    base = store(tmp_path / "llava", keys(old), original_config(old), tokenizer)
    model.tower, language = old.tower, model.language
    language.load_state_dict(old.language.state_dict())
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model.language = get_peft_model(language, lora)
    for name, parameter in model.language.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    model.language.save_pretrained(tmp_path / "adapter", safe_serialization=True)
    trained = {f"base_model.model.model.mm_projector.{name}": tensor for name, tensor in model.projector.state_dict().items()}
    torch.save(trained, tmp_path / "adapter/non_lora_trainables.bin")
    convert(tmp_path / "adapter", tmp_path / "out", base=base)
    same(model, tmp_path / "out")


PEFT_OLD = {  # how peft named a LLaVA's modules before and since transformers 4.52, whose tower lost a level in version 5
    "base_model.model.model.language_model.": "base_model.model.language_model.model.",
    "base_model.model.lm_head.": "base_model.model.language_model.lm_head.",
    "base_model.model.model.vision_tower.": "base_model.model.vision_tower.vision_model.",
    "base_model.model.model.multi_modal_projector.": "base_model.model.multi_modal_projector.",
}


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("targets, saved", [(["q_proj", "v_proj"], ["multi_modal_projector"]), ("all-linear", None)])
def test_an_adapter_that_peft_stored_over_a_transformers_llava_is_merged(tmp_path, tokenizer, old_names, targets, saved):
    model = tiny(dtype=torch.float16)
    convert(
        store(tmp_path / "a", keys(model), original_config(model), tokenizer), tmp_path / "hub", dtype="fp16", check=False
    )  # an adapter is stored in float32
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=targets, modules_to_save=saved)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    trained = get_peft_model(base, lora).eval()
    torch.manual_seed(1)
    for name, parameter in trained.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    source = tmp_path / "adapter"
    trained.save_pretrained(source)
    assert not (source / "config.json").exists()
    stored = load_file(source / "adapter_model.safetensors")
    assert any("vision_tower" in name for name in stored)  # q_proj is CLIP's name too
    if old_names:
        for new, old in PEFT_OLD.items():
            stored = {old + n.removeprefix(new) if n.startswith(new) else n: t.clone() for n, t in stored.items()}
        save_file(stored, source / "adapter_model.safetensors")
    report = convert(source, tmp_path / "out", base=tmp_path / "hub", dtype="fp32")
    assert report["kind"] == "adapter over transformers" and report["merged"] == sum("lora_A" in name for name in stored)
    noise = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[*BEFORE, *[ROWS] * 576, *AFTER]])
    with torch.no_grad():
        want = trained(input_ids=ids, pixel_values=noise).logits[0]
    assert (after(tmp_path / "out", noise) - want).abs().max() <= 1e-5 * want.abs().max()
    assert convert(source, tmp_path / "wide", image_size=72, dtype="bf16")["largest_difference"] < 1e-5  # its base is named


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_scale_wrong_by_one_percent_is_refused_in_every_dtype(tmp_path, tokenizer, monkeypatch, dtype):
    model = tiny()
    convert(store(tmp_path / "a", keys(model), original_config(model), tokenizer), tmp_path / "hub", check=False)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["down_proj"])
    trained = get_peft_model(AutoModelForImageTextToText.from_pretrained(tmp_path / "hub"), lora)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    trained.save_pretrained(tmp_path / "adapter")

    def wrong(*arguments):
        c = checkpoints.read(*arguments)
        c.lora = {name: (a, b, 1.01 * scale) for name, (a, b, scale) in c.lora.items()}
        return c

    convert(tmp_path / "adapter", tmp_path / "right", dtype=dtype)
    monkeypatch.setattr(conversion, "read", wrong)
    with pytest.raises(ValueError, match="its logits are not those of"):
        convert(tmp_path / "adapter", tmp_path / "out", dtype=dtype)


def test_one_bit_that_was_written_otherwise_is_refused_by_name(tmp_path, tokenizer, monkeypatch):
    model = tiny(dtype=torch.float16)
    source = store(tmp_path / "a", keys(model, dtype=torch.float16), original_config(model), tokenizer)

    def flip(tensors, *rest, **more):
        tensors["language_model.model.layers.1.mlp.up_proj.weight"].view(torch.int16)[3, 4] ^= 1
        save_file(tensors, *rest, **more)

    monkeypatch.setattr(conversion, "save_file", flip)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight is not what was to be written"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "published",
    [
        "language_model.model.layers.0.mlp.up_proj.weight",  # the hub's LLaVAs
        "model.language_model.layers.0.mlp.up_proj.weight",  # transformers since 4.52
        "model.layers.0.mlp.up_proj.weight",  # LLaVA's and GeoChat's own
        "base_model.model.model.layers.0.mlp.up_proj.weight",  # the same under peft
        "base_model.model.model.language_model.layers.0.mlp.up_proj.weight",
        "base_model.model.language_model.model.layers.0.mlp.up_proj.weight",
    ],
)
def test_every_published_name_is_one_written_name(published):
    assert ours(published) == "language_model.model.layers.0.mlp.up_proj.weight"
    assert ours("model.image_newline") == "model.image_newline"


@pytest.mark.parametrize("new_names", [False, True])
def test_a_transformers_folder_passes_through_under_old_and_new_names(tmp_path, tokenizer, new_names):
    model = tiny()
    convert(store(tmp_path / "a", keys(model), original_config(model), tokenizer), tmp_path / "hub")
    source = tmp_path / "geochat-lora"  # a name that misleads
    (tmp_path / "hub").rename(source)
    if new_names:
        renamed = {}
        for name, tensor in load_file(source / "model.safetensors").items():
            name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model", "model.language_model")
            name = name.replace("vision_tower.vision_model", "model.vision_tower").replace("multi_modal", "model.multi_modal")
            renamed[name] = tensor.clone()
        save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds its own; leave it away"):
        convert(source, tmp_path / "out", tower=source)
    report = convert(source, tmp_path / "out")
    assert report["kind"] == "transformers" and report["rows"] == {"source": ROWS + 2, "output": ROWS + 2}
    same(model, tmp_path / "out")
    convert(source, tmp_path / "wide", image_size=72, dtype="bf16")
    widen(model)
    same(model, tmp_path / "wide", pixels=72, tolerance=5e-2)
    assert AutoProcessor.from_pretrained(tmp_path / "wide").image_processor.size["height"] == 72


def test_lacking_surplus_and_misshapen_weights_are_all_named_before_anything_is_written(tmp_path, tokenizer):
    model = tiny()
    state = keys(model)
    del state["model.mm_projector.2.bias"], state["model.norm.weight"]
    for layer in range(2):
        del state[f"model.layers.{layer}.mlp.up_proj.weight"]
    state["model.image_newline"] = torch.zeros(64)
    state["lm_head.weight"] = torch.zeros(ROWS + 1, 64)
    source = store(tmp_path / "a", state, original_config(model), tokenizer)
    with pytest.raises(ValueError) as error:
        convert(source, tmp_path / "out")
    lacks = "lacks: language_model.model.layers.*.mlp.up_proj.weight (2), language_model.model.norm.weight, multi_modal_projector"
    assert lacks in str(error.value) and "surplus: model.image_newline;" in str(error.value)
    assert f"shape: lm_head.weight [{ROWS + 1}, 64] (config.json asks for [{ROWS}, 64])" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_weight_under_two_names_is_refused(tmp_path, tokenizer):
    model = tiny()
    state = keys(model) | {"model.lm_head.weight": torch.zeros(ROWS, 64)}
    with pytest.raises(ValueError, match=r"lm_head.weight and (model.)?lm_head.weight are the same weight"):
        convert(store(tmp_path / "a", state, original_config(model), tokenizer), tmp_path / "out")


def test_integer_weights_are_refused_by_name(tmp_path, tokenizer):
    model = tiny()
    state = keys(model)
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    with pytest.raises(ValueError, match=r"neither .*: model.layers.1.mlp.up_proj.weight\. Nothing was written"):
        convert(store(tmp_path / "a", state, original_config(model), tokenizer), tmp_path / "out")


class Evil:
    def __reduce__(self):
        return (BROKEN.append, ("ran",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_anything_but_tensors_is_refused_and_not_run(tmp_path, tokenizer, zipped):
    model = tiny()
    source = store(tmp_path / "a", {}, original_config(model), tokenizer)
    torch.save({**keys(model), "x": Evil()}, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pytorch_model.bin is refused, and nothing in it was run.*safetensors"):
        convert(source, tmp_path / "out")
    assert not BROKEN
    save_file(
        {name: t.contiguous() for name, t in keys(model).items()}, source / "model.safetensors"
    )  # preferred, where it is there
    convert(source, tmp_path / "out", check=False)
    same(model, tmp_path / "out")


@pytest.mark.parametrize("damaged", [b"", b"version https://git-lfs.github.com/spec/v1", b"\x80\x02}.", b"ag0", b"e."])
def test_a_damaged_pickle_is_refused_by_name(tmp_path, tokenizer, damaged):
    source = store(tmp_path / "a", {}, original_config(tiny()), tokenizer)
    (source / "pytorch_model.bin").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"pytorch_model.bin (cannot be read|is refused)"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_half_a_file_is_refused_by_name(tmp_path, tokenizer, file):
    model = tiny()
    source = store(tmp_path / "a", keys(model), original_config(model), tokenizer, kind=file.split(".")[1])
    (source / file).write_bytes((source / file).read_bytes()[:5000])
    with pytest.raises(ValueError, match=rf"{file}.*download it again|{file}.*Download it again"):
        convert(source, tmp_path / "out")


def test_a_shard_that_the_index_names_and_nobody_has_is_named(tmp_path, tokenizer):
    model = tiny()
    source = store(tmp_path / "a", keys(model), original_config(model), tokenizer, shards=2)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match=r"names pytorch_model-00002-of-00002.bin, missing"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear' is not supported"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio"),
        ({"model_type": "llava_mistral"}, "model_type 'llava_mistral'"),
    ],
)
def test_another_kind_of_llava_is_refused_by_its_field(tmp_path, tokenizer, change, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        convert(store(tmp_path / "a", keys(model), original_config(model, **change), tokenizer), tmp_path / "out")


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path, tokenizer):
    model = tiny()
    source = store(tmp_path / "a", {}, original_config(model), tokenizer)
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True}))
    with pytest.raises(ValueError, match="'use_dora': True} cannot be merged; merge it with"):
        convert(source, tmp_path / "out")


def test_an_adapter_over_the_wrong_base_is_refused_by_the_names_it_changes(tmp_path, tokenizer):
    model = tiny()
    lora = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    get_peft_model(model.language, lora).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter/config.json").write_text(json.dumps(original_config(model)))
    state = keys(tiny())
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 72)
    del state["model.layers.0.mlp.up_proj.weight"]
    base = store(tmp_path / "base", state, original_config(model), tokenizer)
    with pytest.raises(
        ValueError, match=r"not hold what the adapter changes: language_model.model.layers.\*.mlp.up_proj.weight \(2\)"
    ):
        convert(tmp_path / "adapter", tmp_path / "out", base=base)
    with pytest.raises(ValueError, match=r"None, which it names, is not here; give base=FOLDER"):
        convert(tmp_path / "adapter", tmp_path / "out")


def test_another_transformers_model_is_refused_by_its_type(tmp_path, tokenizer):
    config = {"model_type": "llava_next", "text_config": {}, "vision_config": {}}
    state = {"multi_modal_projector.linear_1.weight": torch.zeros(2, 2)}
    source = store(tmp_path / "llava-1.5-7b", state, config, tokenizer)
    with pytest.raises(ValueError, match="model_type 'llava_next' is not supported"):
        convert(source, tmp_path / "out")
    config = {"model_type": "llava", "text_config": {"model_type": "mistral"}, "vision_config": {"model_type": "pixtral"}}
    with pytest.raises(ValueError, match="a LLaVA of pixtral and mistral is not supported"):
        convert(store(source, state, config), tmp_path / "out")


def test_a_language_model_alone_is_no_model(tmp_path, tokenizer):
    model = tiny()
    source = store(tmp_path / "llava-7b", model.language.state_dict(), model.language.config.to_dict(), tokenizer)
    with pytest.raises(ValueError, match="neither a LLaVA"):
        convert(source, tmp_path / "out")


def test_a_conversion_that_changes_the_logits_is_refused_and_removed(tmp_path, tokenizer, monkeypatch):
    model = tiny()
    source = store(tmp_path / "a", keys(model), original_config(model), tokenizer)
    turned = {"linear_1.": "linear_2.", "linear_2.": "linear_1."}
    wrong = tuple(
        (old, checkpoints.PROJECTOR + turned[new[-9:]] if "mm_projector" in old else new) for old, new in checkpoints.NAMES
    )
    monkeypatch.setattr(checkpoints, "NAMES", wrong)
    with pytest.raises(ValueError, match="its logits are not those of"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_slow_tokenizer_is_read_as_the_original_reads_it(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = tiny()
    (tmp_path / "text").write_text("\n".join([SYSTEM, "What is it? USER: ASSISTANT: ships at a quay"] * 50))
    source = store(tmp_path / "a", keys(model), original_config(model))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(source / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": "<unk>"})
    )
    slow = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model"))
    report = convert(source, tmp_path / "out", check=False)
    made = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert len(made) == report["rows"]["output"] == len(slow) + 1 and made.pad_token == "<unk>"
    left, right = "A chat. USER: ", "\nWhat is it, é? ASSISTANT:"
    assert made(left + IMAGE + right).input_ids == [1, *slow.encode(left), len(slow), *slow.encode(right)]


def test_the_job_explains_itself_and_its_errors(tmp_path, tokenizer, capsys):
    done = subprocess.run([sys.executable, JOB, "--help"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "image_size" in done.stdout
    job = runpy.run_path(str(JOB))["main"]

    def run(*arguments) -> tuple[int, str, str]:
        code = job([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    wrong = {
        "sorce=a": "did you mean 'source'",
        "source=a": "output missing",
        "source=a output=b dtype=int8": "bf16, fp16 or fp32",
        "source=a output=b image_size=big": "pixels",
        "source=a output=b image_size=0": "pixels",
        "source=a output=b check=x": "true or false",
    }
    for arguments, message in wrong.items():
        code, _, error = run(*arguments.split())
        assert code == 2 and message in error and len(error.splitlines()) == 1
    model = tiny()
    source = store(tmp_path / "a", keys(model), original_config(model), tokenizer)
    code, _, error = run(f"source={tmp_path / 'none'}", f"output={tmp_path / 'out'}")
    assert code == 1 and error.startswith("convert: ") and len(error.splitlines()) == 1
    code, said, error = run(f"source={source}", f"output={tmp_path / 'out'}", "dtype=bf16")
    assert code == 0 and "limit 1e-04" in said, error
    same(model, tmp_path / "out", tolerance=5e-2)
    code, _, error = run(f"source={source}", f"output={tmp_path / 'out'}")
    assert code == 1 and "is there already" in error
