"""What jobs/export.py writes: folders that load elsewhere, with their card and their figures."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import settings
from transformers import AutoModelForImageTextToText

from geodistill.export import export, export_table, merged, vllm_reads
from geodistill.models import assemble

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


def test_a_student_is_exported_with_a_smaller_variant(first):
    run = Path(first.run)
    config = settings(run, f"data.shards={run.parent}/data", "export.license=cc-by-4.0")
    found = export(config)
    assert set(found["variants"]) == {"student", "student-int8"}
    whole, small = found["variants"].values()
    assert 0 < small["MB"] < whole["MB"] and whole["vllm"] == ""
    assert 0 <= small["mean"] <= 100 and 0 <= whole["mean"] <= 100 and "student-int8" in export_table(found)
    same = load_file(run / "distill/model/model.safetensors"), load_file(run / "export/student/model.safetensors")
    assert all(torch.equal(same[0][k], same[1][k]) for k in same[0])
    for name in found["variants"]:
        folder = run / "export" / name
        assert AutoModelForImageTextToText.from_pretrained(folder)
        head, card = (folder / "README.md").read_text().split("---\n")[1:]
        assert yaml.safe_load(head)["license"] == "cc-by-4.0" and f"{whole['mean']:.1f}" in card and "| train | 64 |" in card
        assert (folder / "training.yaml").is_file()


def test_adapters_are_merged(student, processor, tmp_path):
    assemble.save(student, processor, tmp_path / "base")
    model, _ = assemble.load(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        plain = student(input_ids=ids).logits
    adapted.save_pretrained(tmp_path / "adapters")
    whole, _ = merged(str(tmp_path / "adapters"))
    with torch.no_grad():
        found = whole(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 1e-2


def test_what_vllm_cannot_read_is_told(student, processor, tmp_path):
    assemble.save(student, processor, tmp_path / "model")
    assert vllm_reads(tmp_path / "model") == ""
    settings = json.loads((tmp_path / "model/config.json").read_text())
    for change, says in (({"architectures": ["Other"]}, "none of its models"),
                         ({"vision_config": {"model_type": "vit_convnet"}}, "no tower of type")):  # fmt: skip
        (tmp_path / "model/config.json").write_text(json.dumps(settings | change))
        assert says in vllm_reads(tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(settings))
    (tmp_path / "model/tokenizer.json").unlink()
    assert "tokenizer.json is missing" in vllm_reads(tmp_path / "model")
