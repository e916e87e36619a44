"""Copies of images: found whatever their format and size, told from other images, and kept out of training on request."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from geodistill.config import load
from geodistill.data.duplicates import Fingerprint, find_copies, fingerprint, summary
from geodistill.data.prepare import prepare
from geodistill.data.record import ImageRecord
from geodistill.data.shards import groups, read_group


def scene(seed: int) -> Image.Image:
    """Coarse random patches and lines: as different from each other as photographs are."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        ends, color = [tuple(p) for p in rng.integers(0, 96, (2, 2)).tolist()], tuple(rng.integers(0, 255, 3).tolist())
        draw.line(ends, fill=color, width=3)
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seen(split: str, name: str, data: bytes) -> Fingerprint:
    identity, sha, phash = fingerprint(ImageRecord(name, data, 96, 96, []))
    return Fingerprint(split, identity, sha, int(phash, 16))


def test_copies_are_found_and_others_are_not():
    images = [seen("train", f"other-{i}", encoded(scene(i))) for i in range(1, 200)]
    original = scene(0)
    brighter = original.point(lambda v: min(255, int(v * 1.1) + 5))
    images += [
        seen("test", "original", encoded(original)),
        seen("train", "same bytes", encoded(original)),
        seen("train", "jpeg", encoded(original, "JPEG", quality=60)),
        seen("val", "smaller", encoded(original.resize((60, 60), Image.Resampling.LANCZOS))),
        seen("unlabelled", "brighter", encoded(brighter)),
    ]
    copies = {copy.id: copy for copy in find_copies(images, 4)}
    assert set(copies) == {"same bytes", "jpeg", "smaller", "brighter"}
    assert all((copy.also_in, copy.also_as, copy.leaks) == ("test", "original", True) for copy in copies.values())
    assert copies["same bytes"].kind == "exact" and {copies[name].kind for name in ("jpeg", "smaller")} == {"perceptual"}
    assert all(0 <= copy.bits <= 4 for copy in copies.values())
    assert summary(list(copies.values())) == {
        "exact: train, also in test": 1,
        "perceptual: train, also in test": 1,
        "perceptual: unlabelled, also in test": 1,
        "perceptual: val, also in test": 1,
    }
    assert [copy.id for copy in find_copies(images, -1)] == ["same bytes"]


@pytest.mark.parametrize("bits", [0, 1, 4, 9])
def test_perceptual_search_equals_comparing_all_pairs(bits):
    rng = np.random.default_rng(bits)
    centres = rng.integers(0, 2**63, 30)
    hashes = []
    for i in range(400):  # families that differ in a few bits, and the same hash again
        flips = rng.choice(64, rng.integers(0, 7), replace=False)
        hashes.append(int(centres[i % 30]) ^ sum(1 << int(b) for b in flips))
    splits = rng.choice(["train", "val", "test", "unlabelled"], 400)
    images = [Fingerprint(str(s), f"{i:03d}", str(i), h) for i, (s, h) in enumerate(zip(splits, hashes, strict=True))]
    ordered = sorted(images, key=lambda f: (["test", "val", "train", "unlabelled"].index(f.split), f.id))
    expected = {}
    for later, image in enumerate(ordered):
        alike = [f for f in ordered[:later] if (f.phash ^ image.phash).bit_count() <= bits]
        if alike:
            expected[image.id] = (alike[0].id, (alike[0].phash ^ image.phash).bit_count())
    found = {copy.id: (copy.also_as, copy.bits) for copy in find_copies(images, bits)}
    assert found == expected and found


def test_a_copy_of_a_near_copy_leaks_too():
    jpeg = encoded(scene(0), "JPEG", quality=60)
    images = [seen("test", "original", encoded(scene(0))), seen("train", "one", jpeg), seen("train", "two", jpeg)]
    assert {copy.id: (copy.kind, copy.leaks) for copy in find_copies(images, 4)} == dict.fromkeys(
        ("one", "two"), ("perceptual", True)
    )
    assert {copy.id: (copy.kind, copy.leaks) for copy in find_copies(images[1:], 4)} == {"two": ("exact", False)}
    assert find_copies([], 4) == []


def test_what_leaks():
    same = {"sha256": "x", "phash": 0}
    pairs = {("train", "test"): True, ("val", "test"): True, ("unlabelled", "val"): True, ("train", "train"): False,
             ("unlabelled", "train"): False, ("test", "test"): False}  # fmt: skip
    for (split, also), leaks in pairs.items():
        (copy,) = find_copies([Fingerprint(split, "b", **same), Fingerprint(also, "a", **same)], 4)
        assert (copy.split, copy.also_in, copy.leaks) == (split, also, leaks)


def test_prepare_reports_and_removes_what_leaks(tmp_path, capsys):
    """Copies of test images under other names fall into every split; with remove, the test stays and no copy does."""
    folder = tmp_path / "raw" / "Pond"
    folder.mkdir(parents=True)
    for i in range(60):
        (folder / f"{i}.png").write_bytes(encoded(scene(i)))
        if i % 2:
            (folder / f"copy_{i}.jpg").write_bytes(encoded(scene(i), "JPEG", quality=80))
    common = ["data.source=class_folders", f"data.root={tmp_path / 'raw'}", "data.val_fraction=0.2", "data.test_fraction=0.4",
              "data.images_per_shard=8", "data.images_per_group=4", "data.vocabulary=500"]  # fmt: skip
    reported = prepare(load(None, [f"run={tmp_path / 'report'}", *common]), parallel=False)
    assert "left out of training" not in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "report" / "data" / "duplicates.parquet").to_pylist()
    assert len(rows) == 30 == sum(reported["duplicates"].values()) and reported["left_out"] == 0
    leaks = {row["id"] for row in rows if row["split"] != row["also_in"]}
    removed = prepare(load(None, [f"run={tmp_path / 'remove'}", *common, "data.duplicates=remove"]), parallel=False)
    assert removed["left_out"] == len(leaks) > 5
    assert f"left out of training and validation: {len(leaks)} images" in capsys.readouterr().out

    def ids(run: str, manifest: dict, split: str) -> list[str]:
        found = [r for g in groups(manifest, split) for r in read_group(tmp_path / run / "data", g)]
        assert len(found) == manifest["splits"][split]["images"]
        assert sum(len(r.conversations) for r in found) == manifest["splits"][split]["conversations"]
        return [r.id for r in found]

    for split in ("train", "val", "test"):
        before, after = ids("report", reported, split), ids("remove", removed, split)
        assert after == [name for name in before if name not in leaks] and (split != "test" or after == before)
    page = (tmp_path / "report" / "data" / "preview.html").read_text()
    assert "images are held out as well" in page and "data.duplicates=remove leaves them out" in page
    again = prepare(load(None, [f"run={tmp_path / 'remove'}", *common, "data.duplicates=remove"]), parallel=False)
    assert again == removed
    (tmp_path / "remove" / "data" / "manifest.json").unlink()  # killed before its end
    again = prepare(load(None, [f"run={tmp_path / 'remove'}", *common, "data.duplicates=remove"]), parallel=False)
    assert again["splits"] == removed["splits"]
