"""Stored features: what RowModel.see gives, made once, refused where they are of something else; and how often vision runs."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from families import qwen, words
from torch import nn

from geodistill.config import Config, ConfigError, LossConfig, changed, load
from geodistill.data import features, stream
from geodistill.data.features import (
    Tower,
    Writer,
    break_even,
    check_features,
    fingerprint,
    load_features,
    store_features,
    to_array,
    to_tensor,
)
from geodistill.data.prepare import prepare
from geodistill.data.record import SCHEMA
from geodistill.data.shards import groups, load_manifest
from geodistill.data.stream import MicroBatch, PackerSpec, from_table, join, load_group, to_table
from geodistill.distill import step
from geodistill.distill.step import Distiller
from geodistill.language import IMAGE
from geodistill.models import assemble
from geodistill.models.row_model import RowModel
from geodistill.models.vision import new_tower
from unit.test_step import Calls

SMALL = [
    "data.train=20", "data.val=4", "data.test=4", "data.images_per_shard=8", "data.images_per_group=4", "data.vocabulary=500",
]  # fmt: skip
EXACT = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_all(config: Config, made_from: dict, todo: list[dict]) -> Iterator[dict]:
    """As Ray Data does, in this process."""
    for shard in todo:
        yield json.loads(Writer(config, made_from)({"shard": json.dumps(shard)})["info"])


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(features, "_write_all", write_all)


@pytest.fixture(scope="module")
def prepared(student, tmp_path_factory) -> Config:
    """Shards, and settings of a student whose tower lies in a folder."""
    folder = tmp_path_factory.mktemp("features")
    student.model.vision_tower.save_pretrained(folder / "tower")
    config = load(None, [f"run={folder}", f"student.model.tower={folder}/tower", f"features={folder}/features", *SMALL])
    prepare(config, parallel=False)
    return config


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def stored(prepared, request) -> Config:
    config = changed(prepared, [f"cluster.precision={request.param}", f"features={prepared.run}/{request.param}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_write_all", write_all)
        store_features(config)
    return config


@pytest.fixture
def fresh(prepared, tmp_path) -> Config:
    """The same with shards of its own, and no features yet."""
    shutil.copytree(prepared.data.shards, tmp_path / "data")
    return changed(prepared, [f"data.shards={tmp_path}/data", f"features={tmp_path}/features"])


def spec(config: Config, stored: bool) -> PackerSpec:
    return PackerSpec(f"{config.data.shards}/tokenizer", IMAGE, 16, 32, 200, 8, features=config.features if stored else "")


def batches(config: Config, stored: bool, splits: tuple[str, ...] = ("train", "val")) -> list[MicroBatch]:
    manifest = load_manifest(config.data.shards)
    return [load_group(config.data.shards, group, spec(config, stored)) for s in splits for group in groups(manifest, s)]


def of_a_stage(config: Config) -> RowModel:
    """The model that a stage of these settings would start from."""
    tokenizer = assemble.load_tokenizer(f"{config.data.shards}/tokenizer")
    return RowModel(assemble.new_model(config.student.model, tokenizer)).to(EXACT[config.cluster.precision]).eval()


def test_stored_features_are_what_the_tower_gives_bit_for_bit(stored):
    model, shown, read = of_a_stage(stored), batches(stored, False), batches(stored, True)
    assert len(shown) == len(read) == 6
    for images, found in zip(shown, read, strict=True):
        assert found.ids == images.ids and found.questions == images.questions and found.rejected == images.rejected
        assert found.features is not None and len(found.pixels) == 0 and images.features is None
        own = to_tensor(found.features)
        with torch.no_grad():
            expected = model.see(model.prepare(torch.from_numpy(images.pixels)))
        assert own.dtype == EXACT[stored.cluster.precision] and torch.equal(own, expected)
    check_features(stored, {"student": model.model, "teacher": copy.deepcopy(model.model)}, 32)


def test_a_larger_batch_differs_by_rounding_alone(stored):
    model, images, found = of_a_stage(stored), join(batches(stored, False)), join(batches(stored, True))
    with torch.no_grad():
        expected = model.see(model.prepare(torch.from_numpy(images.pixels))).float()
    error = (to_tensor(found.features).float() - expected).norm() / expected.norm()
    assert error < (1e-6 if stored.cluster.precision == "fp32" else 5e-3)


@pytest.mark.parametrize("kind", ["a whole LLaVA", "EarthGPT's tower"])
def test_other_towers(kind, student, tokenizer, processor, tmp_path):
    """The folder of a whole model, and a tower that joins two."""
    sizes = load(None, ["student.model.vision.image_size=32", "student.model.vision.feature_layer=-1"]).student.model
    if kind == "a whole LLaVA":
        assemble.save(student, processor, tmp_path / "model")
        config, (model, _) = load(None, [f"student.model.init={tmp_path}/model"]), assemble.load(tmp_path / "model")
    else:
        sizes.vision.conv_widths, sizes.vision.conv_depths = [8, 16], [1, 1]
        new_tower(sizes.vision).save_pretrained(tmp_path / "model")
        config = load(None, [f"student.model.tower={tmp_path}/model"])
        model = assemble.new_model(config.student.model, tokenizer)
    images, found = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8), Tower(config, "cpu")
    reader = RowModel(model).eval()
    with torch.no_grad():
        expected = reader.see(reader.prepare(torch.from_numpy(images)))
    assert found.side == 32 and torch.equal(to_tensor(found(images)), expected)
    assert found.made_from["tower"] == fingerprint(model.model.vision_tower, model.config.vision_feature_layer, torch.float32)


def test_what_is_stored(stored):
    found, size = load_features(stored.features), 2 if stored.cluster.precision == "bf16" else 4
    assert (found["shape"], found["images"], found["image_bytes"]) == ([16, 32], 24, 16 * 32 * size)
    assert 24 * found["image_bytes"] < found["bytes"] < 24 * found["image_bytes"] + 20_000
    assert sorted(f.name for f in Path(stored.features).iterdir()) == [
        "manifest.json", "train-00000.arrow", "train-00001.arrow", "train-00002.arrow", "val-00000.arrow"
    ]  # fmt: skip
    assert set(found["milliseconds"]) == {"decoding", "tower", "writing", "reading"} and min(found["milliseconds"].values()) > 0


def test_arrays_travel_through_ray_data_as_they_are(stored):
    (batch, *_), (images, *_) = batches(stored, True), batches(stored, False)
    for one in (batch, images):
        found = from_table(to_table(one))
        assert found.ids == one.ids and np.array_equal(found.pixels, one.pixels) and found.pixels.flags.writeable
        assert (found.features is None) == (one.features is None)
    assert np.array_equal(from_table(to_table(batch)).features, batch.features)
    assert torch.equal(to_tensor(to_array(to_tensor(batch.features))), to_tensor(batch.features))


def test_a_second_run_makes_nothing_and_a_lost_file_alone_is_made_again(fresh, monkeypatch, capsys):
    asked: list[str] = []

    def counted(config: Config, made_from: dict, todo: list[dict]) -> Iterator[dict]:
        asked.extend(shard["file"] for shard in todo)
        return write_all(config, made_from, todo)

    monkeypatch.setattr(features, "_write_all", counted)
    first = store_features(fresh)
    folder = Path(fresh.features)
    before = {f.name: f.read_bytes() for f in folder.glob("*.arrow")}
    assert len(asked) == len(before) == 4
    assert store_features(fresh) == first and len(asked) == 4 and "features are there already" in capsys.readouterr().out
    (folder / "train-00001.arrow").unlink()
    store_features(fresh)
    assert asked[4:] == ["train-00001.parquet"] and "16 of 24 images are there already" in capsys.readouterr().out
    (folder / "manifest.json").unlink()  # killed before the end
    (folder / "val-00000.arrow").write_bytes(before["val-00000.arrow"][:100])
    store_features(fresh)
    assert asked[5:] == ["val-00000.parquet"] and {f.name: f.read_bytes() for f in folder.glob("*.arrow")} == before


def test_what_differs_is_refused_with_the_reason_and_the_remedy(stored, student, tokenizer):
    model, other = of_a_stage(stored).model, "fp32" if stored.cluster.precision == "bf16" else "bf16"
    tower, layer = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        tower.model.vision_tower.embeddings.class_embedding[0] += 0.1
    layer.config.vision_feature_layer = -1
    family, _ = qwen(words(tokenizer), 32)
    for config, models, side, reason in [
        (stored, {"student": tower}, 32, "the vision tower.*is not the student's"),
        (stored, {"student": model, "teacher": tower}, 32, "the vision tower.*is not the teacher's"),
        (stored, {"student": layer}, 32, "the layer of it that is read"),
        (stored, {"student": model}, 64, "image_size 32 is not 64"),
        (changed(stored, [f"cluster.precision={other}"]), {"student": model}, 32, f"cluster.precision .* is not {other}"),
        (stored, {"student": model, "teacher": family}, 32, "the teacher's tower is not apart"),
        (changed(stored, [f"features={stored.run}/gone"]), {"student": model}, 32, "run jobs/features.py"),
    ]:
        with pytest.raises(ValueError, match=reason) as refused:
            check_features(config, models, side)
        assert "features=" in str(refused.value)
    with pytest.raises(ValueError, match=f"cluster.precision .* is not {other}"):
        store_features(changed(stored, [f"cluster.precision={other}"]))


def test_other_shards_are_refused_and_a_full_disk_too(fresh, monkeypatch):
    store_features(fresh)
    file = Path(fresh.data.shards) / "manifest.json"
    file.write_text(file.read_text().replace(load_manifest(fresh.data.shards)["splits"]["train"]["shards"][0]["sha256"], "other"))
    with pytest.raises(ValueError, match=r"train-00000.parquet differs.*features=ANOTHER FOLDER"):
        check_features(fresh, {"student": of_a_stage(fresh).model}, 32)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"needs .* GB, but 1e-06 GB are free"):
        store_features(changed(fresh, [f"features={fresh.data.shards}/none"]))


def test_no_image_is_decoded_and_one_that_cannot_be_is_set_aside_as_ever(fresh, monkeypatch):
    file = Path(fresh.data.shards) / "train-00000.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[1]["image"] = rows[1]["image"][:100]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file, row_group_size=4)
    store_features(fresh)
    (images, *_) = batches(fresh, False)
    monkeypatch.setattr(stream, "open_image", None)
    (found, *_) = batches(fresh, True)
    assert found.ids == images.ids == [row["id"] for row in (rows[0], *rows[2:4])]
    assert found.rejected == images.rejected and len(found.rejected) == 1
    model = of_a_stage(fresh)
    with torch.no_grad():
        expected = model.see(model.prepare(torch.from_numpy(images.pixels)))
    torch.testing.assert_close(to_tensor(found.features), expected, rtol=1e-5, atol=1e-6)


def test_break_even():
    times = {"decoding": 2.0, "tower": 10.0, "writing": 3.0, "reading": 2.0}
    assert break_even(times) == pytest.approx(1.5)
    assert break_even(times | {"reading": 12.0}) == float("inf")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], "student.model.init or student.model.tower"),
        (["student.model.tower=here", "student.train.augment=true"], "student.train.augment=false"),
        (["student.model.tower=here", "student.model.freeze_tower=false"], "freeze_tower=true"),
        (["student.model.tower=here", "teacher.model.freeze_tower=false"], "teacher.train trains it"),
    ],
)
def test_settings_that_cannot_have_features(overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        load(None, ["features=stored", *overrides])
    assert load(None, [*overrides]).features == ""
    tuned = ["student.model.freeze_tower=false", *(f"{t}.tuning=lora" for t in ("student.train", "distill.train"))]
    assert load(None, ["features=stored", "student.model.tower=here", *tuned, "distill.warm_start.tuning=lora"]).features


# Vision once: how often images are prepared, and towers run, in one step of both models


class Pair:
    """A step as train/loop.py makes it, with the calls of everything that looks at an image counted."""

    def __init__(self, teacher, student, forbidden, end, monkeypatch):
        self.teacher, self.student = (RowModel(copy.deepcopy(m)) for m in (teacher, student))
        self.student.align = nn.Linear(32, 48)
        self.towers = [Calls(m.model.model.vision_tower) for m in (self.teacher, self.student)]
        self.prepared: list[int] = []
        prepare = RowModel.prepare

        def counted(model: RowModel, images, blind: bool = False):
            self.prepared.append(len(images))
            return prepare(model, images, blind)

        monkeypatch.setattr(RowModel, "prepare", counted)
        self.distiller = Distiller(self.student, self.teacher, LossConfig(), forbidden, end, 12, shared_tower=True)

    def update(self, rows, seen) -> dict[str, torch.Tensor]:
        """Gradients after a rollout and two updates from it."""
        item = self.distiller.rollout(rows, seen, torch.Generator().manual_seed(0))
        for _ in range(2):
            self.distiller.on_policy_pass(self.student, item, len(item.batch.token), 48)[0].backward()
        return {name: p.grad for name, p in self.student.named_parameters() if p.grad is not None}


@pytest.fixture
def pair(teacher, student, forbidden, end, monkeypatch) -> Pair:
    return Pair(teacher, student, forbidden, end, monkeypatch)


@pytest.fixture
def images(pictures) -> torch.Tensor:
    return torch.from_numpy(np.stack([stream.square(picture, 32) for picture in pictures[:3]]))


def test_both_models_and_all_updates_of_a_rollout_see_each_image_once(pair, make_packer, questions, images):
    pair.update(make_packer(4).pack(questions[:3]), pair.student.prepare(images))
    assert pair.prepared == [3] and [tower.take() for tower in pair.towers] == [(0, 0), (1, 3)]


@pytest.mark.skipif(not hasattr(step, "Seen"), reason="step.Seen is what stored features are handed over as")
def test_with_stored_features_no_image_is_prepared_and_no_tower_runs(pair, make_packer, questions, images):
    rows = make_packer(4).pack(questions[:3])
    seen = pair.student.see(pair.student.prepare(images)).detach()
    expected = pair.update(rows, pair.student.prepare(images))
    pair.student.zero_grad()
    for tower in pair.towers:
        tower.take()
    pair.prepared.clear()
    found = pair.update(rows, step.Seen(to_tensor(to_array(seen))))
    assert pair.prepared == [] and [tower.take() for tower in pair.towers] == [(0, 0), (0, 0)]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
