"""1,000 records of which 50 are corrupt in ten ways: each is set aside with its own reason, and not one is lost in silence."""

import io
import json
import re

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from geodistill.config import load
from geodistill.data.prepare import prepare
from geodistill.data.shards import groups, read_group

RECORDS, EVERY = 1000, 20
PNG = b""


def image(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def talk(record: str, question: str, answer: str | None) -> list[dict]:
    said = [{"from": "human", "value": f"<image>\n{question}"}]
    return said if answer is None else [*said, {"from": "gpt", "value": answer}]


# kind -> (field in rejected.parquet, reason)
KINDS = {
    "no pixels": ("image", "is empty (0 bytes)"),
    "truncated": ("image", "cannot be decoded"),
    "not an image": ("image", "cannot be decoded"),
    "file is gone": ("image", "does not exist below data.root"),
    "no image named": ("image", "is missing"),
    "silent": ("conversations", "is missing or empty"),
    "no answer": ("conversations[1]", "the last question has no answer"),
    "empty answer": ("conversations[1].value", "is empty"),
    "degenerate box": ("conversations[1].value", "x1 >= x2"),
    "box far outside": ("conversations[1].value", "far outside 0-100"),
}


def test_five_percent_corrupt(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    records, expected, good = [], {}, set()
    for i in range(RECORDS):
        name, data = f"{i:04d}.png", image(i)
        kind = list(KINDS)[i // EVERY % len(KINDS)] if i % EVERY == 0 else "good"
        said = {"silent": [], "no answer": talk(name, "What?", None), "empty answer": talk(name, "What?", " "),
                "degenerate box": talk(name, "[refer] the ship", "{<50><10><20><30>|<0>}"),
                "box far outside": talk(name, "[refer] the ship", "{<5><10><77><981>|<0>}")}  # fmt: skip
        record = {"id": f"r{i}", "image": name, "conversations": said.get(kind, talk(name, "What?", "water"))}
        if kind == "no image named":
            del record["image"]
        if kind != "file is gone":
            changed = {"no pixels": b"", "truncated": data[: len(data) // 2], "not an image": b"<html>404 not found</html>"}
            (raw / name).write_bytes(changed.get(kind, data))
        records.append(record)
        if kind == "good":
            good.add(name)
        else:  # what is wrong with a file is told of the file, what is wrong with a record of the record
            expected[name if kind in ("no pixels", "truncated", "not an image") else f"r{i}"] = KINDS[kind]
    (raw / "train.json").write_text(json.dumps(records))
    config = load(None, [f"run={tmp_path}", "data.source=llava", f"data.root={raw}", "data.annotations=train.json",
                         "data.images_per_shard=104", "data.duplicate_bits=-1", "data.vocabulary=400"])  # fmt: skip
    manifest = prepare(config, parallel=False)
    kept = [r.id for split in manifest["splits"] for g in groups(manifest, split) for r in read_group(config.data.shards, g)]
    assert len(kept) == len(good) == 950 and set(kept) == good
    rejected = {row["record"]: row for row in pq.read_table(tmp_path / "data" / "rejected.parquet").to_pylist()}
    assert len(rejected) == 50 == manifest["rejected"] and rejected.keys() == expected.keys()
    for name, (field, reason) in expected.items():
        row = rejected[name]
        assert row["field"] == field and reason in row["reason"], (name, row)
        assert row["file"] in (name, "train.json")
    said = capsys.readouterr().out
    assert "set aside: 50" in said
    counted = re.findall(r"^  (\d+) x ", said, re.MULTILINE)
    assert sum(map(int, counted)) == 50
