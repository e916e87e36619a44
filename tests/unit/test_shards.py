"""Shards: nothing lost, bad records set aside and counted, an interrupted run continued, a finished one recognised."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from geodistill.config import load
from geodistill.data import shards, synthetic
from geodistill.data.prepare import prepare
from geodistill.data.record import SCHEMA, validate
from geodistill.data.shards import Group, groups, load_manifest, read_group, write_shard
from geodistill.data.sources import open_source
from geodistill.models import assemble

SHARED = os.environ.get("GEODISTILL_SHARED")


@pytest.fixture(autouse=True)
def tokenizer_texts(monkeypatch):
    """The real tokenizer takes seconds to learn: note its texts instead."""
    seen = []

    class Noted:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

        def __len__(self):
            return 500

    def learn(texts, vocabulary, system):
        seen[:] = texts
        return Noted()

    monkeypatch.setattr(assemble, "new_tokenizer", learn)
    return seen


def settings(folder, *overrides: str):
    small = ["data.train=20", "data.unlabelled=3", "data.val=2", "data.test=5", "data.images_per_shard=8"]
    return load(None, [f"run={folder}", *small, "data.images_per_group=4", *overrides])


def class_folders(folder, *overrides: str):
    split = ["data.val_fraction=0", "data.test_fraction=0"]
    return settings(folder / "run", "data.source=class_folders", f"data.root={folder / 'raw'}", *split, *overrides)


def picture(kind: str = "PNG", size: int = 24) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def put(root, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def sums(manifest: dict) -> dict[str, str]:
    return {shard["file"]: shard["sha256"] for split in manifest["splits"].values() for shard in split["shards"]}


def read_all(config, manifest, split):
    return [record for group in groups(manifest, split) for record in read_group(config.data.shards, group)]


def test_round_trip(tmp_path, tokenizer_texts, capsys):
    config = settings(tmp_path)
    manifest = prepare(config, parallel=False)
    assert manifest == load_manifest(config.data.shards, ["train", "unlabelled", "val", "test"])
    assert not list((tmp_path / "data").glob("*.tmp"))
    assert (manifest["source"], manifest["rejected"], manifest["settings"]["train"]) == ("synthetic", 0, 20)
    for split in synthetic.SPLITS:
        expected = {r.id: r for r in synthetic.records(0, split, getattr(config.data, split))}
        found = read_all(config, manifest, split)
        assert {record.id: record for record in found} == expected
        part = manifest["splits"][split]
        conversations = [c for record in found for c in record.conversations]
        assert part["images"] == len(found) and part["conversations"] == len(conversations) == sum(part["tasks"].values())
        assert part["tasks"]["vqa"] == sum(c.task == "vqa" for c in conversations)
    assert [record.id for record in read_all(config, manifest, "train")] != [f"train-{i:06d}" for i in range(20)]
    assert groups(manifest, "train")[-1] == Group("train-00002.parquet", 0, 4)
    assert [g.images for g in groups(manifest, "test")] == [4, 1] and groups(manifest, "nothing") == []
    file = pq.ParquetFile(tmp_path / "data" / "train-00000.parquet")
    assert file.schema_arrow.equals(SCHEMA) and [file.metadata.row_group(i).num_rows for i in range(2)] == [4, 4]
    said = [t for split in ("train", "unlabelled") for r in synthetic.records(0, split, 20 if split == "train" else 3)
            for c in r.conversations for turn in c.turns for t in turn if t is not None]  # fmt: skip
    assert sorted(tokenizer_texts) == sorted(said)
    out = capsys.readouterr().out
    assert "train-00000.parquet: 8 images, shard 1 of 6, " in out and "images/s, about" in out
    assert "train: 20 images" in out and "scene_classification 20" in out


def test_finished_shards_are_recognised(tmp_path, capsys):
    manifest = prepare(settings(tmp_path), parallel=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    assert prepare(settings(tmp_path, "data.max_rejected=0.5"), parallel=False) == manifest
    assert "shards are there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == before
    with pytest.raises(ValueError, match=r"data.train=20, but now data.train=21: choose another run= or data.shards=, or delete"):
        prepare(settings(tmp_path, "data.train=21"), parallel=False)
    with pytest.raises(ValueError, match=r"made with system=.A chat.*now system='Hello'"):
        prepare(settings(tmp_path, "system=Hello"), parallel=False)
    (tmp_path / "data" / "val-00000.parquet").unlink()
    assert prepare(settings(tmp_path), parallel=False) == manifest


def test_a_shard_that_was_cut_short_is_made_again_and_the_set_is_not_whole_until_then(tmp_path, monkeypatch):
    whole = prepare(settings(tmp_path), parallel=False)
    shard = tmp_path / "data" / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    make = synthetic.make_record

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "make_record", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings(tmp_path), parallel=False)
    assert not (tmp_path / "data" / "manifest.json").exists()
    monkeypatch.setattr(synthetic, "make_record", make)
    assert prepare(settings(tmp_path), parallel=False)["splits"] == whole["splits"]


def test_interrupted_run_goes_on(tmp_path, capsys, monkeypatch):
    whole = prepare(settings(tmp_path / "whole"), parallel=False)
    make, left = synthetic.make_record, [12]

    def killed(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return make(*arguments)

    monkeypatch.setattr(synthetic, "make_record", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings(tmp_path / "run"), parallel=False)
    monkeypatch.setattr(synthetic, "make_record", make)
    folder = tmp_path / "run" / "data"
    assert not (folder / "manifest.json").exists() and not (folder / "train-00001.parquet").exists()
    with pytest.raises(ValueError, match=r"manifest.json does not exist: run jobs/prepare.py"):
        load_manifest(folder)
    capsys.readouterr()
    kept = (folder / "train-00000.parquet").stat().st_mtime_ns
    resumed = prepare(settings(tmp_path / "run"), parallel=False)
    assert sums(resumed) == sums(whole) and (folder / "train-00000.parquet").stat().st_mtime_ns == kept
    out = capsys.readouterr().out
    assert out.count("kept from an earlier run") == 1 and "train-00001.parquet: 8 images, shard 2 of 6, " in out


def test_damaged_or_other_shards_are_made_again(tmp_path, capsys):
    whole = prepare(settings(tmp_path), parallel=False)
    folder = tmp_path / "data"
    (folder / "manifest.json").unlink()
    (folder / "train-00000.parquet").write_bytes(b"damaged")
    capsys.readouterr()
    assert sums(prepare(settings(tmp_path), parallel=False)) == sums(whole)
    assert capsys.readouterr().out.count("kept from an earlier run") == 5
    (folder / "manifest.json").unlink()
    assert sums(prepare(settings(tmp_path, "data.seed=1"), parallel=False)) != sums(whole)
    assert "kept from an earlier run" not in capsys.readouterr().out


def test_bad_images_are_set_aside_and_counted(tmp_path, capsys):
    truncated = picture("PNG", 64)
    bad = {
        "corrupt.jpg": b"\xff\xd8\xff\xe0" + bytes(50),
        "truncated.png": truncated[: len(truncated) // 2],
        "empty.tif": b"",
    }
    good = {
        f"{i}.{kind}": picture({"jpg": "JPEG", "tif": "TIFF", "png": "PNG"}[kind]) for i in range(7) for kind in ("jpg", "tif")
    }
    put(tmp_path / "raw" / "Sea_Lake", bad | good)
    notes = [{"image": "Sea_Lake/gone.jpg", "captions": ["x"], "questions": []}]
    put(tmp_path / "raw", {"notes.json": json.dumps(notes).encode()})
    with pytest.raises(
        ValueError, match=r"4 of 18 records were set aside, over data.max_rejected=0.1; most often .*rejected.parq"
    ):
        prepare(class_folders(tmp_path, "data.annotations=notes.json"), parallel=False)
    capsys.readouterr()
    config = class_folders(tmp_path, "data.annotations=notes.json", "data.max_rejected=0.3")
    manifest = prepare(config, parallel=False)
    out = capsys.readouterr().out
    assert out.count("kept from an earlier run") == 3 and "set aside: 4" in out and "1 x image: is empty" in out
    assert manifest["rejected"] == 4 and manifest["splits"]["train"]["images"] == 14
    assert {r.id for r in read_all(config, manifest, "train")} == {f"Sea_Lake/{name}" for name in good}
    rejected = pq.read_table(tmp_path / "run" / "data" / "rejected.parquet").to_pylist()
    assert {(row["record"], row["field"]) for row in rejected} == {(f"Sea_Lake/{n}", "image") for n in [*bad, "gone.jpg"]}
    assert {row["record"]: row["file"] for row in rejected}["Sea_Lake/gone.jpg"] == "notes.json"
    # a mended image is read again, although the shard's other items are the same
    (tmp_path / "run" / "data" / "manifest.json").unlink()
    put(tmp_path / "raw" / "Sea_Lake", {"empty.tif": picture("TIFF")})
    assert prepare(config, parallel=False)["rejected"] == 3


def test_bad_records_weigh_as_many_raw_records_as_they_are(tmp_path):
    put(tmp_path / "raw", {"a.png": picture(), "b.png": b""})
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "water"}]
    box = [{"from": "human", "value": "<image>\n[refer] x"}, {"from": "gpt", "value": "{<9><1><2><3>|<0>}"}]
    records = [{"id": f"{image}{i}", "image": f"{image}.png", "conversations": said} for image in "ab" for i in range(5)]
    records.append({"id": "box", "image": "a.png", "conversations": box})
    put(tmp_path / "raw", {"all.json": json.dumps(records).encode()})
    llava = ["data.source=llava", "data.annotations=all.json"]
    with pytest.raises(ValueError, match="6 of 11 records were set aside"):
        prepare(class_folders(tmp_path, *llava), parallel=False)
    manifest = prepare(class_folders(tmp_path, *llava, "data.max_rejected=0.6"), parallel=False)
    assert manifest["splits"]["train"]["conversations"] == 5 and manifest["rejected"] == 2


def test_one_record_never_stops_the_others(tmp_path, monkeypatch):
    config = settings(tmp_path)
    source = open_source(config.data)
    make = type(source).make
    errors = iter([OSError("disk gone"), KeyError("box"), TypeError("no text"), ValueError("odd")])

    def sometimes(self, item):
        if item.ref["index"] % 2:
            raise next(errors)
        return make(self, item)

    monkeypatch.setattr(type(source), "make", sometimes)
    info = write_shard(source, source.items()[:8], tmp_path, "s.parquet", 3)
    assert (info["images"], info["groups"], info["lost"]) == (4, [3, 1], 4)
    assert [bad["record"] for bad in info["rejected"]] == [f"train-{i:06d}" for i in (1, 3, 5, 7)]
    assert info["rejected"][0]["reason"] == "cannot be made (OSError: disk gone)"
    assert [r.id for r in read_group(tmp_path, Group("s.parquet", 1, 1))] == ["train-000006"]


def test_box_that_training_cannot_use_is_set_aside(tmp_path, monkeypatch):
    config = settings(tmp_path)
    source = open_source(config.data)
    item = source.items()[0]
    (record,) = source.make(item)
    record.conversations[2].turns[0] = (record.conversations[2].turns[0][0], "{<60><1><20><30>|<0>}")
    monkeypatch.setattr(source, "make", lambda item: iter([record]))
    (bad,) = write_shard(source, [item], tmp_path, "s.parquet", 3)["rejected"]
    assert bad["field"] == "conversations[2].turns[0].answer" and "x1 >= x2" in bad["reason"]


def test_split_without_an_image_is_refused(tmp_path):
    put(tmp_path / "raw" / "Bay", {"a.png": picture()})
    with pytest.raises(ValueError, match=r"no image is left in split 'test': add images or raise data.test_fraction"):
        prepare(class_folders(tmp_path, "data.test_fraction=0.0001"), parallel=False)
    with pytest.raises(ValueError, match=r"no image is left in split 'train': raise data.train"):
        prepare(settings(tmp_path, "data.train=0"), parallel=False)
    put(tmp_path / "raw" / "Bay", {"a.png": b""})
    with pytest.raises(ValueError, match=r"no image is left in split 'train': add images or lower"):
        prepare(class_folders(tmp_path, "data.max_rejected=1"), parallel=False)
    with pytest.raises(ValueError, match=r"data.root=.*gone is not a folder"):
        prepare(class_folders(tmp_path, f"data.root={tmp_path}/gone"), parallel=False)


def test_splits_are_disjoint_and_keep_or_hide_answers(tmp_path):
    put(tmp_path / "raw" / "Bay", {f"{i}.png": picture(size=4) for i in range(80)})
    config = class_folders(tmp_path, "data.val_fraction=0.2", "data.test_fraction=0.2", "data.unlabelled_fraction=0.5")
    manifest = prepare(config, parallel=False)
    found = {split: read_all(config, manifest, split) for split in synthetic.SPLITS}
    names = [record.id for records in found.values() for record in records]
    assert len(names) == len(set(names)) == 80 and all(found.values())
    for split, records in found.items():
        assert all((r.conversations[0].turns[0][1] is None) == (split == "unlabelled") for r in records)


def test_manifest_that_cannot_be_used(tmp_path):
    config = settings(tmp_path, "data.unlabelled=0")
    manifest = prepare(config, parallel=False)
    with pytest.raises(ValueError, match=r"no image in split 'unlabelled' .they have train, val, test.: raise data.unlabelled"):
        load_manifest(config.data.shards, ["train", "unlabelled"])
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 0}))
    with pytest.raises(ValueError, match=r"has schema version 0, this program reads 1: run jobs/prepare.py again"):
        load_manifest(config.data.shards)
    with pytest.raises(ValueError, match="does not exist"):
        load_manifest(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(not SHARED, reason="GEODISTILL_SHARED is not set: the folder with aid150/ and textrs_aid.json")
def test_real_aid(tmp_path):
    config = load(
        None,
        [
            f"run={tmp_path}",
            "data.source=class_folders",
            f"data.root={SHARED}/aid150",
            f"data.annotations={SHARED}/textrs_aid.json",
        ],
    )
    source = open_source(config.data)
    items = [item for item in source.items() if item.split == "test" and "captions" in item.ref]
    info = write_shard(source, items, tmp_path, "test-00000.parquet", 8)
    assert info["images"] == len(items) == info["tasks"]["captioning"] and not info["rejected"]
    records = read_group(tmp_path, Group("test-00000.parquet", 0, 8))
    assert all(len(c.references) == 5 for r in records for c in validate(r).conversations if c.task == "captioning")
    assert shards.groups({"splits": {"test": {"shards": [info]}}}, "test")[0].images == 8
