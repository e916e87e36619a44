"""Every data set in its published layout: folders, file names and fields as its authors give them -> records, splits, reasons."""

import io
import json
import pickle
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.crs import CRS
from shapely import Polygon, box

from geodistill.config import DataConfig
from geodistill.data.imagery import displayable, stretch
from geodistill.data.shards import write_shard
from geodistill.data.sources import open_source
from geodistill.data.sources.detection import tiles
from geodistill.language import SHORT_ANSWER, box_corners, parse_boxes

from .test_sources import make_all, picture, put

ALL_TRAIN = {"val_fraction": 0.0, "test_fraction": 0.0}


def tree(root, *images: str, **files):
    """Write images of 100 x 100 pixels, and files of bytes, text or JSON by their names."""
    suffixes = {".jpg": "JPEG", ".tif": "TIFF"}
    put(root, {name: picture(suffixes.get(name[-4:].lower(), "PNG"), (100, 100)) for name in images})
    for name, content in files.items():
        raw = (
            content
            if isinstance(content, bytes)
            else content.encode()
            if isinstance(content, str)
            else json.dumps(content).encode()
        )
        put(root, {name: raw})
    return root


def read(source: str, root, **settings):
    """(splits by id, records by id, what is set aside as {record: {field: reason}})."""
    data = DataConfig(**{"source": source, "root": str(root), **ALL_TRAIN, **settings})
    splits = {item.id: item.split for item in open_source(data).items() if "reason" not in item.ref}
    good, bad = make_all(data)
    aside: dict[str, dict[str, str]] = defaultdict(dict)
    for record, (field, reason) in bad.items():
        aside[record.removesuffix(f" {field}")][field] = reason
    return splits, good, dict(aside)


def turns(record, task: str) -> list[tuple]:
    return [c.turns[0] for c in record.conversations if c.task == task]


def detected(record) -> dict[str, list[tuple]]:
    """Kind -> its boxes in percent, of the detection questions."""
    found = [(c.category, parse_boxes(c.turns[0][1])) for c in record.conversations if c.task == "detection"]
    return {kind: [(b.x1, b.y1, b.x2, b.y2, b.theta) for b in boxes] for kind, boxes in found}


# --- scenes and captions


@pytest.mark.parametrize(
    ("above", "images", "answers"),
    [
        ("UCMerced_LandUse/Images/", ["agricultural/agricultural00.tif", "mobilehomepark/mobilehomepark07.tif"],
         ["agricultural", "mobilehomepark"]),
        ("NWPU-RESISC45/", ["baseball_diamond/baseball_diamond_001.jpg", "lake/lake_700.jpg"], ["baseball diamond", "lake"]),
        ("EuroSAT/2750/", ["AnnualCrop/AnnualCrop_1.jpg", "SeaLake/SeaLake_2.jpg"], ["annual crop", "sea lake"]),
    ],
)  # fmt: skip
def test_class_folders_below_the_folder_of_the_archive(tmp_path, above, images, answers):
    tree(tmp_path, *(above + image for image in images))
    splits, good, aside = read("class_folders", tmp_path, val_fraction=0.4, test_fraction=0.3)
    inner, same, _ = read("class_folders", tmp_path / above, val_fraction=0.4, test_fraction=0.3)
    assert [turns(good[image], "scene_classification")[0][1] for image in images] == answers and not aside
    assert splits == inner and list(same) == images  # the same ids and splits wherever data.root points


def test_class_folders_that_are_no_one_set_are_named(tmp_path):
    tree(tmp_path, "EuroSAT/Forest/a.jpg", "AID/Pond/b.jpg")
    with pytest.raises(
        ValueError, match=r"more than one folder of classes \(AID/<Class>, EuroSAT/<Class>\); set data.root to one"
    ):
        open_source(DataConfig(source="class_folders", root=str(tmp_path))).items()
    tree(tmp_path / "set", "Pond/a.jpg", "Pond/old/b.jpg", "overview.png")
    splits, _, aside = read("class_folders", tmp_path / "set")
    assert list(splits) == ["Pond/a.jpg"] and sorted(aside) == ["Pond/old/b.jpg", "overview.png"]
    assert aside["overview.png"]["image"].startswith("does not lie as <Class>/<image>")


def test_captions_of_rsicd(tmp_path):
    sentences = [{"tokens": ["a"], "raw": "Many planes are parked .", "imgid": 0, "sentid": i} for i in range(2)]
    sentences[1]["raw"] = "An  airport ."
    entries = [{"filename": f"airport_{i}.jpg", "imgid": i, "sentids": [0, 1], "sentences": sentences, "split": split}
               for i, split in enumerate(("train", "restval", "val", "test"))]  # fmt: skip
    broken = [
        {"filename": "a.jpg", "split": "train", "sentences": None},
        {"filename": "b.jpg", "split": "dev", "sentences": sentences},
    ]
    broken += [{"filename": "gone.jpg", "split": "val", "sentences": sentences}, 7]
    files = {"dataset_rsicd.json": {"images": entries + broken, "dataset": "rsicd"}}
    tree(tmp_path, *(f"RSICD_images/airport_{i}.jpg" for i in range(4)), **files)
    splits, good, aside = read("captions", tmp_path)
    assert splits == {"airport_0.jpg": "train", "airport_1.jpg": "train", "airport_2.jpg": "val", "airport_3.jpg": "test"}
    texts = ["Many planes are parked .", "An airport ."]
    assert [a for _, a in turns(good["airport_1.jpg"], "captioning")] == texts
    (test,) = good["airport_3.jpg"].conversations
    assert test.turns[0][1] == texts[0] and test.references == texts
    assert {name: list(fields) for name, fields in aside.items()} == {
        "a.jpg": ["sentences"], "b.jpg": ["split"], "gone.jpg": ["filename"], "images[7]": ["filename"]}  # fmt: skip
    elsewhere = tmp_path.parent / f"{tmp_path.name}.json"
    elsewhere.write_bytes((tmp_path / "dataset_rsicd.json").read_bytes())
    assert read("captions", tmp_path, annotations=str(elsewhere))[0] == splits


# --- visual question answering


def rsvqa(questions: list[tuple], images: list[int], inactive: tuple[int, ...] = ()) -> dict[str, dict]:
    """The three JSON files of a split. questions: (id, image, type, question, answer); ids of other splits are inactive stubs."""
    stub = [{"id": i, "active": False} for i in inactive]
    asked = [{"id": i, "img_id": image, "people_id": 0, "type": kind, "question": text, "answers_ids": [i + 100], "active": True}
             for i, image, kind, text, _ in questions]  # fmt: skip
    answers = [{"id": i + 100, "question_id": i, "answer": answer, "active": True} for i, *_, answer in questions]
    shown = [{"id": i, "questions_ids": [], "sensor": "x", "active": True} for i in images]
    return {
        "questions": {"questions": stub + asked},
        "answers": {"answers": stub + answers},
        "images": {"images": stub + shown},
    }


def split_files(folder: str, stem: str, parts: dict[str, dict]) -> dict[str, dict]:
    return {f"{folder}{stem}_{key}.json": content for key, content in parts.items()}


LR_TEST = [
    (3, 0, "comp", "Are there more roads than ponds?", "yes"),
    (4, 0, "rural_urban", "Is it a rural or an urban area", "rural"),
]
PHILI = [(9, 5, "presence", "Is a building present?", "no"), (10, 5, "area", "What is the area covered by roads?", "12m2")]


def test_rsvqa_low_and_high_resolution_side_by_side(tmp_path):
    train = rsvqa([(0, 1, "count", "How many  roads are there?", "0"), (1, 1, "presence", "Is there a road?", "no")], [1], (3, 4))
    train["answers"]["answers"][-1]["active"] = False
    train["questions"]["questions"] += [
        {"id": 7, "img_id": 3, "type": "count", "question": "?", "answers_ids": [100], "active": True},
        {"id": 8, "img_id": 1, "type": "count", "question": " ", "answers_ids": [100], "active": True},
    ]
    files = split_files("LR/", "LR_split_train", train) | split_files("LR/", "LR_split_test", rsvqa(LR_TEST, [0, 6], (0, 1)))
    files |= split_files("HR/", "USGS_split_val", rsvqa([(2, 1, "comp", "Are there more?", "no")], [1]))
    files |= split_files("HR/", "USGS_split_test", rsvqa([(5, 4, "presence", "Is a road present?", "yes")], [4]))
    files |= split_files("HR/", "USGS_split_test_phili", rsvqa(PHILI, [5, 77]))
    files |= {"HR/USGS_split_train_questions.json": {"questions": []}}  # its answers were not downloaded
    images = [
        *(f"LR/Images_LR/{i}.tif" for i in (0, 1)),
        *(f"HR/Data/{i}.{kind}" for i in (0, 1, 4, 5) for kind in ("png", "tif")),
    ]
    splits, good, aside = read("rsvqa", tree(tmp_path, *images, **files))
    assert splits == {"LR_split_train/1": "train", "LR_split_test/0": "test", "USGS_split_val/1": "val",
                      "USGS_split_test/4": "test", "USGS_split_test_phili/5": "test"}  # fmt: skip
    found = {name: [(c.category, *c.turns[0]) for c in record.conversations] for name, record in good.items()}
    assert found["LR_split_train/1"] == [("count", f"How many roads are there? {SHORT_ANSWER}", "0")]
    assert [(c, a) for c, _, a in found["LR_split_test/0"]] == [("comparison", "yes"), ("rural_urban", "rural")]
    assert [c for c, *_ in found["USGS_split_test_phili/5"]] == ["presence", "area"]
    assert [c for c, *_ in found["USGS_split_test/4"]] == ["presence"]
    assert aside == {
        "question 1": {"answers_ids": "has no active answer in LR/LR_split_train_answers.json"},
        "question 7": {"img_id": "3 is no active image of LR/LR_split_train_images.json"},
        "question 8": {"question": "is missing or empty"},
        "HR/USGS_split_train_questions.json": {
            "file": f"{tmp_path}/HR/USGS_split_train_answers.json does not exist; set data.root to the folder that holds it"
        },
    }
    made = {
        i.id: i.ref["file"] for i in open_source(DataConfig(source="rsvqa", root=str(tmp_path))).items() if "questions" in i.ref
    }
    assert made["LR_split_train/1"] == "LR/Images_LR/1.tif" and made["USGS_split_val/1"] == "HR/Data/1.tif"


def flood(image: str, question: str, kind: str, *truth) -> dict:
    entry = {"Image_ID": image, "Question": question, "Question_Type": kind}
    return entry | ({"Ground_Truth": truth[0]} if truth else {})


def test_floodnet_as_published_has_answers_for_training_alone(tmp_path):
    training = {str(i): flood(f"{i}.JPG", "How many buildings are flooded?", "Complex_Counting", i % 5) for i in range(40)}
    training["40"] = flood(
        "0.JPG", "What is the overall condition of the given image?", "Condition_Recognition", "flooded,non flooded"
    )
    training["41"] = flood("0.JPG", "Is the entire road flooded?", "Yes_No")
    valid = {"0": flood("90.JPG", "Is the entire road flooded?", "Yes_No"), "1": flood("91.JPG", "Is it?", "Yes_No")}
    tree(tmp_path, *(f"Images/Train_Image/{i}.JPG" for i in range(40)), "Images/Valid_Image/90.JPG",
         **{"Questions/Training Question.json": training, "Questions/Valid Question.json": valid})  # fmt: skip
    splits, good, aside = read("floodnet", tmp_path, val_fraction=0.2, test_fraction=0.2)
    assert set(splits.values()) == {"train", "val", "test", "unlabelled"}
    assert [name for name, split in splits.items() if split == "unlabelled"] == ["Images/Valid_Image/90.JPG"]
    first, seventh = good["Images/Train_Image/0.JPG"].conversations, good["Images/Train_Image/7.JPG"].conversations
    assert [(c.category, c.turns[0][1]) for c in first] == [
        ("complex_counting", "0"),
        ("condition_recognition", "flooded,non flooded"),
    ]
    assert seventh[0].turns == [(f"How many buildings are flooded? {SHORT_ANSWER}", "2")]
    assert good["Images/Valid_Image/90.JPG"].conversations[0].turns == [(f"Is the entire road flooded? {SHORT_ANSWER}", None)]
    assert aside["training question.json[41]"] == {"Ground_Truth": "is missing or empty"}
    assert (
        list(aside["valid question.json[1]"]) == ["Image_ID"]
        and "'91.JPG' does not exist" in aside["valid question.json[1]"]["Image_ID"]
    )


def test_floodnet_with_all_answers_keeps_its_splits_and_a_broken_file_is_set_aside(tmp_path):
    files = {f"{name} Question.json": {"0": flood(f"{i}.JPG", "Is the road flooded?", "Yes_No", "Yes")}
             for i, name in enumerate(("Training", "Valid", "Test"))}  # fmt: skip
    tree(tmp_path, *(f"{i}.JPG" for i in range(3)), **files, **{"Old Question.json": "{"})
    splits, good, aside = read("floodnet", tmp_path)
    assert splits == {"0.JPG": "train", "1.JPG": "val", "2.JPG": "test"} and turns(good["2.JPG"], "vqa")[0][1] == "yes"
    assert "is not JSON" in aside["Old Question.json"]["file"]


# --- instructions


def test_geochat_instruct_names_other_prefixes_and_extensions_than_its_archive(tmp_path):
    archive = "share/softwares/kartik/GeoChat_finetuning/final_images_llava/"
    tree(tmp_path, f"{archive}P0001_0003.png", f"{archive}floodnet/10165.jpg", f"{archive}lrben/200.png")

    def talk(image, *said):
        who = ("human", "gpt")
        return {"id": image, "image": image, "conversations": [{"from": who[i % 2], "value": v} for i, v in enumerate(said)]}

    pair = "{<10><20><30><40>|<90>}{<50><20><70><40>|<12>}"
    records = [
        talk(
            "P0001_0003.png",
            "<image>\n[refer] where are <p>2 ships at the left</p>?",
            pair,
            "[identify] {<1><2><9><8>|<0>}",
            "1 ship",
        ),
        talk("floodnet/10165.JPG", f"<image>\nIs it flooded?\n{SHORT_ANSWER}", "No"),
        talk("lrben/200.tif", f"<image>\nHow many roads are there?\n{SHORT_ANSWER}", "0"),
        talk("P0001_0003.tif", "<image>\n[identify] {<77><81><83><981>|<29>}", "1 ship"),
        talk("P0001_0003.tif", "<image>\n[refer] <p>2 ships</p>", "{<10><20><30><40>|<90>}{<35><32><35><36>|<67>}"),
        talk("P0001_0003.tif", "<image>\n[refer] <p>2 ships</p>", "{<10.5><20><30><40>|<90>}"),
        talk("P0001_0003.tif", "<image>\n[identify] {<1><2><9><8>|<0>}", "None"),
    ]
    for i, record in enumerate(records):
        record["id"] = f"r{i}"
    _, good, aside = read("llava", tree(tmp_path, **{"GeoChat_Instruct.json": records}), annotations="GeoChat_Instruct.json")
    tasks = {name.removeprefix(archive): [c.task for c in record.conversations] for name, record in good.items()}
    assert tasks == {"P0001_0003.png": ["grounding"], "floodnet/10165.jpg": ["vqa"], "lrben/200.png": ["vqa"]}
    assert len(good[f"{archive}P0001_0003.png"].conversations[0].turns) == 2
    assert {name: list(fields) for name, fields in aside.items()} == {
        "r3": ["conversations[0].value"], "r4": ["conversations[1].value"], "r5": ["conversations[1].value"],
        "r6": ["conversations[1].value"]}  # fmt: skip
    assert "far outside" in aside["r3"]["conversations[0].value"] and "x1 >= x2" in aside["r4"]["conversations[1].value"]


THREE = [
    [[584.0, 337.0], [619.0, 313.0], [601.0, 282.0], [565.0, 304.0]],
    [[517.0, 237.0], [555.0, 214.0], [534.0, 181.0], [498.0, 204.0]],
]
REFERRING = {"question_id": "fast_1", "image_id": "train_5007_0017", "question": "2 airplanes at the right", "type": "ref",
             "dataset": "FAST", "obj_ids": [1, 2], "size_group": "small", "ground_truth": THREE}  # fmt: skip
REGION = {"question_id": "sota_2", "image_id": "P0001_0003", "question": "{<10><20><30><40>|<45>}",
          "ground_truth": "1 large ship at the left",
          "type": "region", "dataset": "SOTA", "obj_ids": [0], "size_group": "large"}  # fmt: skip
LINES = {
    "referring": [REFERRING, REFERRING | {"type": "grounding", "size_group": "medium", "ground_truth": [[60, 120, 300, 480]]},
                  REFERRING | {"dataset": "other", "ground_truth": [10, 20, 60, 20, 60, 50, 10, 50]},
                  REFERRING | {"ground_truth": []}, REFERRING | {"ground_truth": [[[5, 5], [5, 5], [5, 5], [5, 5]]]},
                  REFERRING | {"ground_truth": [[0, 0, 9000, 9000]]}, REFERRING | {"image_id": "gone"}],
    "region_captioning": [REGION, REGION | {"question": "{<10><20><5><40>|<45>}"}, REGION | {"question": "the ship"}],
    "grounding_description": [{"image_id": "P0001_0003.png", "description": "There is a ship."}, {"image_id": "P0001_0003.png"}],
    "aid": [{"question_id": "MediumResidential/mediumresidential_12", "image": "MediumResidential/mediumresidential_12.png",
             "text": "Classify the image.\nClasses: Airport, MediumResidential", "ground_truth": "MediumResidentialgt"},
            {"question_id": 7, "image": "mediumresidential_12.png", "text": "Classify the image.", "ground_truth": "Airportgt"}],
    "UCmerced": [{"question_id": "agricultural/agricultural00", "image": "agricultural/agricultural00.tif", "text": "Classify.",
                  "ground_truth": "agricultural"}],
    "lrben": [{"question_id": i, "image": "0.tif", "text": f"{q}\n{SHORT_ANSWER}", "category": kind}
              for i, _, kind, q, _ in LR_TEST]
             + [{"question_id": 99, "image": "0.tif", "text": "Is it?", "category": "presence"},
                {"question_id": 3, "image": "0.tif", "text": "Another question?", "category": "comp"}],
    "hrben": [{"question_id": 9, "image": "5.tif", "text": f"{PHILI[0][3]}\n{SHORT_ANSWER}", "category": "presence"}],
}  # fmt: skip


@pytest.fixture
def bench(tmp_path):
    files = {f"GeoChat-Bench/{name}.jsonl": "\n".join(map(json.dumps, lines)) + "\n\n" for name, lines in LINES.items()}
    files |= split_files("LR/", "LR_split_test", rsvqa(LR_TEST, [0])) | split_files(
        "HR/", "USGS_split_test_phili", rsvqa(PHILI, [5])
    )
    images = ["final_images_llava/train_5007_0017.png", "final_images_llava/P0001_0003.png", "LR/Images_LR/0.tif",
              "HR/Data/0.tif", "HR/Data/5.tif", "LR/Images_LR/5.tif", "AID/MediumResidential/mediumresidential_12.jpg",
              "UCMerced_LandUse/Images/agricultural/agricultural00.tif"]  # fmt: skip
    return tree(tmp_path, *images, **files)


def test_geochat_bench(bench):
    splits, good, _ = read("geochat_bench", bench)
    assert splits == dict.fromkeys([
        "aid/AID/MediumResidential/mediumresidential_12.jpg", "grounding_description/final_images_llava/P0001_0003.png",
        "hrben/HR/Data/5.tif", "lrben/LR/Images_LR/0.tif", "referring/final_images_llava/train_5007_0017.png",
        "region_captioning/final_images_llava/P0001_0003.png",
        "ucmerced/UCMerced_LandUse/Images/agricultural/agricultural00.tif"],
        "test")  # fmt: skip
    found = {
        name.split("/")[0]: [(c.task, c.category, *c.turns[0]) for c in record.conversations] for name, record in good.items()
    }
    classes = "Classify the image. Classes: Airport, MediumResidential"
    assert found["aid"] == [("scene_classification", "", classes, "medium residential"),
                            ("scene_classification", "", "Classify the image.", "airport")]  # fmt: skip
    assert found["ucmerced"] == [("scene_classification", "", "Classify.", "agricultural")]
    assert found["lrben"] == [("vqa", "comparison", f"{LR_TEST[0][3]} {SHORT_ANSWER}", "yes"),
                              ("vqa", "rural_urban", f"{LR_TEST[1][3]} {SHORT_ANSWER}", "rural")]  # fmt: skip
    assert found["hrben"] == [("vqa", "presence", f"{PHILI[0][3]} {SHORT_ANSWER}", "no")]
    asked = "[identify] What is the object present at {<10><20><30><40>|<45>}"
    assert found["region_captioning"] == [("region_captioning", "large", asked, "1 large ship at the left")]
    assert found["grounding_description"] == [
        ("grounded_captioning", "", "[grounding] describe the image in detail.", "There is a ship.")
    ]


def test_geochat_bench_corners_become_boxes_in_the_frame_of_their_data_set(bench):
    _, good, aside = read("geochat_bench", bench)
    pair, single, other = good["referring/final_images_llava/train_5007_0017.png"].conversations
    assert pair.turns[0][0] == "[refer] Give me the location of <p> 2 airplanes at the right </p>"
    assert single.turns[0][0] == "[grounding] 2 airplanes at the right"
    assert (pair.category, single.category) == ("small", "medium") and pair.turns[0][1].count("<delim>") == 1
    for found, true in zip(parse_boxes(pair.turns[0][1]), THREE, strict=True):  # the file's image has 100 pixels, its corners 600
        drawn, wanted = Polygon(box_corners(found, 600, 600)), Polygon(true)
        assert drawn.intersection(wanted).area / drawn.union(wanted).area > 0.7
    assert single.turns[0][1] == "{<10><20><50><80>|<0>}"
    assert other.turns[0][1] == "{<10><20><60><50>|<0>}"  # of an unknown data set: the image's own pixels
    assert {name: list(fields) for name, fields in aside.items()} == {
        "referring[3] fast_1": ["ground_truth"], "referring[4] fast_1": ["ground_truth"],
        "referring/final_images_llava/train_5007_0017.png": ["questions[3].ground_truth"], "referring[6] fast_1": ["image_id"],
        "region_captioning[1] sota_2": ["question"], "region_captioning[2] sota_2": ["question"],
        "grounding_description[1]": ["description"], "lrben[2] 99": ["ground_truth"], "lrben[3] 3": ["question_id"]}  # fmt: skip
    assert (
        "RSVQA's LR_split_test_{questions,answers}.json below data.root do not have question '99'"
        in aside["lrben[2] 99"]["ground_truth"]
    )
    assert "is another question in RSVQA" in aside["lrben[3] 3"]["question_id"]


def test_geochat_bench_files_that_cannot_be_read_are_set_aside(bench):
    tree(bench, **{"my.jsonl": "{}", "HR/USGS_split_test_phili_answers.json": "[", "GeoChat-Bench/aid.jsonl": "{\n7"})
    splits, _, aside = read("geochat_bench", bench)
    assert {name.split("/")[0] for name in splits} == {
        "grounding_description",
        "lrben",
        "referring",
        "region_captioning",
        "ucmerced",
    }
    assert "is none of referring" in aside["my.jsonl"]["file"] and "is not JSON" in aside["GeoChat-Bench/hrben.jsonl"]["file"]
    assert [list(aside[f"aid[{i}]"]) for i in range(2)] == [["record"], ["record"]]


def deep(kind: str, pixels: np.ndarray) -> bytes:
    """RGB of 16 or 8 bits as TIFF of either photometry, or PNG."""
    driver, more = ("PNG", {}) if kind == "png" else ("GTiff", {"photometric": kind})
    with rasterio.MemoryFile() as memory:
        with memory.open(driver=driver, width=32, height=32, count=3, dtype=pixels.dtype, **more) as raster:
            raster.write(pixels)
        return memory.read()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("kind", ["rgb", "minisblack", "png"])
def test_sixteen_bits_are_stretched_and_eight_are_not_whatever_the_tags_say(kind):
    dark = np.random.default_rng(0).integers(200, 2000, (3, 32, 32)).astype(np.uint16)
    shown = np.asarray(Image.open(io.BytesIO(displayable(deep(kind, dark), "a", [])[0])))
    assert shown.shape == (32, 32, 3) and shown.max() == 255 and 100 < shown.mean() < 155
    plain = (dark // 10).astype(np.uint8)
    kept = np.asarray(Image.open(io.BytesIO(displayable(deep(kind, plain), "a", [])[0])).convert("RGB"))
    assert np.array_equal(kept, plain.transpose(1, 2, 0))


# --- detection


def dota(*boxes: tuple, header: str = "imagesource:GoogleEarth\ngsd:0.146343590398\n") -> str:
    """Lines of DOTA: (x1, y1, x2, y2, class, difficult)."""
    lines = [f"{x1}.0 {y1}.0 {x2}.0 {y1}.0 {x2}.0 {y2}.0 {x1}.0 {y2}.0 {kind} {hard}" for x1, y1, x2, y2, kind, hard in boxes]
    return header + "\n".join(lines)


def test_dota_has_a_folder_for_each_split_headers_and_difficult_objects(tmp_path):
    one = (10, 20, 60, 50, "storage-tank", 0)
    files = {
        "train/labelTxt/P0000.txt": dota(one, (70, 70, 90, 90, "storage-tank", 1)),
        "train/labelTxt-v1.5_hbb/P0000.txt": dota((0, 0, 99, 99, "plane", 0)),
        "val/labelTxt/P0003.txt": dota((10, 20, 60, 50, "large-vehicle", 0), header="imagesource:null\ngsd:null\n"),
        "train/labelTxt/P0001.txt": dota((1, 1, 9, 9, "ship", 1)),
        "train/labelTxt/P0002.txt": dota((1, 1, 9, 1, "ship", 0), header=""),
        "train/labelTxt/P0004.txt": dota(one).replace("10.0", "nan").encode() + b"\n\xff\xfe 2",
    }
    images = [*(f"train/images/P000{i}.png" for i in (0, 1, 2, 4)), "val/images/P0003.png", "test/images/P0006.png"]
    splits, good, aside = read("dota", tree(tmp_path, *images, **files))
    assert {name: splits[name] for name in images[:5]} == dict.fromkeys(images[:4], "train") | {images[4]: "val"}
    assert detected(good[images[0]]) == {"storage tank": [(10, 20, 60, 50, 0)]}  # the difficult one is not asked for ...
    assert not turns(good[images[0]], "grounded_captioning")  # ... and no description leaves it out
    assert detected(good[images[4]]) == {"large vehicle": [(10, 20, 60, 50, 0)]}
    assert aside["train/images/P0001.png"]["objects"].startswith("is empty or all difficult")
    assert "encloses no area" in aside["train/images/P0002.png"]["objects[0]"]
    assert set(aside["train/images/P0004.png"]) == {"objects", "objects[0]", "line 4"}
    assert aside["test/images/P0006.png"] == {"labels": "has no annotation file of its name"}


HBB = """<annotation><filename>{0}.jpg</filename><source><database>DIOR</database></source><size><width>100</width></size>
<object><name>storagetank</name><pose>Unspecified</pose>
<bndbox><xmin>10</xmin><ymin>20</ymin><xmax>60</xmax><ymax>50</ymax></bndbox></object>
</annotation>"""
OBB = """<annotation><filename>{0}.jpg</filename><object><type>robndbox</type><name>storagetank</name><difficult>0</difficult>
<robndbox><x_left_top>50</x_left_top><y_left_top>20</y_left_top><x_right_top>80</x_right_top><y_right_top>50</y_right_top>
<x_right_bottom>50</x_right_bottom><y_right_bottom>80</y_right_bottom>
<x_left_bottom>20</x_left_bottom><y_left_bottom>50</y_left_bottom>
</robndbox><angle>0.78</angle></object></annotation>"""


def test_dior_image_sets_give_the_splits_and_data_horizontal_the_boxes(tmp_path):
    names = {"00001": "train", "00002": "val", "11726": "test"}
    images = {n: f"JPEGImages-{'test' if n == '11726' else 'trainval'}/{n}.jpg" for n in names}
    files = {f"Annotations/Horizontal Bounding Boxes/{n}.xml": HBB.format(n) for n in names}
    files |= {f"Annotations/Oriented Bounding Boxes/{n}.xml": OBB.format(n) for n in names}
    files |= {f"ImageSets/Main/{split}.txt": f"{n}\n" for n, split in names.items()} | {
        "ImageSets/Main/trainval.txt": "00001\n00002\n"
    }
    tree(tmp_path / "DIOR", *images.values(), **files)
    splits, good, aside = read("dior", tmp_path)
    assert splits == {f"DIOR/{image}": names[n] for n, image in images.items()} and not aside
    assert detected(good[f"DIOR/{images['00001']}"])["storage tank"] == [(29, 29, 71, 71, 45)]
    _, good, _ = read("dior", tmp_path, horizontal=True)
    assert detected(good[f"DIOR/{images['00001']}"])["storage tank"] == [(10, 20, 60, 50, 0)]
    assert any("with horizontal boxes" in c.turns[0][0] for c in good[f"DIOR/{images['00001']}"].conversations)


def fair1m(*corners: tuple[int, ...], name: str = "Dry Cargo Ship") -> str:
    objects = [
        "<object><coordinate>pixel</coordinate><type>rectangle</type><possibleresult>"
        f"<name>{name}</name></possibleresult><points>"
        + "".join(f"<point>{x}.000000,{y}.000000</point>" for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)))
        + "</points></object>"
        for x1, y1, x2, y2 in corners
    ]
    return (
        '<?xml version="1.0" encoding="utf-8"?><annotation><source><filename>0.tif</filename></source><objects>'
        f"{''.join(objects)}</objects></annotation>"
    )


def test_fair1m_numbers_its_images_anew_in_every_part_and_points_may_be_negative(tmp_path):
    files = {
        "train/part1/labelXml/0.xml": fair1m((10, 20, 60, 50), (-10, 70, 30, 90), (-30, 70, 20, 90)),
        "train/part2/labelXml/0.xml": fair1m((40, 40, 80, 80), name="Boeing737"),
        "validation/labelXmls/0.xml": fair1m((-50, -50, 10, 10)),
        "train/part1/labelXml/1.xml": fair1m((10, 20, 60, 50)).replace("<point>10.000000,20.000000</point>", "<point>?</point>"),
    }
    images = ["train/part1/images/0.tif", "train/part2/images/0.tif", "validation/images/0.tif", "train/part1/images/1.tif"]
    splits, good, aside = read("fair1m", tree(tmp_path, *images, **files))
    assert splits == dict(zip(images, ("train", "train", "val", "train"), strict=True))
    assert detected(good[images[0]]) == {
        "dry cargo ship": [(10, 20, 60, 50, 0), (0, 70, 30, 90, 0)]
    }  # cut; 2/5 of the third is seen
    assert detected(good[images[1]]) == {"Boeing737": [(40, 40, 80, 80, 0)]}
    assert aside[images[2]] == {"objects": "show less than data.min_visible=0.5 of their area"}
    assert set(aside[images[3]]) == {"object[0]", "objects"}


@pytest.mark.parametrize("names", ["names:\n  0: plane\n  1: small-vehicle\n", "path: x\nnames: [plane, small-vehicle]\n"])
def test_yolo_folders_of_images_and_labels(tmp_path, names):
    files = {
        "labels/train/P1.txt": "1 0.1 0.2 0.6 0.2 0.6 0.5 0.1 0.5\n0 0.8 0.8 0.2 0.1\n\n",
        "labels/val/P1.txt": "0 0.5 0.5 0.2 0.2\n-1 0.5 0.5 0.2 0.2\n0 0.5 0.5\n",
        "labels/train/P2.txt": "",
        "dota.yaml": names,
    }
    splits, good, aside = read("yolo", tree(tmp_path, "images/train/P1.jpg", "images/val/P1.jpg", "images/train/P2.jpg", **files))
    assert splits == {"images/train/P1.jpg": "train", "images/train/P2.jpg": "train", "images/val/P1.jpg": "val"}
    assert detected(good["images/train/P1.jpg"]) == {"small vehicle": [(10, 20, 60, 50, 0)], "plane": [(70, 75, 90, 85, 0)]}
    assert detected(good["images/val/P1.jpg"]) == {"plane": [(40, 40, 60, 60, 0)]}
    assert set(aside["images/val/P1.jpg"]) == {"line 2", "line 3"} and set(aside["images/train/P2.jpg"]) == {"objects"}


def test_coco_reads_the_instances_of_every_split(tmp_path):
    polygon = [[50.0, 20.0, 80.0, 50.0, 50.0, 80.0, 20.0, 50.0]]

    def coco(image: int, *annotations: dict) -> dict:
        listed = [{"id": i, "image_id": image, "category_id": 3, "area": 1, "iscrowd": 0, **a} for i, a in enumerate(annotations)]
        images = [{"id": image, "file_name": f"{image:012d}.jpg", "width": 100, "height": 100}]
        return {"images": images, "annotations": listed, "categories": [{"id": 3, "name": "ship"}]}

    run_length = {"size": [100, 100], "counts": [0, 5]}
    train = coco(9, {"bbox": [10, 20, 50, 30], "segmentation": polygon}, {"bbox": [10.0, 20, 50, 30], "segmentation": run_length},
                 {"bbox": [0, 0, 99, 99], "iscrowd": 1}, {"bbox": [1, 2, 3, 4], "image_id": 4})  # fmt: skip
    train["annotations"].append("nonsense")
    files = {
        f"annotations/instances_{split}2017.json": content
        for split, content in (("train", train), ("val", coco(7, {"bbox": [0, 0, 50, 50]})))
    }
    files |= {"annotations/captions_train2017.json": {"images": [], "annotations": []}, "annotations/instances_old.json": "{"}
    splits, good, aside = read("coco", tree(tmp_path, "train2017/000000000009.jpg", "val2017/000000000007.jpg", **files))
    assert splits == {"train2017/000000000009.jpg": "train", "val2017/000000000007.jpg": "val"}
    assert detected(good["train2017/000000000009.jpg"]) == {"ship": [(29, 29, 71, 71, 45), (10, 20, 60, 50, 0)]}
    assert aside["image 4"] == {"image_id": "4 is in none of the images: 1 annotations are lost"} and "image None" in aside
    assert "is not JSON" in aside["annotations/instances_old.json"]["file"] and len(aside) == 3


def lists(*names: str) -> dict:
    """A COCO file that lists images of these names, each with a ship."""
    images = [{"id": i, "file_name": name, "width": 100, "height": 100} for i, name in enumerate(names)]
    ships = [{"id": i, "image_id": i, "category_id": 3, "bbox": [10, 20, 50, 30]} for i in range(len(names))]
    return {"images": images, "annotations": ships, "categories": [{"id": 3, "name": "ship"}]}


@pytest.mark.parametrize(
    "files",
    [
        {"annotations/instances_train.json": ("JPEGImages/", (0, 1)), "annotations/instances_test.json": ("JPEGImages/", (2,))},
        {"annotations/train2017.json": ("JPEGImages/", (0, 1)), "annotations/test2017.json": ("JPEGImages/", (2,))},
        {"train/_annotations.coco.json": ("train/", (0, 1)), "test/_annotations.coco.json": ("test/", (2,))},
    ],
)
def test_coco_keeps_published_splits_however_they_are_named(tmp_path, files):
    written = {file: lists(*(f"{i}.jpg" for i in numbers)) for file, (_, numbers) in files.items()}
    tree(tmp_path, *(f"{folder}{i}.jpg" for folder, numbers in files.values() for i in numbers), **written)
    splits, good, aside = read("coco", tmp_path)
    assert sorted(splits.values()) == ["test", "train", "train"] and len(good) == 3 and not aside
    assert all(split == "test" for image, split in splits.items() if image.endswith("2.jpg"))
    splits, _, _ = read("coco", tmp_path, val_fraction=0.9999, test_fraction=0.0)  # no val is published: a part of train is
    assert sorted(splits.values()) == ["test", "val", "val"]


def test_a_missing_image_is_not_another_of_its_name(tmp_path):
    files = {"annotations/instances_train.json": lists("train/0.jpg"), "annotations/instances_val.json": lists("val/0.jpg")}
    splits, good, aside = read("coco", tree(tmp_path, "train/0.jpg", **files))
    assert splits == {"train/0.jpg": "train"} and len(good["train/0.jpg"].conversations) > 1
    assert "does not exist below data.root" in aside["val/0.jpg"]["file_name"]
    talks = [{"id": f"{i}", "image": name, "conversations": [{"from": "human", "value": "<image>\nWhat?"},
              {"from": "gpt", "value": name}]} for i, name in enumerate(("A/1.jpg", "B/1.jpg", "C/2.jpg"))]  # fmt: skip
    root = tree(tmp_path / "talks", "A/1.jpg", "other/2.jpg", **{"talks.json": talks})
    _, good, aside = read("llava", root, annotations="talks.json")
    assert [c.turns[0][1] for c in good["A/1.jpg"].conversations] == ["A/1.jpg"]  # and not what was said of B's
    assert list(aside) == ["1"] and good["other/2.jpg"].conversations[0].turns[0][1] == "C/2.jpg"  # moved, as archives do


def test_images_without_one_readable_object_are_lost_not_background(tmp_path):
    labels = {f"labelTxt/P{i}.txt": "10,20,60,20,60,50,10,50,ship,0\n" for i in range(3)}
    labels["labelTxt/P3.txt"] = ""  # nothing on it
    labels["labelTxt/P4.txt"] = "10 20 60 20 60 50 10 50 ship 0\n"
    root = tree(tmp_path, *(f"images/P{i}.png" for i in range(5)), **labels)
    source = open_source(DataConfig(source="dota", root=str(root), **ALL_TRAIN))
    info = write_shard(source, source.items(), tmp_path / "out", "a.parquet", 8)
    assert (info["images"], info["lost"]) == (1, 3)
    assert any("none of its 1 objects can be used" in bad["reason"] for bad in info["rejected"])


class Hostile:
    """Runs a program where it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


def instance(category: str, **boxes) -> dict:
    return {
        "mask": {"size": [100, 100], "counts": "0"},
        "category": category,
        "label": np.int64(9),
        "size": np.int64(159),
        **boxes,
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_samrs_pickles_of_instances(tmp_path, capsys, protocol):
    rbox = np.array([[50, 20], [80, 50], [50, 80], [20, 50]], np.float64)
    sota = [instance("storage-tank", bbox=np.array([10, 20, 60, 50], np.float32)), instance("ship", bbox=np.zeros(3))]
    fast = [instance("Dry-Cargo-Ship", rbox=rbox, rhbox=np.array([20.0, 20, 80, 80]))]
    pickles = {
        "SOTA/ins/P0.pkl": sota,
        "FAST/ins/train_1.pkl": fast,
        "FAST/ins/train_2.pkl": [Hostile()],
        "FAST/ins/train_3.pkl": {},
    }
    files = {name: pickle.dumps(content, protocol) for name, content in pickles.items()}
    if protocol == 2:  # as numpy 1, which wrote the published files, names its functions
        files["SOTA/ins/P0.pkl"] = files["SOTA/ins/P0.pkl"].replace(b"numpy._core.", b"numpy.core.")
    files |= {"SIOR/ins/00001.json": [{"category": "tenniscourt", "bbox": [10, 20, 60, 50]}], "SIOR/ins/00001.pkl": b"?"}
    images = ["SOTA/images/P0.png", "SIOR/images/00001.jpg", *(f"FAST/images/train_{i}.png" for i in (1, 2, 3))]
    tree(tmp_path, *images, "SOTA/gray/P0.png", "SOTA/color/P0.png", **files)
    splits, good, aside = read("samrs", tmp_path)
    assert sorted(splits) == sorted(images) and capsys.readouterr().out == ""
    assert detected(good[images[0]]) == {"storage tank": [(10, 20, 60, 50, 0)]}
    assert detected(good[images[1]]) == {"tennis court": [(10, 20, 60, 50, 0)]}
    assert detected(good[images[2]]) == {"dry cargo ship": [(29, 29, 71, 71, 45)]}
    assert set(aside[images[0]]) == {"instances[1]"}
    assert "asks for " in aside[images[3]]["labels"] and "print" in aside[images[3]]["labels"]
    assert aside[images[4]]["labels"] == "FAST/ins/train_3.pkl holds no list of instances"


# --- imagery


def geotiff(bands: np.ndarray, **profile) -> bytes:
    """A georeferenced GeoTIFF of (bands, height, width)."""
    profile |= {"driver": "GTiff", "count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype}
    with rasterio.MemoryFile() as memory:
        with memory.open(crs=CRS.from_epsg(32633), transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6), **profile) as raster:
            raster.write(bands)
        return memory.read()


@pytest.mark.parametrize(("sensor", "tag"), [("sar", "[sar] "), ("infrared", "[infrared] "), ("optical", "")])
def test_sixteen_bits_of_one_band_are_stretched_and_the_sensor_is_named(tmp_path, sensor, tag):
    band = np.random.default_rng(0).integers(200, 9000, (40, 60)).astype(np.uint16)
    band[:5] = 0  # no data
    put(tmp_path, {"Harbor/s1.tif": geotiff(band[None], nodata=0), "Harbor/none.tif": geotiff(band[None, :5, :5], nodata=0)})
    _, good, aside = read("class_folders", tmp_path, sensor=sensor)
    record = good["Harbor/s1.tif"]
    assert (record.width, record.height, record.sensor) == (60, 40, sensor) and not aside
    question, answer = turns(record, "scene_classification")[0]
    assert question == f"{tag}What is the class of this scene? {SHORT_ANSWER}" and answer == "harbor"
    seen, low, high = np.asarray(Image.open(io.BytesIO(record.image))), *np.percentile(band[5:], [2, 98])
    assert seen.dtype == np.uint8 and not seen[:5].any() and np.array_equal(seen, stretch(band, band > 0))
    assert (seen[5:][band[5:] <= low] == 0).all() and (seen[5:][band[5:] >= high] == 255).all()
    middle = np.abs(seen[5:].astype(float) - np.clip((band[5:] - low) / (high - low), 0, 1) * 255)
    assert middle.max() <= 1
    assert not np.asarray(Image.open(io.BytesIO(good["Harbor/none.tif"].image))).any()


def test_data_bands_picks_the_bands_of_a_multispectral_image(tmp_path):
    bands = np.random.default_rng(1).integers(0, 4000, (5, 20, 20)).astype(np.uint16)
    put(tmp_path, {"Forest/s2.tif": geotiff(bands)})
    _, good, _ = read("class_folders", tmp_path, bands=[4, 3, 2])
    seen = np.asarray(Image.open(io.BytesIO(good["Forest/s2.tif"].image)))
    assert np.array_equal(seen[..., 0], stretch(bands[3], np.ones((20, 20), bool))) and seen.shape == (20, 20, 3)
    _, good, aside = read("class_folders", tmp_path, bands=[6])
    assert not good and aside == {"Forest/s2.tif": {"image": "has 5 bands, but data.bands asks for 6"}}


def test_every_tile_holds_each_object_whole_cut_or_not_at_all_by_its_visible_share(tmp_path):
    width, height, side, overlap = 430, 260, 160, 40
    rng = np.random.default_rng(3)
    things = [(x, y, x + 40, y + 30) for x, y in rng.integers(0, (width - 40, height - 30), (12, 2)).tolist()]
    ship = [(*thing, "ship", 0) for thing in things]
    put(tmp_path, {"images/P.png": picture("PNG", (width, height)), "labelTxt/P.txt": dota(*ship).encode()})
    _, good, aside = read("dota", tmp_path, tile=side, tile_overlap=overlap, max_boxes=50)
    pixels = np.asarray(Image.open(tmp_path / "images/P.png"))
    places = tiles(width, height, side, overlap)
    assert not aside and set(good) <= {f"images/P.png#{','.join(map(str, place))}" for place in places}
    starts = sorted({place[0] for place in places})
    assert all(b - a <= side - overlap for a, b in pairwise(starts)) and starts[-1] + side == width
    for place in places:
        x1, y1, x2, y2 = place
        inside = [box(*thing).intersection(box(*place)) for thing in things]
        wanted = sorted(
            tuple(np.subtract(part.bounds, (x1, y1, x1, y1)) / side * 100) for part in inside if part.area >= 0.5 * 40 * 30
        )
        record = good.get(f"images/P.png#{x1},{y1},{x2},{y2}")
        assert (record is not None) == bool(wanted)
        if record:
            found = [each[:4] for each in detected(record)["ship"]]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(record.image))), pixels[y1:y2, x1:x2])
            assert len(found) == len(wanted)
            assert all(min(np.abs(np.subtract(each, seen)).max() for seen in found) <= 0.51 for each in wanted)
