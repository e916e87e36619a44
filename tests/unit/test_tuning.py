"""What each policy trains, that it is all that moves, and that plain transformers reads what is saved; teachers in few bits."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText

from geodistill.config import LoraConfig, ModelConfig
from geodistill.data.stream import to_micro_batch
from geodistill.models import assemble
from geodistill.models.row_model import RowModel
from geodistill.models.tuning import merged_weights, tune

POLICIES = {
    "lora": lambda name: "lora_" in name,
    "bias": lambda name: name.endswith(".bias") or "norm" in name,
    "attention_and_norm": lambda name: "self_attn" in name or "norm" in name,
    "projector": lambda name: False,
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_moves_what_it_names_and_is_read_by_plain_transformers(
    policy, student, processor, make_packer, records, tmp_path
):
    model = copy.deepcopy(student)
    torch.manual_seed(0)
    tune(model, policy, LoraConfig(rank=4, alpha=8, dropout=0.0))
    rows, packer = RowModel(model), make_packer(4)
    before = {name: value.clone() for name, value in model.named_parameters()}
    batch = to_micro_batch(records[:2], packer, 32)
    packed = packer.pack(batch.questions)
    pixels = rows.prepare(torch.from_numpy(batch.pixels))

    def loss():
        logits, _ = rows(packed, packer.answers(packed), rows.see(pixels))
        return torch.nn.functional.cross_entropy(logits, packer.answers(packed).flat[0])

    optimizer = torch.optim.AdamW([p for p in rows.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    first = loss().item()
    for _ in range(4):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    last = loss().item()
    assert last < first
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    wanted = {name for name in before if "multi_modal_projector" in name or ("language_model" in name and POLICIES[policy](name))}
    assert moved == wanted and len(moved) >= 4

    assemble.save(model, processor, tmp_path / "model", merged_weights(model))
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model = again
    rows = RowModel(again)
    assert loss().item() == pytest.approx(last, rel=1e-5)


def test_a_second_stage_of_bias_tuning_goes_on_from_the_first(student, processor, tmp_path):
    model = copy.deepcopy(student)
    tune(model, "bias", LoraConfig())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.fill_(0.5)
    assemble.save(model, processor, tmp_path / "model", merged_weights(model))
    again, _ = assemble.load(tmp_path / "model")
    tune(again, "bias", LoraConfig())
    biases = [p for name, p in again.named_parameters() if name.endswith("proj.bias") and "language_model" in name]
    assert biases and all(p.requires_grad and (p == 0.5).all() for p in biases)


def test_weights_are_loaded_in_the_type_that_is_asked_for_but_rotary_frequencies(student, processor, tmp_path):
    assemble.save(student, processor, tmp_path / "model")
    model, _ = assemble.load(tmp_path / "model", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("bits, worst", [(8, 0.05), (4, 0.4)])
def test_a_teacher_in_few_bits_says_nearly_the_same_and_takes_less(
    bits, worst, tokenizer, processor, make_packer, records, tmp_path
):
    pytest.importorskip("bitsandbytes", reason="the extra quantised is not installed")
    torch.manual_seed(0)
    sizes = ModelConfig(hidden=128, layers=2, heads=4, intermediate=256)
    sizes.vision.image_size = 32
    whole = assemble.new_model(sizes, tokenizer)
    with torch.no_grad():
        for parameter in whole.model.language_model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    assemble.save(whole, processor, tmp_path / "model")
    few, _ = assemble.load(tmp_path / "model", bits=bits)
    linear = [p for p in few.model.language_model.layers.parameters() if p.dim() == 2]
    assert all(not p.is_floating_point() for p in linear)
    assert all(
        p.is_floating_point() for part in (few.model.vision_tower, few.model.multi_modal_projector) for p in part.parameters()
    )
    assert assemble.same_tower(few, whole)
    packer = make_packer(4)
    batch = to_micro_batch(records[:2], packer, 32)
    packed = packer.pack(batch.questions)
    said = []
    for model in (whole, few):
        rows = RowModel(model).eval()
        rows.begin(packer.prefix, packer.prompt, 32)
        assert rows.takes_rows
        with torch.no_grad():
            logits, _ = rows(packed, packer.answers(packed), rows.see(rows.prepare(torch.from_numpy(batch.pixels))))
        said.append(torch.softmax(logits, -1))
    distance = (said[0] - said[1]).abs().sum(-1).mean().item() / 2  # total variation
    assert 0 < distance < worst
