"""The paper's tables: its numbers, the user's models beside them, and the counting of parameters and FLOPs."""

import json
import runpy
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from geodistill.config import as_yaml, load
from geodistill.data.prepare import prepare
from geodistill.data.shards import groups, load_manifest, read_group
from geodistill.evaluate.metrics import score
from geodistill.evaluate.tables import Table, tables
from geodistill.models import assemble
from geodistill.models.cost import QUESTION, TOKENS, size, size_of

BOX = "{<10><20><50><60>|<30>}"


def made(task: str, prediction: str, reference: str, category: str = "") -> dict:
    return {"benchmark": "b", "id": "0", "task": task, "category": category, "question": "?", "prediction": prediction,
            "references": [reference]}  # fmt: skip


def row(table: Table, label: str) -> list[str]:
    return next(cells[1:] for cells in table.rows if cells[0] == label)


def column(table: Table, label: str) -> list[str]:
    at = table.columns.index(next(c for c in table.columns if " ".join(c).strip() == label)) + 1
    return [cells[at] for cells in table.rows]


def llava(hidden: int, layers: int, intermediate: int, heads: int) -> LlavaConfig:
    """LLaMA over CLIP ViT-L/14 at 504 pixels, as GeoChat has it."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=504, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=32000,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2, tie_word_embeddings=False)


def test_the_papers_numbers() -> None:
    three, four, five, six, seven, eight = tables({}, {})
    assert [len(t.rows) for t in (three, four, five, six, seven, eight)] == [6, 3, 6, 4, 4, 3]
    assert row(three, "Ours (paper)") == ["67.30", "91.24"] and column(three, "AID")[0] == "12.90"
    assert row(four, "GeoChat-7B (paper)") == ["55.88", "84.48"]
    assert row(five, "GeoChat-13B (paper)") == ["56.05", "83.02", "71.15", "91.20", "91.75", "97.00", "91.60"]
    assert column(five, "LRBEN rural/urban") == ["39.00", "59.00", "61.00", "94.00", "97.00", "95.00"]
    assert column(six, "acc@0.5") == ["10.8", "11.2", "14.1", "14.4"]
    assert column(seven, "METEOR") == ["10.00", "62.27", "63.18", "63.55"]
    assert row(eight, "GeoChat-13B (paper)") == ["13048.66", "13377.05", "-", "-"]


def test_the_users_models_stand_below() -> None:
    scene = score([made("scene_classification", "beach", "beach")] * 3 + [made("scene_classification", "beach", "park")])
    vqa = score([made("vqa", "yes", "yes", "presence"), made("vqa", "yes", "no", "comp"), made("vqa", "no", "no", "comp")])
    boxes = score([made("grounding", BOX, BOX), made("grounding", "none", BOX)])
    region = score([made("region_captioning", "a red ship", "a red ship")])
    ran = {
        "grounding_description": score([made("grounded_captioning", "a", "a")]),
        "UCmerced": scene,
        "geochat_lrben": vqa,
        "referring": boxes,
        "region_captioning": region,
    }
    size = {"parameters": 1.5, "flops": 2.25, "all_parameters": 3.0, "image_flops": 4.0}
    three, four, five, six, seven, eight = tables({"mine": ran, "other": {}}, {"mine": size})
    assert row(three, "mine") == ["not run", "75.00"] and row(four, "mine") == ["not run", "50.00"]
    assert row(five, "mine") == ["not run", "not run", "not run", "100.00", "50.00", "-", f"{200 / 3:.2f}"]
    assert row(six, "mine") == ["50.0", "50.0"] and row(eight, "mine") == ["1.50", "2.25", "3.00", "4.00"]
    assert row(seven, "mine")[:2] == ["100.00", "100.00"]
    assert all(row(t, "other") == ["not run"] * len(t.columns) for t in (three, four, five, six, seven, eight))
    assert [t.rows[-3][0] for t in (three, eight)] == ["Ours (paper)"] * 2 and three.rows[-1][0] == "other"


def test_a_table_that_nothing_was_run_for_is_folded_away() -> None:
    found = tables({"mine": {"test": score([made("vqa", "a", "a")])}}, {"mine": {"parameters": 1.0}})
    assert [t.empty for t in found] == [True] * 5 + [False]
    assert found[0].html().startswith("<details><summary>") and found[5].html().startswith("<details open><summary>")


def test_text_and_html_of_two_level_heads() -> None:
    table = Table("T", [("A", "x"), ("A", "y"), ("a long group", "z")], [["<m>", "1.00", "22.00", "3"]], "note")
    assert table.text().splitlines() == [
        "T",
        "            A       a long group",
        "model     x      y             z",
        "<m>    1.00  22.00             3",
        "note",
    ]
    html = table.html()
    assert '<th scope="colgroup" colspan="2">A</th><th scope="colgroup" colspan="1">a long group</th>' in html
    assert "&lt;m&gt;" in html and "<m>" not in html
    assert "colgroup" not in Table("T", [("", "x")], [["m", "1"]]).html()


SIZES = {"7B": (4096, 32, 11008, 32), "13B": (5120, 40, 13824, 40)}


@pytest.mark.parametrize(("name", "parameters", "flops"), [("7B", 6760.72, 6904.53), ("13B", 13048.66, 13377.05)])
def test_table_8_is_counted_as_in_the_paper(name: str, parameters: float, flops: float) -> None:
    hidden, layers, intermediate, heads = SIZES[name]
    found = size(llava(hidden, layers, intermediate, heads))
    assert round(found["parameters"], 2) == parameters and round(found["flops"], 2) == flops

    def language(tokens: int) -> int:
        linear = layers * (4 * hidden**2 + 3 * hidden * intermediate) + 32000 * hidden
        return 2 * tokens * linear + layers * 2 * (2 * tokens**2 * hidden)  # scores and their product with the values

    patches, wide = 36**2, 1024
    tower = 2 * patches * 3 * 14**2 * wide + 24 * (2 * (patches + 1) * 12 * wide**2 + 4 * (patches + 1) ** 2 * wide)
    projector = 2 * patches * (wide * hidden + hidden**2)
    assert found["flops"] == pytest.approx(language(TOKENS) / 1e9, rel=5e-4)  # and element-wise operations
    assert found["image_flops"] == pytest.approx((tower + projector + language(patches + QUESTION)) / 1e9, rel=1e-9)
    tower_weights = 3 * 14**2 * wide + wide + (patches + 1) * wide + 24 * (12 * wide**2 + 13 * wide) + 4 * wide
    position = (patches + 1) * wide
    assert found["all_parameters"] - found["parameters"] == pytest.approx((tower_weights - position) / 1e6)


def test_size_of_a_folder(tmp_path: Path) -> None:
    config = llava(64, 2, 176, 4)
    config.save_pretrained(tmp_path)
    assert size_of(tmp_path) == size(config)
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        size_of(tmp_path / "gone")


class _NoTokenizer:
    """The real one takes seconds to learn."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")

    def __len__(self) -> int:
        return 500


def test_the_report_job_on_answers_that_are_there(tmp_path: Path, monkeypatch, capsys) -> None:
    small = ["data.train=4", "data.val=2", "data.test=6", "data.images_per_shard=8", "evaluate.samples=2"]
    config = load(None, [f"run={tmp_path}", *small])
    monkeypatch.setattr(assemble, "new_tokenizer", lambda *_: _NoTokenizer())
    prepare(config, parallel=False)
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    job = Path(__file__).parents[2] / "jobs/report.py"
    monkeypatch.setattr("sys.argv", ["report.py", "--config", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(job), run_name="__main__")
    assert "holds no answers of teacher, baseline, distilled; run jobs/evaluate.py first" in capsys.readouterr().err

    records = [r for g in groups(load_manifest(config.data.shards), "test") for r in read_group(config.data.shards, g)]
    asked = [(r.id, c.task, c.category, *turn) for r in records for c in r.conversations for turn in c.turns]
    (tmp_path / "evaluate").mkdir()
    for model in ("baseline", "distilled"):
        lines = [
            {"benchmark": "test", "id": i, "task": task, "category": category, "question": q,
             "prediction": a if model == "distilled" else "no", "references": [a]}
            for i, task, category, q, a in asked
        ]  # fmt: skip
        (tmp_path / f"evaluate/{model}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runpy.run_path(str(job), run_name="__main__")
    out, html = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for text in ("Table 3. Zero-shot", "GeoChat-7B (paper)", "distilled − baseline", "test: vqa, mOA", "100.0 [100.0, 100.0]"):
        assert text in out and text in html
    assert "distilled − teacher" not in out
    assert html.index("<h2>Metrics") < html.index("<h2>The paper's tables") < html.index("<h2>How sure")
    assert html.count("<details open>") == 2  # intervals and one pair; no table of the paper was run
