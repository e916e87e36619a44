"""Raw data sets in their original layouts -> ImageRecords; what is bad is set aside with its field and reason."""

import io
import json
import os
import pickle
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from geodistill.config import SOURCE_NAMES, DataConfig
from geodistill.data.record import BadRecord, validate
from geodistill.data.sources import SOURCES, open_source
from geodistill.data.sources.base import split_of
from geodistill.data.sources.class_folders import class_name
from geodistill.data.sources.llava import guess_task
from geodistill.language import SHORT_ANSWER

SHARED = os.environ.get("GEODISTILL_SHARED")
ALL_TRAIN = {"val_fraction": 0.0, "test_fraction": 0.0}


def picture(kind: str = "PNG", size: tuple[int, int] = (20, 12), seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def put(root, files: dict[str, bytes]):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def folders(root, annotations=None, **settings) -> DataConfig:
    if annotations is not None:
        put(root, {"notes.json": json.dumps(annotations).encode()})
        settings["annotations"] = "notes.json"
    return replace(DataConfig(source="class_folders", root=str(root), **ALL_TRAIN), **settings)


def llava(root, records, **settings) -> DataConfig:
    put(root, {"train.json": json.dumps(records).encode()})
    return replace(DataConfig(source="llava", root=str(root), annotations="train.json", **ALL_TRAIN), **settings)


def talk(*texts: str, image: str | None = "a.png", record: str = "r1") -> dict:
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": record, "conversations": said} | ({"image": image} if image is not None else {})


def make_all(data: DataConfig):
    """(records by id, {record: (field, reason)} of what is set aside)."""
    source, good, bad = open_source(data), {}, {}
    for item in pickle.loads(pickle.dumps(source.items())):
        json.dumps(item.ref)
        try:
            for found in source.make(item):
                if isinstance(found, BadRecord):
                    bad[f"{found.record} {found.field}"] = (found.field, found.reason)
                else:
                    good[found.id] = validate(found)
        except BadRecord as error:
            bad[error.record] = (error.field, error.reason)
    return good, bad


def test_synthetic():
    data = DataConfig(train=3, unlabelled=2, val=1, test=2, seed=5)
    good, bad = make_all(data)
    assert list(good) == [f"train-{i:06d}" for i in range(3)] + ["unlabelled-000000", "unlabelled-000001", "val-000000"] + [
        "test-000000",
        "test-000001",
    ]
    assert not bad and good["unlabelled-000000"].conversations[0].turns[0][1] is None


@pytest.mark.parametrize(
    "folder, name",
    [
        ("SparseResidential", "sparse residential"),
        ("baseball_diamond", "baseball diamond"),
        ("AnnualCrop", "annual crop"),
        ("mobilehomepark", "mobilehomepark"),
        ("SeaLake", "sea lake"),
    ],
)
def test_class_name(folder, name):
    assert class_name(folder) == name


def test_class_folders_reads_the_original_layouts(tmp_path):
    root = put(
        tmp_path,
        {
            "SparseResidential/sparseresidential_1.jpg": picture("JPEG"),
            "agricultural/agricultural00.tif": picture("TIFF"),
            "baseball_diamond/baseball_diamond_001.JPG": picture("JPEG"),
            "Forest/Forest_1.png": picture(),
            "Forest/notes.txt": b"not an image",
            ".cache/x.png": picture(),
            "README.md": b"text",
        },
    )
    good, bad = make_all(folders(root))
    assert not bad
    answers = {name: record.conversations[0].turns for name, record in good.items()}
    ask = f"What is the class of this scene? {SHORT_ANSWER}"
    assert answers == {
        "Forest/Forest_1.png": [(ask, "forest")],
        "SparseResidential/sparseresidential_1.jpg": [(ask, "sparse residential")],
        "agricultural/agricultural00.tif": [(ask, "agricultural")],
        "baseball_diamond/baseball_diamond_001.JPG": [(ask, "baseball diamond")],
    }
    record = good["agricultural/agricultural00.tif"]
    assert (record.width, record.height, record.sensor) == (20, 12, "optical")


ENTRY = {
    "image": "Pond/p1.jpg",
    "captions": ["A  pond .", "Water\nand trees"],
    "questions": [{"question": "is there  water?", "answer": "yes", "type": "presence"}],
}


@pytest.mark.parametrize(
    "split, settings, captions",
    [
        ("train", ALL_TRAIN, [("A pond .", []), ("Water and trees", [])]),
        ("val", {"val_fraction": 0.99999, "test_fraction": 0.0}, [("A pond .", []), ("Water and trees", [])]),
        ("test", {"val_fraction": 0.0, "test_fraction": 0.99999}, [("A pond .", ["A pond .", "Water and trees"])]),
        ("unlabelled", {**ALL_TRAIN, "unlabelled_fraction": 1.0}, [(None, [])]),
    ],
)
def test_captions_and_questions(tmp_path, split, settings, captions):
    put(tmp_path, {"Pond/p1.jpg": picture("JPEG")})
    data = folders(tmp_path, [ENTRY], **settings)
    assert [item.split for item in open_source(data).items()] == [split]
    found = make_all(data)[0]["Pond/p1.jpg"].conversations
    assert [(c.turns[0][1], c.references) for c in found if c.task == "captioning"] == captions
    (asked,) = [c for c in found if c.task == "vqa"]
    assert asked.turns == [(f"is there water? {SHORT_ANSWER}", None if split == "unlabelled" else "yes")]
    assert asked.category == "presence"


def test_bad_annotations_are_set_aside_and_the_image_stays(tmp_path):
    put(tmp_path, {"Pond/p1.jpg": picture("JPEG"), "Pond/p2.jpg": picture("JPEG")})
    entries = [
        ENTRY,
        {"image": "Pond/gone.jpg", "captions": ["x"], "questions": []},
        {"captions": ["no image"]},
        "nonsense",
        {"image": "Pond/p2.jpg", "captions": "one text", "questions": [{"question": "what?", "answer": ""}, 7]},
    ]
    items = open_source(folders(tmp_path, entries)).items()
    rejected = [(item.id, item.ref["field"], item.ref["reason"]) for item in items if "reason" in item.ref]
    assert rejected == [
        ("Pond/gone.jpg", "image", "does not exist below data.root"),
        ("[2]", "image", "is missing"),
        ("[3]", "image", "is missing"),
        ("Pond/p2.jpg", "captions", "is not a list"),
        ("Pond/p2.jpg", "questions[0].answer", "is empty"),
        ("Pond/p2.jpg", "questions[1].question", "is empty"),
    ]
    assert all(item.ref["file"].endswith("notes.json") for item in items if "reason" in item.ref)
    good, _ = make_all(folders(tmp_path))
    assert sorted(good) == ["Pond/p1.jpg", "Pond/p2.jpg"]


def test_unreadable_images_are_set_aside(tmp_path):
    truncated = picture("PNG", (64, 64))
    put(
        tmp_path,
        {
            "Bay/corrupt.jpg": b"\xff\xd8\xff\xe0" + bytes(100),
            "Bay/truncated.png": truncated[: len(truncated) // 2],
            "Bay/empty.tif": b"",
            "Bay/text.jpg": b"this is no image",
            "Bay/good.jpg": picture("JPEG"),
        },
    )
    (tmp_path / "Bay/link.png").symlink_to(tmp_path / "nowhere.png")
    good, bad = make_all(folders(tmp_path))
    assert list(good) == ["Bay/good.jpg"]
    assert {field for field, _ in bad.values()} == {"image"}
    reasons = {name: reason for name, (_, reason) in bad.items()}
    assert reasons.pop("Bay/empty.tif") == "is empty (0 bytes)"
    assert reasons.pop("Bay/link.png") == "cannot be read (No such file or directory)"
    assert len(reasons) == 3 and all(reason.startswith("cannot be decoded") for reason in reasons.values())


@pytest.mark.parametrize(
    "question, exchanges, task",
    [
        ("[refer] where is <p>the ship</p>?", 1, "grounding"),
        ("[grounding] describe the image in detail", 1, "grounded_captioning"),
        ("[identify] what is {<1><2><3><4>|<0>}", 3, "region_captioning"),
        (f"How many ships are there? {SHORT_ANSWER}", 1, "vqa"),
        (f"Is there glass? {SHORT_ANSWER}", 1, "vqa"),
        (f"Classify the image within the given classes: a, b. {SHORT_ANSWER}", 1, "scene_classification"),
        ("What class is it?\nAnswer with one word or short phrase.", 1, "scene_classification"),
        ("What is in the image?", 2, "conversation"),
        ("Describe the image in detail.", 1, "captioning"),
        ("Why is the harbor empty?", 1, "complex_question"),
    ],
)
def test_task_is_guessed_from_the_conventions(question, exchanges, task):
    assert guess_task(question, exchanges)[0] == task


def test_llava_joins_records_of_one_image(tmp_path):
    put(tmp_path, {"a.png": picture()})
    box = "{<10><20><30><40>|<90>}"
    records = [
        talk("<image>\nDescribe the image.", "a pond", record="1"),
        talk("<image>\n[refer] where is <p>the pond</p>?", box, "And the tree?", "left", record="2"),
        talk("What is it?\n<image>", "none", record="3", image="./a.png"),
    ]
    data = llava(tmp_path, records)
    (item,) = open_source(data).items()
    assert item.records == 3
    good, bad = make_all(data)
    assert not bad
    found = [(c.task, c.category, c.turns) for c in good["a.png"].conversations]
    assert found == [
        ("captioning", "", [("Describe the image.", "a pond")]),
        ("grounding", "refer", [("[refer] where is <p>the pond</p>?", box), ("And the tree?", "left")]),
        ("complex_question", "", [("What is it?", "none")]),
    ]
    hidden = make_all(replace(data, unlabelled_fraction=1.0))[0]["a.png"]
    assert [c.turns for c in hidden.conversations] == [[(c.turns[0][0], None)] for c in good["a.png"].conversations]


def test_llava_sets_bad_records_aside_with_their_field(tmp_path):
    put(tmp_path, {"a.png": picture()})
    wrong_order = talk("<image>\nq", "a")
    wrong_order["conversations"].reverse()
    records = {
        "good": talk("<image>\nWhat?", "water"),
        "no image": talk("What?", "water", image=None),
        "gone": talk("<image>\nWhat?", "water", image="gone.png"),
        "order": wrong_order,
        "no answer": talk("<image>\nWhat?"),
        "empty answer": talk("<image>\nWhat?", " "),
        "silent": {"image": "a.png", "conversations": []},
        "box": talk("<image>\n[refer] the ship", "{<50><10><20><30>|<0>}"),
        "far": talk("<image>\n[refer] the ship", "{<5><10><77><981>|<0>}"),
        "none": talk("<image>\n[refer] the ship", "None."),
        "no box": talk("<image>\n[grounding] describe", "a ship"),
        "two images": talk("<image>\nWhat?", "water", "<image>\nand here?", "sand"),
    }
    good, bad = make_all(llava(tmp_path, [{**record, "id": name} for name, record in records.items()]))
    assert list(good) == ["a.png"] and len(good["a.png"].conversations) == 1
    assert {name: field for name, (field, _) in bad.items()} == {
        "no image": "image",
        "gone": "image",
        "order": "conversations[0].from",
        "no answer": "conversations[1]",
        "empty answer": "conversations[1].value",
        "silent": "conversations",
        "box": "conversations[1].value",
        "far": "conversations[1].value",
        "none": "conversations[1].value",
        "no box": "conversations[1].value",
        "two images": "conversations[2].value",
    }
    assert "x1 >= x2" in bad["box"][1] and "far outside" in bad["far"][1] and "'gone.png' does not exist" in bad["gone"][1]


def test_a_later_turn_may_ask_for_something_else(tmp_path, make_packer):
    """Each question is scored as what it asks; a later one whose answer holds no box is set aside like a first one."""
    box = "{<10><10><20><20>|<0>}"
    asked = (
        "<image>\n[identify] what is at {<1><1><9><9>}?",
        "1 ship",
        "[refer] where is <p>the plane</p>?",
        box,
        "And why?",
        "x",
    )
    wrong = ("<image>\nWhat?", "water", "[refer] where is <p>the plane</p>?", "there")
    put(tmp_path, {"a.png": picture(), "b.png": picture()})
    good, bad = make_all(llava(tmp_path, [talk(*asked), talk(*wrong, image="b.png", record="r2")]))
    questions = make_packer(4).questions("a.png", good["a.png"].conversations)
    assert [(q.task, q.category) for q in questions] == [
        ("region_captioning", "identify"), ("grounding", "refer"), ("conversation", ""),
    ]  # fmt: skip
    assert bad["r2"] == ("conversations[3].value", "holds no box, which [refer] asks for")


def test_llava_looks_images_up_by_stem(tmp_path):
    names = ["share/images/P1.png", "P2.tif", "part1/P3.png", "part2/P3.png", "P4.jpg", "P4.png"]
    put(tmp_path, {f"{name}": picture("TIFF" if name.endswith("tif") else "PNG") for name in names})
    asked = ["P1.jpg", "old/prefix/P2.png", "x/part2/P3.jpg", "P3.jpg", "P4.png", "../P4.gif"]
    records = [talk("<image>\nWhat?", "water", image=image, record=image) for image in asked]
    good, bad = make_all(llava(tmp_path, records))
    assert sorted(good) == ["P2.tif", "P4.png", "part2/P3.png", "share/images/P1.png"]
    assert bad["P3.jpg"] == ("image", "'P3.jpg' may be 'part1/P3.png' or 'part2/P3.png'")
    assert "may be" in bad["../P4.gif"][1]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"root": "nowhere"}, "data.root=.*nowhere is not a folder; set data.root"),
        ({"root": "empty"}, "no image found as data.root=.*<Class>/<image>.*set data.root"),
        ({"annotations": "gone.json"}, "data.annotations=gone.json: .*gone.json does not exist; give a path"),
        ({"annotations": "broken.json"}, "broken.json is not JSON .*line 1.*get the file again"),
        ({"annotations": "empty.json"}, "empty.json must hold a JSON list with at least one record"),
    ],
)
@pytest.mark.parametrize("source", ["class_folders", "llava"])
def test_nothing_to_read_is_refused_before_any_work(tmp_path, source, settings, message):
    put(tmp_path / "set", {"Bay/a.png": picture(), "broken.json": b"[{", "empty.json": b"[]", "good.json": b"[{}]"})
    (tmp_path / "empty").mkdir()
    put(tmp_path / "empty", {"good.json": json.dumps([talk("<image>\nWhat?", "water")]).encode()})
    settings = {"root": "set", "annotations": "good.json"} | settings
    settings["root"] = str(tmp_path / settings["root"])
    if source == "llava" and settings["root"].endswith("empty"):
        message = "none of the 1 records of data.annotations=good.json can be used with the 0 images below data.root="
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(source=source, **settings)).items()


def test_split_is_a_stable_hash_of_seed_and_image():
    data = DataConfig(val_fraction=0.1, test_fraction=0.2, unlabelled_fraction=0.5)
    names = [f"Class{i % 10}/{i}.jpg" for i in range(4000)]
    splits = {name: split_of(data, name) for name in names}
    shares = {split: count / 4000 for split, count in Counter(splits.values()).items()}
    assert shares == pytest.approx({"train": 0.35, "unlabelled": 0.35, "val": 0.1, "test": 0.2}, abs=0.03)
    hidden_none = {name: split_of(replace(data, unlabelled_fraction=0.0), name) for name in names}
    assert all(hidden_none[name] == ("train" if split == "unlabelled" else split) for name, split in splits.items())
    assert splits != {name: split_of(replace(data, seed=1), name) for name in names}


@pytest.mark.skipif(not SHARED, reason="GEODISTILL_SHARED is not set: the folder with aid150/ and textrs_aid.json")
def test_real_aid():
    data = DataConfig(source="class_folders", root=f"{SHARED}/aid150", annotations=f"{SHARED}/textrs_aid.json")
    source = open_source(data)
    items = source.items()
    assert len(items) == 3119 and not any("reason" in item.ref for item in items)
    per_class = defaultdict(Counter)
    for item in items:
        per_class[item.ref["class"]][item.split] += 1
    assert len(per_class) == 30 and "sparse residential" in per_class
    assert all(0.05 < splits["test"] / splits.total() < 0.4 for splits in per_class.values())
    assert sum(len(item.ref.get("questions", [])) for item in items) == 482
    for item in items[::60]:
        assert validate(next(iter(source.make(item)))).width == 150


def test_registry():
    assert list(SOURCES) == list(SOURCE_NAMES)
