"""The endpoint on a real local Ray, with OpenAI's own client, broken requests and lost replicas."""

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import httpx
import hypothesis
import numpy as np
import openai
import pytest
import ray
import schemathesis
from PIL import Image
from ray import serve
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from geodistill.cluster import free_port
from geodistill.data.record import open_image
from geodistill.models import assemble
from serving.app import TOKEN, Settings, build
from serving.engine import Engine

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]
SECRET = "a token of the test"
ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def folder(student, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "student"
    assemble.save(student, processor, path)
    return path


@pytest.fixture(scope="module")
def address(ray_cluster, folder):
    """A served student of random weights and, as its teacher, the demo's, which knows what boxes are."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    teacher = ROOT / "configs/demo-teacher"
    limits = {"max_body_mb": 2, "max_pixels": 4_000_000, "max_tokens": 24, "batch": 8, "queue": 200}
    settings = Settings(student=str(folder), teacher=str(teacher), cpus=0.1, **limits)
    serve.run(build(settings), name="geodistill", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def messages(record, question: str) -> list:
    image = {"type": "image_url", "image_url": {"url": data_url(record.image)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


@pytest.fixture(scope="module")
def alone(folder):
    """(record, question) -> what the engine answers where nothing else is asked."""
    import asyncio

    from geodistill.data.stream import square
    from serving.engine import Request, content_key

    engine = Engine(folder)

    def ask(record, question, limit=24):
        async def run():
            pixels = square(open_image(record.image, record.id), engine.reader.size)
            request = Request(engine.reader.prompt([(question, None)]), content_key(pixels), pixels, limit)
            async for _ in engine.answer(request):
                pass
            return engine.reader.text(request.tokens)

        return asyncio.run(run())

    yield ask
    engine.close()


def test_openais_client_works_unchanged(client, address, records, alone):
    assert [model.id for model in client.models.list()] == ["student", "teacher"]
    record, question = records[0], records[0].conversations[0].turns[0][0]
    whole = client.chat.completions.create(model="student", messages=messages(record, question))
    assert whole.choices[0].message.content == alone(record, question)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.completion_tokens > 0 and whole.usage.prompt_tokens > 10
    pieces = list(
        client.chat.completions.create(
            model="student", messages=messages(record, question), stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert len(pieces) > 4 and pieces[-1].usage.total_tokens == whole.usage.total_tokens
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    short = client.chat.completions.create(model="student", messages=messages(record, question), max_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
    cut = client.chat.completions.create(model="student", messages=messages(record, question), stop=text[2:5])
    assert cut.choices[0].message.content == text[: text.index(text[2:5])] and cut.choices[0].finish_reason == "stop"
    cut = client.chat.completions.create(model="student", messages=messages(record, question), stop=text[2:5], stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in cut if piece.choices) == text[: text.index(text[2:5])]
    drawn = [
        client.chat.completions.create(model="student", messages=messages(record, question), temperature=1.0, seed=s)
        for s in (1, 1, 2)
    ]
    assert drawn[0].choices[0].message.content == drawn[1].choices[0].message.content != drawn[2].choices[0].message.content
    found = client.chat.completions.create(model="teacher", messages=messages(record, "[refer] where is <p>building</p>?"))
    boxes = found.choices[0].message.boxes
    assert boxes and boxes[0]["label"] == "building" and len(boxes[0]["polygon"]) == 4, found
    for path in ("/health", "/ready", "/openapi.json", "/", "/samples", "/samples/0.png", "/web/page.js"):
        assert httpx.get(address + path).status_code == 200, path


def test_many_clients_get_what_each_would_get_alone(client, records, alone):
    asked = [(record, c.turns[0][0]) for record in records[:6] for c in record.conversations[:6]]

    def ask(one):
        return client.chat.completions.create(model="student", messages=messages(*one)).choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, asked))
    assert found == [alone(*one) for one in asked]


def test_requests_that_cannot_be_served_say_why(address, records):
    url = f"{address}/v1/chat/completions"
    record = records[0]
    good = {"model": "student", "messages": messages(record, "How many?"), "max_tokens": 2}

    def image(value):
        parts = [{"type": "image_url", "image_url": {"url": value}}, {"type": "text", "text": "?"}]
        return {**good, "messages": [{"role": "user", "content": parts}]}

    flat = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(flat, "PNG")
    cases = [
        ({**good, "model": "gpt"}, 404, "gpt"),
        ({**good, "messages": []}, 400, "messages"),
        ({**good, "messages": "x"}, 400, "messages"),
        ({**good, "n": 5}, 400, "n"),
        ({**good, "messages": [{"role": "user", "content": "no image"}]}, 400, "no image"),
        ({**good, "messages": messages(record, "How many <image>?")}, 400, "special token"),
        ({**good, "messages": messages(record, "x1 " * 6500)}, 400, "fit"),
        (image("data:image/png;base64,AAAA"), 400, "cannot be decoded"),
        (image(data_url(record.image[:200])), 400, "cannot be decoded"),
        (image("data:text/html,<b>"), 400, "data URL"),
        (image(data_url(flat.getvalue())), 400, "pixels"),
        (image("http://127.0.0.1:1/a.png"), 400, "image_hosts"),
        (image("file:///etc/passwd"), 400, "image_hosts"),
        (image("http://metadata/"), 400, "image_hosts"),
        (image("http://[abc"), 400, "image_url"),
        ({**good, "stop": ["a"] * 9}, 400, "stop"),
    ]
    for body, status, says in cases:
        answer = httpx.post(url, json=body, timeout=30)
        assert (answer.status_code, says in answer.json()["error"]["message"]) == (status, True), answer.text
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b'"x"', b"{" * 10_000, b'{"model": 1e999}'):
        answer = httpx.post(url, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert httpx.post(url, content=b"x" * (3 * 2**20)).status_code == 413

    def endless():
        for _ in range(300):
            yield b"x" * 10_000

    assert httpx.post(url, content=endless(), headers={"content-type": "application/json"}).status_code in (400, 413)
    assert httpx.post(url, json=good, timeout=30).status_code == 200
    assert httpx.get(f"{address}/nothing").json()["error"]["code"] == 404


def test_a_file_that_names_others_is_no_image(address):
    """GDAL reads virtual rasters that point to other files and hosts: not here."""
    virtual = (
        '<VRTDataset rasterXSize="4" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        '<SourceFilename relativeToVRT="0">/vsicurl/http://127.0.0.1:9/x.tif</SourceFilename><SourceBand>1</SourceBand>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )
    answer = httpx.post(f"{address}/preview", content=virtual.encode(), timeout=20)
    assert answer.status_code == 400 and "cannot be decoded" in answer.json()["error"]["message"]


def test_the_page_shows_what_a_browser_does_not_know(address):
    import rasterio

    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", width=300, height=200, count=4, dtype="uint16") as raster:
            raster.write(np.random.default_rng(0).integers(0, 5000, (4, 200, 300)).astype("uint16"))
        deep = memory.read()
    answer = httpx.post(f"{address}/preview", content=deep)
    assert answer.status_code == 200 and (answer.headers["x-width"], answer.headers["x-height"]) == ("300", "200")
    assert Image.open(io.BytesIO(answer.content)).size == (300, 200)


def test_a_whole_scene(address, records):
    """Scenes of the generator side by side, as a GeoTIFF: what the demo's teacher finds lies where they are."""
    import rasterio
    from rasterio.transform import from_origin

    pictures = [np.asarray(open_image(record.image, record.id)) for record in records[:6]]
    mosaic = np.concatenate([np.concatenate(pictures[:3], 1), np.concatenate(pictures[3:], 1)]).transpose(2, 0, 1)
    where = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_400_000, 1, 1)}
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", width=192, height=128, count=3, dtype="uint8", **where) as raster:
            raster.write(mosaic)
        data = memory.read()
    asked = {"model": "teacher", "question": "[refer] where is <p>building</p>?", "overlap": 0}
    answer = httpx.post(f"{address}/v1/scenes", params={**asked, "geographic": False}, content=data, timeout=60)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["crs"]["properties"]["name"].endswith("32632") and 1 <= len(found["features"]) <= 6
    for feature in found["features"]:
        xs, ys = zip(*feature["geometry"]["coordinates"][0], strict=True)
        assert min(xs) > 499_990 and max(xs) < 500_202 and min(ys) > 5_399_862 and max(ys) < 5_400_010
        assert 0 < feature["properties"]["score"] <= 1
    degrees = httpx.post(f"{address}/v1/scenes", params=asked, content=data, timeout=60).json()["features"]
    assert len(degrees) == len(found["features"]) and 8.9 < degrees[0]["geometry"]["coordinates"][0][0][0] < 9.1
    for content, params, status in ((b"x", asked, 400), (data, {**asked, "tile": 16, "overlap": 20}, 400),
                                    (data, {**asked, "model": "x"}, 404), (data, {**asked, "iou": 7}, 400)):  # fmt: skip
        assert httpx.post(f"{address}/v1/scenes", params=params, content=content, timeout=60).status_code == status


def test_whatever_is_sent_is_answered_as_described(address):
    """Requests made up from the OpenAPI document, fitting and unfitting ones."""
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    sent = {}
    for operation in schema.get_all_operations():
        one = operation.ok()
        for mode in schemathesis.GenerationMode:

            @hypothesis.given(case=one.as_strategy(generation_mode=mode))
            @hypothesis.settings(
                max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=[*hypothesis.HealthCheck]
            )
            def ask(case):
                answer = case.call(timeout=30)
                # a request that fits the document may still hold no image; 413 is a refusal that this check does not know
                unfit = [positive_data_acceptance] + ([negative_data_rejection] if answer.status_code == 413 else [])
                case.validate_response(answer, excluded_checks=unfit)
                key = case.operation.label, answer.status_code
                sent[key] = sent.get(key, 0) + 1

            with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing about /health can be wrong
                ask()
    assert sum(sent.values()) > 100 and ("POST /v1/chat/completions", 400) in sent and not any(code >= 500 for _, code in sent)


def replicas(name: str) -> dict[str, int]:
    """Replica -> process id."""
    found = serve.status().applications["geodistill"].deployments[name]
    assert found
    pids = {}
    from ray.util.state import list_actors

    for actor in list_actors(filters=[("state", "=", "ALIVE")], detail=True):
        if actor.name and re.search(rf"#{name}#", actor.name):
            pids[actor.name] = actor.pid
    return pids


def test_more_than_can_wait_is_told_to_come_again(address, folder, records):
    """Back-pressure: 429 with Retry-After at once, and an answer for those that were let in."""
    serve.run(
        build(Settings(student=str(folder), cpus=0.1, batch=1, queue=2, max_tokens=200)), name="small", route_prefix="/small"
    )
    record, question = records[0], records[0].conversations[0].turns[0][0]
    body = {"model": "student", "messages": messages(record, question)}
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda _: httpx.post(f"{address}/small/v1/chat/completions", json=body, timeout=60), range(48)))
    serve.delete("small")
    codes = {answer.status_code for answer in found}
    assert codes == {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in found if answer.status_code == 429)


def test_a_lost_replica_costs_no_answer(client, records, alone):
    """A model's process is killed while clients wait for it: each gets its answer, once, and the right one."""
    asked = [(record, c.turns[0][0]) for record in records for c in record.conversations[:4]]
    expected = [alone(*one) for one in asked]
    killed = threading.Event()

    def ask(at):
        if at == len(asked) // 3:
            (pid,) = replicas("student").values()
            os.kill(pid, signal.SIGKILL)
            killed.set()
        found = client.chat.completions.create(model="student", messages=messages(*asked[at]), stream=at % 4 == 0, timeout=120)
        if at % 4 == 0:
            return "".join(piece.choices[0].delta.content or "" for piece in found if piece.choices)
        return found.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(len(asked))))
    assert killed.is_set() and found == expected


def test_a_token_is_asked_for_where_one_is_set(address, monkeypatch, folder):
    from fastapi.testclient import TestClient

    from serving.app import app

    monkeypatch.setenv(TOKEN, SECRET)
    here = TestClient(app, raise_server_exceptions=False)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": SECRET}, {"authorization": "Bearer é"}):
        assert here.post("/preview", content=b"x", headers={k: v.encode() for k, v in headers.items()}).status_code == 401
    answer = here.post("/preview", content=b"x", headers={"authorization": f"Bearer {SECRET}"})
    assert answer.status_code != 401


def test_prometheus_has_the_figures(address, client, records):
    client.chat.completions.create(model="student", messages=messages(records[0], "How many?"))
    port = ray.nodes()[0]["MetricsExportPort"]
    end = time.time() + 60
    while time.time() < end:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        if all(
            f"ray_geodistill_{name}" in text for name in ("requests_total", "response_tokens_total", "answer_seconds", "batch")
        ):
            break
        time.sleep(2)
    else:
        pytest.fail("\n".join(line for line in text.splitlines() if "geodistill" in line))
    assert re.search(r'ray_geodistill_requests_total\{.*ended="stop|length".*\} [1-9]', text)


@pytest.fixture
def page(address):
    if not CHROMIUM:
        pytest.skip("needs a Chromium (chromium or google-chrome on the PATH)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        troubles: list[str] = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda line: troubles.append(line.text) if line.type == "error" and "401" not in line.text else None)
        page.goto(address)
        yield page
        assert not troubles
        browser.close()


def test_the_page(page, tmp_path, records):
    """An image is chosen, a question asked, both models answer, and the boxes are drawn: as a person does it."""
    from playwright.sync_api import expect

    expect(page.locator("#models input")).to_have_count(2)
    slow: list = []
    page.route("**/v1/models", lambda route: slow.append(route))  # what is said before the models are known stays when they come
    with page.expect_request("**/v1/models"):
        page.reload()
    page.get_by_role("button", name="Describe").click()
    expect(page.get_by_role("alert")).to_contain_text("Choose an image")
    slow[0].continue_()
    expect(page.locator("#models input")).to_have_count(2)
    expect(page.get_by_role("alert")).to_contain_text("Choose an image")
    (tmp_path / "scene.png").write_bytes(records[0].image)
    page.set_input_files("#file", tmp_path / "scene.png")
    expect(page.locator("#about")).to_contain_text("scene.png, 64 × 64 pixels")
    page.get_by_label("Question", exact=True).fill("[refer] where is <p>building</p>?")
    page.get_by_role("button", name="Ask").click()
    answers = page.locator(".answer:not(.writes) p")
    expect(answers).to_have_count(2, timeout=30_000)
    assert "▭" in answers.nth(1).inner_text()
    box = page.locator("#boxes polygon").first
    expect(box).to_be_visible()
    assert len(box.get_attribute("points").split()) == 4 and box.locator("title").text_content() == "teacher: building"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy as GeoJSON").click()
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied["features"][-1]["properties"]["model"] == "teacher" and copied["type"] == "FeatureCollection"
    page.get_by_role("button", name="Copy as JSON").click()
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert [one["model"] for one in copied["answers"]] == ["student", "teacher"]

    # a box drawn with the mouse, and one with the keyboard
    sample = page.locator("#samples button").first
    sample.click()
    expect(page.locator("#about")).to_contain_text(f"{sample.get_attribute('title')}.png, 64 × 64")
    page.get_by_role("button", name="What is here").click()
    area = page.locator("#view").bounding_box()
    page.mouse.move(area["x"] + area["width"] * 0.25, area["y"] + area["height"] * 0.25)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] * 0.75, area["y"] + area["height"] * 0.5, steps=4)
    page.mouse.up()
    asked = page.get_by_label("Question", exact=True)
    expect(asked).to_have_value("[identify] what is at {<25><25><75><50>|<0>}?")
    expect(answers).to_have_count(2, timeout=30_000)
    page.locator("#view").focus()
    for key in ("ArrowRight", "ArrowRight", "Shift+ArrowDown", "Enter"):
        page.keyboard.press(key)
    expect(page.get_by_label("Question", exact=True)).to_have_value(re.compile(r"\{<29><25><79><52>\|<0>\}"))
    expect(answers).to_have_count(2, timeout=30_000)
    page.locator("#view").focus()
    for key in ["ArrowRight"] * 20 + ["Enter"]:  # at the edge it stays as it is
        page.keyboard.press(key)
    expect(asked).to_have_value(re.compile(r"\{<50><25><100><52>\|<0>\}"))
    page.mouse.click(area["x"] + area["width"] * 0.5, area["y"] + area["height"] * 0.5)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Draw a larger box")
    page.set_input_files("#file", tmp_path / "scene.png")  # the same file once more
    expect(page.locator("#about")).to_contain_text("scene.png")


def test_a_token_that_is_sent_with_the_question(page):
    """Enter in its field both changes it and asks: the question waits for the models that it opens."""
    from playwright.sync_api import expect

    slow: list = []

    def models(route) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            slow.append(route)
        else:
            route.fulfill(status=401, json={"error": {"message": "this endpoint needs a token"}})

    expect(page.locator("#models input")).to_have_count(2)
    page.route("**/v1/models", models)
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("needs a token")
    page.locator("#samples button").first.click()
    expect(page.locator("#about")).to_contain_text("64 × 64")
    page.get_by_label("Question", exact=True).fill("How many buildings are there?")
    page.locator("#token").fill("wrong")
    page.locator("#token").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("needs a token")
    page.locator("#token").fill("secret")
    with page.expect_request("**/v1/models"):
        page.locator("#token").press("Enter")
    page.wait_for_timeout(100)
    slow[0].continue_()
    expect(page.locator(".answer:not(.writes) p")).to_have_count(2, timeout=30_000)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_the_page_on_a_phone_and_with_a_geotiff(page, tmp_path):
    import rasterio
    from playwright.sync_api import expect

    page.set_viewport_size({"width": 360, "height": 740})
    with rasterio.open(tmp_path / "deep.tif", "w", driver="GTiff", width=90, height=60, count=4, dtype="uint16") as raster:
        raster.write(np.random.default_rng(0).integers(0, 5000, (4, 60, 90)).astype("uint16"))
    page.set_input_files("#file", tmp_path / "deep.tif")
    expect(page.locator("#about")).to_contain_text("deep.tif, 90 × 60 pixels")
    page.get_by_role("button", name="Classify").click()
    expect(page.locator(".answer:not(.writes) p")).to_have_count(2, timeout=30_000)
    assert page.locator(".answer p").nth(1).inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360  # nothing hangs out to the side
