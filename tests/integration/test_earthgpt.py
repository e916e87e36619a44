"""EarthGPT's two stages for real, with a tower of ViT and ConvNet: each stage changes the weights it names, and no others."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import settings

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(600)]

JOINED = [
    f"teacher.model.vision.{key}" for key in ("conv_widths=[8,16]", "conv_depths=[1,1]", "vit_layers=[-1,-2]", "feature_layer=-1")
]
STAGES = [
    f"teacher.{stage}.{key}"
    for stage, tuning in (("first", "attention_and_norm"), ("train", "bias"))
    for key in (f"tuning={tuning}", "steps=2", "images_per_micro_batch=8", "learning_rate=0.01", "questions_per_row=12")
]


def changed(before: Path, after: Path) -> set[str]:
    """Names of the weights that differ between two model folders, or that the second alone has and are not zero."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() <= new.keys()
    return {name for name, value in new.items() if not (value.equal(old[name]) if name in old else not value.any())}


def test_each_stage_changes_the_weights_it_names_and_no_others(ray_cluster, tmp_path):
    from transformers import AutoModelForImageTextToText

    from geodistill.data.prepare import prepare
    from geodistill.models import assemble
    from geodistill.train.stage import stages
    from geodistill.train.trainer import fit

    general, init = tmp_path / "general", tmp_path / "init"
    prepare(settings(tmp_path / "run"), parallel=False)
    prepare(settings(tmp_path / "run", f"data.shards={general}", "data.seed=1"), parallel=False)
    config = settings(
        tmp_path / "run", *JOINED, *STAGES, "role=teacher", f"teacher.first.shards={general}", f"teacher.model.init={init}"
    )
    sizes = config.teacher.model
    tokenizer = assemble.load_tokenizer(general / "tokenizer")
    processor = assemble.new_processor(tokenizer, sizes.vision.image_size, sizes.vision.patch)
    assemble.save(assemble.new_model(sizes, tokenizer), processor, init)
    first, second = stages(config, "finetune")
    for stage in (first, second):
        fit(config, stage)

    aligned, tuned = Path(first.folder) / "model", Path(second.folder) / "model"
    for names, trained in (
        (changed(init, aligned), ("multi_modal_projector", "self_attn", "norm")),
        (changed(aligned, tuned), ("multi_modal_projector", "bias", "norm")),
    ):
        assert not [name for name in names if "vision_tower" in name or not any(part in name for part in trained)]
        assert all(any(part in name for name in names) for part in trained)
    model, info = AutoModelForImageTextToText.from_pretrained(tuned, output_loading_info=True)
    assert model.config.vision_config.model_type == "vit_convnet"
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
