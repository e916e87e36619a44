"""Other families than LLaVA, tiny and with random weights, through the same rows, decoding and update."""

import copy
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, SIDE, save_pair
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil

from geodistill.config import LoraConfig, LossConfig
from geodistill.data.rows import Packer
from geodistill.data.stream import to_micro_batch
from geodistill.distill.cache import fixed_step, new_cache
from geodistill.distill.step import Distiller
from geodistill.language import IMAGE
from geodistill.models import assemble, pair
from geodistill.models.row_model import RowModel, language_model, row_model
from geodistill.models.tuning import merged_weights, tune

LIMIT = 6
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tokenizer, tmp_path_factory):
    """Saved teacher and student of one family."""
    return save_pair(request.param, tokenizer, tmp_path_factory.mktemp(request.param))


def read(folder, frozen: bool = True):
    model, processor = assemble.load(folder)
    tokenizer = processor.tokenizer
    rows = row_model(model, processor.image_processor, freeze_tower=frozen, vocabulary=len(tokenizer)).eval()
    packer = Packer(tokenizer, IMAGE, rows.image_tokens(SIDE), 40, 4, rows.around())
    rows.begin(packer.prefix, packer.prompt, SIDE)
    return rows, packer, processor


def test_a_family_distils_for_a_few_steps(folders, records):
    """Rollout, reverse KL and alignment: the loss falls on the same images; what is frozen stays; the result is loaded again."""
    teacher, packer, processor = read(folders["teacher"])
    student, _, _ = read(folders["student"])
    teacher.requires_grad_(False)
    student.align = torch.nn.Linear(32, 64)
    before = merged_weights(student.model)
    forbidden = assemble.forbidden_tokens(processor.tokenizer, len(processor.tokenizer))
    distiller = Distiller(student, teacher, LossConfig(long=0.0, align=0.01), forbidden, processor.tokenizer.eos_token_id, LIMIT)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=3e-3)
    batch = to_micro_batch(records[:3], packer, SIDE)
    rows, pixels = packer.pack([asked[:4] for asked in batch.questions]), student.prepare(torch.from_numpy(batch.pixels))
    assert rows.last_Rn.shape[1] > 1
    seen = []
    for _ in range(6):
        item = distiller.rollout(rows, pixels, torch.Generator().manual_seed(0))
        assert not forbidden[item.batch.token].any()
        value, metrics = distiller.on_policy_pass(student, item, len(item.batch.token), item.z_teacher[..., 0].numel())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(metrics["reverse_kl"].item() / len(item.batch.token))
    assert np.isfinite(seen).all() and seen[-1] < 0.9 * seen[0]
    after = merged_weights(student.model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert any("lm_head" in n or "embed_tokens" in n for n in moved) and any(
        "project" in n or "connector" in n or "merger" in n for n in moved
    )
    assert not any(("vision" in n or "visual" in n) and "merger" not in n for n in moved)
    out = folders["student"].with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    assemble.save(student.model, processor, out, after)
    again = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], after[name]) for name in after)
    assert assemble.load(out)[1].image_processor.to_dict() == processor.image_processor.to_dict()


def test_a_row_of_questions_is_what_the_family_says_of_each(folders, records):
    """Log-probabilities of answers, two images in a row, against the model's own forward pass on one question at a time."""
    student, packer, _ = read(folders["student"])
    batch = to_micro_batch(records[3:5], packer, SIDE)
    asked = [[q for q in questions if q.response][:most] for most, questions in zip((3, 1), batch.questions, strict=True)]
    pixels = torch.from_numpy(batch.pixels)
    rows = packer.pack(asked)
    assert rows.image_I.tolist() == [0, 1] and [len(row) for row in rows.questions] == [4]
    responses = packer.answers(rows)
    with torch.no_grad():
        logits, z = student(rows, responses, None, student.prepare(pixels))
    assert z.shape[1] == packer.prefix.count(student.image_token)
    at = 0
    for i, questions in enumerate(asked):
        own = student.prepare(pixels[i : i + 1])
        for question in questions:
            ids = torch.tensor([packer.prefix + question.prompt + question.response])
            kinds = {"mm_token_type_ids": (ids == student.image_token).int()} if "qwen" in student.model.config.model_type else {}
            with torch.no_grad():
                true = student.model(input_ids=ids, **own, **kinds).logits[0, -len(question.response) - 1 : -1]
            found = logits[at : at + len(question.response)]
            torch.testing.assert_close(found, true[:, : found.shape[1]], rtol=1e-4, atol=2e-4)
            at += len(question.response)
    assert at == len(logits)


def test_adapters_are_merged_into_what_is_saved(folders, tmp_path):
    rows, packer, processor = read(folders["student"])
    torch.manual_seed(0)
    tune(rows.model, "lora", LoraConfig(rank=3, dropout=0.0))
    trained = {name for name, p in rows.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or any(k in n for k in ("project", "connector", "merger")) for n in trained)
    with torch.no_grad():
        for name, parameter in rows.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assemble.save(rows.model, processor, tmp_path / "model", merged_weights(rows.model))
    again, _ = assemble.load(tmp_path / "model")
    ids = torch.tensor([packer.prompt])
    with torch.no_grad():
        one, two = (m(input_ids=ids).logits for m in (rows.model, again))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


class Around(torch.nn.Module):
    """A language model that wraps another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()


class NoRows(Around):
    """It takes masks of two dimensions alone."""

    def forward(self, attention_mask=None, **given):
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("attention_mask must have two dimensions")
        return self.inner(attention_mask=attention_mask, **given)


def test_a_model_without_the_row_mask_takes_one_question_a_row(teacher, make_packer, records):
    model = copy.deepcopy(teacher)
    plain = row_model(copy.deepcopy(teacher), None).eval()
    model.model.language_model = NoRows(language_model(model))
    rows = row_model(model, None).eval()
    packer = make_packer(1)
    rows.begin(packer.prefix, packer.prompt, 32)
    assert not rows.takes_rows
    plain.begin(packer.prefix, packer.prompt, 32)
    assert plain.takes_rows
    batch = to_micro_batch(records[:2], packer, 32)
    asked = packer.pack([q[:2] for q in batch.questions])
    with torch.no_grad():
        pixels = rows.prepare(torch.from_numpy(batch.pixels))
        one, two = (m(asked, packer.answers(asked), m.see(pixels))[0] for m in (rows, plain))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


class Mixer(Around):
    """In it every token sees all before it, whatever the mask says, as in a recurrent one."""

    def forward(self, inputs_embeds, attention_mask=None, **given):
        return self.inner(inputs_embeds=inputs_embeds.cumsum(1), attention_mask=attention_mask, **given)


def test_a_model_that_heeds_no_mask_is_refused(teacher, make_packer):
    model = copy.deepcopy(teacher)
    model.model.language_model = Mixer(language_model(model))
    packer = make_packer(1)
    with pytest.raises(ValueError, match="reads neither a row mask nor padding"):
        row_model(model, None).eval().begin(packer.prefix, packer.prompt, 32)


def test_a_family_that_does_more_with_an_image_is_refused(folders):
    model, processor = assemble.load(folders["student"])
    rows = row_model(model, processor.image_processor, vocabulary=len(processor.tokenizer)).eval()
    packer = Packer(processor.tokenizer, IMAGE, rows.image_tokens(SIDE), 40, 4, rows.around())
    see = rows.see
    rows.see = lambda pixels: see(pixels).flip(1)
    with pytest.raises(ValueError, match="does more with an image than put it in place"):
        rows.begin(packer.prefix, packer.prompt, SIDE)


@pytest.mark.parametrize("folders", ["qwen2_5_vl"], indirect=True)
def test_a_pair_that_does_not_agree_is_refused_before_weights(folders, tokenizer, tmp_path):
    """Another family, another cut of the image, another vocabulary: each within seconds, from the JSON files alone."""
    began = time.time()
    student = folders["student"]
    good = pair.image_reading(student)
    vocabulary = pair.vocabulary_of(student)
    pair.check_pair(folders["teacher"], vocabulary, good)
    llava = {"model_type": "llava", "image_size": 64, "patch_size": 8}
    with pytest.raises(
        ValueError, match=r"different tokens.*model_type qwen2_5_vl; student: 64 image tokens, .*model_type llava"
    ):
        pair.check_pair(folders["teacher"], vocabulary, llava)
    other = tmp_path / "other"
    shutil.copytree(student, other, ignore=shutil.ignore_patterns("*.safetensors"))
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=224 * 224).save_pretrained(other)
    with pytest.raises(ValueError, match="different tokens"):
        pair.check_pair(folders["teacher"], vocabulary, pair.image_reading(other))
    with pytest.raises(ValueError, match="different vocabularies"):
        pair.check_pair(folders["teacher"], tokenizer.get_vocab(), good)
    assert time.time() - began < 5


@pytest.mark.parametrize("folders", ["internvl"], indirect=True)
def test_the_job_refuses_such_a_pair_within_five_seconds(folders, tmp_path):
    command = [sys.executable, "jobs/distill.py", "--config", "configs/demo.yaml", f"run={tmp_path}"]
    began = time.time()
    done = subprocess.run(
        [*command, f"distill.teacher={folders['teacher']}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.startswith("distill: the teacher") and "model_type internvl" in done.stderr
    assert time.time() - began < 5


@pytest.mark.parametrize("folders", ["qwen2_5_vl"], indirect=True)
def test_a_published_image_processor_reads_as_the_same_one_saved_again(folders, tmp_path):
    raw = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12544, "patch_size": 14}
    for folder in ("raw", "again"):
        shutil.copytree(folders["student"], tmp_path / folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "raw/preprocessor_config.json").write_text(json.dumps(raw))
    Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "raw").save_pretrained(tmp_path / "again")
    one, two = (pair.image_reading(tmp_path / folder) for folder in ("raw", "again"))
    assert one["size"] == two["size"] == {"shortest_edge": 3136, "longest_edge": 12544}


def test_folders_that_are_no_such_model_are_refused_and_a_whole_clip_is_a_tower(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llava_llama", "mm_hidden_size": 1024}))
    with pytest.raises(ValueError, match=r"llava_llama.*convert it with jobs/convert\.py"):
        pair.image_reading(tmp_path)
    config.write_text(json.dumps({"model_type": "clip", "vision_config": {"image_size": 336, "patch_size": 14}}))
    assert pair.image_reading(tmp_path) == {"model_type": "llava", "image_size": 336, "patch_size": 14}


def test_a_template_that_ends_in_a_new_line_puts_no_space_before_an_answer(tokenizer, records):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}"
        "{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    for template, gap in ((chat.chat_template, ""), (tokenizer.chat_template, " ")):
        chat.chat_template = template
        packer = Packer(chat, IMAGE, 4, 99, 4)
        asked = packer.questions("a", records[0].conversations)
        assert all(chat.decode(q.response, skip_special_tokens=True) == gap + q.references[0] for q in asked)


def test_a_template_in_the_file_of_earlier_versions_is_read(student, processor, tmp_path):
    assemble.save(student, processor, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    (tmp_path / "model/chat_template.json").write_text(json.dumps({"chat_template": processor.tokenizer.chat_template}))
    for file in ("tokenizer_config.json", "processor_config.json"):
        settings = json.loads((tmp_path / "model" / file).read_text())
        settings.pop("chat_template", None)
        (tmp_path / "model" / file).write_text(json.dumps(settings))
    assert assemble.load(tmp_path / "model")[1].tokenizer.chat_template == processor.tokenizer.chat_template


def test_positions_that_follow_the_length_are_not_recorded(student):
    """As InternVL3 has them: each step asks the device for the length, which no CUDA graph can hold."""
    rows = RowModel(copy.deepcopy(student)).eval()
    text = rows.model.config.get_text_config()
    assert fixed_step(rows, new_cache(rows.model)) is not None
    text.rope_parameters = {**(text.rope_parameters or {}), "rope_type": "dynamic", "factor": 2.0}
    assert fixed_step(rows, new_cache(rows.model)) is None
