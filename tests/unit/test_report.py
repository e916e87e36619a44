"""The report: one valid file that needs no network, escapes what models write, and copes with little or odd input."""

import io
import math
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from geodistill.evaluate.metrics import score
from geodistill.evaluate.report import stage_figure, validation_figure, verdict, write_report
from geodistill.language import SHORT_ANSWER

BOX = "{<10><20><50><60>|<30>}"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on a tag that is not closed in its turn."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def answered(prediction: str) -> list[dict]:
    asked = [
        ("scene_classification", "beach", "beach"),
        ("scene_classification", "$x$ & <i>", "$x$ & <i>"),
        ("vqa", prediction, "yes"),
        ("grounding", BOX, BOX),
        ("captioning", prediction, "a beach"),
        ("conversation", prediction, "hello"),
    ]
    return [
        {"benchmark": "t", "id": str(i), "task": t, "category": "<c>", "question": "?", "prediction": p, "references": [r]}
        for i, (t, p, r) in enumerate(asked)
    ]


def rows(count: int, **more: float) -> list[dict]:
    return [{"step": i + 1, "loss": 1 / (i + 1), "learning_rate": 1e-3, "seconds": 0.1, **more} for i in range(count)]


def picture(size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 60)).save(buffer, kind)
    return buffer.getvalue()


def test_report_of_a_small_run(tmp_path: Path) -> None:
    models = ("teacher", "baseline", "distilled", "blind <b>")
    scores = {model: score(answered("yes" if model == "teacher" else "no <script>")) for model in models}
    histories = {
        "teacher": rows(60),
        "baseline": rows(5, validation_loss=2.0),
        "distill/warm": rows(3, validation_loss=1.9),
        "distill": [*rows(4, reverse_kl=0.3, new_metric=1.0, validation_loss=1.5), {"step": 5, "loss": math.nan}],
    }
    samples = [
        {"id": "1", "image": picture(), "question": "[refer] where is <p>a ship</p>?", "truth": BOX,
         "answers": {"teacher": BOX, "baseline": "<p>no</p> {<12>...}", "distilled": "{<10><20><50><60>|<75>}"}},
        {"id": "2", "image": picture((900, 700), "JPEG"), "question": f"Which class? {SHORT_ANSWER}", "truth": "beach",
         "answers": {"teacher": "Beach.", "baseline": "river", "distilled": ""}},
    ]  # fmt: skip
    start = time.perf_counter()
    path = write_report(str(tmp_path), scores, histories, samples, ["a <note> & more"])
    assert time.perf_counter() - start < 20
    assert path == f"{tmp_path}/report.html"
    html = Path(path).read_text()
    page = Page(html)
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert links and all(link.startswith("data:image/") for link in links)
    assert "http://" not in html and "https://" not in html
    assert "script" not in page.tags and "p>no" not in page.tags and "i>" not in page.tags
    for text in ("<p>no</p> {<12>...}", "[refer] where is <p>a ship</p>?", "a <note> & more", "blind <b>", "<c>: accuracy"):
        assert text in page.text
    assert page.tags.count("polygon") == 3  # truth, teacher, distilled; the baseline's text holds no box
    # the truth is a square; the distilled box is the same turned by 45 degrees: 0.8284 / 1.1716 of the area
    assert "distilled · ✓ right IoU 0.71" in page.text
    assert page.text.count("✓ right") == 3 and page.text.count("✗ wrong") == 3
    # 1 chart of the tasks, 4 confusion matrices, 1 comparison, 4 stages
    assert page.tags.count("img") == 10 and page.tags.count("details") == 4


@pytest.mark.parametrize("scores", [{}, {"teacher": score([])}])
def test_empty_input_gives_a_valid_page(tmp_path: Path, scores: dict) -> None:
    page = Page(Path(write_report(str(tmp_path), scores, {}, [], [])).read_text())
    assert tmp_path.name in page.text and "Nothing recorded." in page.text
    assert "Make it again" in page.text


def test_stages_without_values(tmp_path: Path) -> None:
    assert stage_figure([]) is None
    assert stage_figure([{"step": 1, "loss": math.inf}]) is None
    assert validation_figure({"baseline": rows(3, validation_loss=1.0)}) is None
    Page(Path(write_report(str(tmp_path), {}, {"teacher": []}, [], [])).read_text())


def test_stage_figure_has_a_panel_per_metric() -> None:
    figure = stage_figure(rows(50, reverse_kl=0.1, mystery=3.0))
    assert figure is not None
    titles = [ax.get_title() for ax in figure.axes if ax.axison]
    assert len(titles) == 5 and "mystery" in titles


def test_distilled_steps_run_on_from_the_warm_start() -> None:
    figure = validation_figure({
        "baseline": rows(4, validation_loss=1.0),
        "distill/warm": rows(3, validation_loss=1.0),
        "distill": rows(2, validation_loss=1.0),
    })  # fmt: skip
    assert figure is not None
    assert list(figure.axes[0].lines[1].get_xdata()) == [1, 2, 3, 4, 5]


def test_verdicts() -> None:
    assert verdict("[refer] where?", BOX, BOX) == ("IoU 1.00", True)
    assert verdict("[refer] where?", BOX, "no idea") == ("IoU 0.00", False)
    assert verdict(f"Is it? {SHORT_ANSWER}", "yes", "Yes.") == ("", True)
    assert verdict("Describe it.", "a red ship", "a red ship") == ("ROUGE-L 100", None)
