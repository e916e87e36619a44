"""The endpoint under load and faults: `python jobs/benchmark.py load [MINUTES]`.

CLIENTS ask without pause; every PAUSE seconds the process of a replica is killed; half way another student takes the place of the
first. What is counted: answers, requests without one, answers that no student gives alone, time, memory.
"""

import asyncio
import re
import threading
import time
from statistics import median

import aiohttp
import psutil
from ray import serve
from ray.util.state import list_actors

from geodistill.benchmarks.serve import LIMIT, data_url, requests_of
from geodistill.cluster import free_port
from geodistill.config import Config
from geodistill.data.record import open_image
from geodistill.data.shards import groups, load_manifest, read_group
from geodistill.data.stream import square
from geodistill.evaluate.tables import Table
from serving.app import Settings, build
from serving.engine import Engine, Request, content_key

CLIENTS, PAUSE, EVERY, IMAGES = 32, 30.0, 2.0, 64


def replicas(deployment: str) -> list[int]:
    """Process ids of the replicas of a deployment."""
    actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True, limit=1000)
    return [actor.pid for actor in actors if actor.pid and re.search(rf"#{deployment}#", actor.name or "")]


def alone(folder: str, asked: list[tuple[bytes, str]]) -> list[str]:
    """What the model of a folder answers to each (encoded image, question), without Ray."""
    engine = Engine(folder, queue=len(asked))

    async def answer(image: bytes, question: str) -> str:
        pixels = square(open_image(image, "image"), engine.reader.size)
        request = Request(engine.reader.prompt([(question, None)]), content_key(pixels), pixels, LIMIT)
        async for _ in engine.answer(request):
            pass
        return engine.reader.text(request.tokens)

    async def everything() -> list[str]:
        return await asyncio.gather(*(answer(*one) for one in asked))

    found = asyncio.run(everything())
    engine.close()
    return found


def measure_load(config: Config, minutes: str = "5") -> dict:
    """{"answers", "failed": requests without an answer by status, "wrong": answers that are neither student's, "killed", "rate",
    "p50", "p99", "worst": s, "memory": MiB of the application by quarter of the time, "seconds"}."""
    folders = [f"{config.run}/distill/model", f"{config.run}/distill/warm/model"]
    shards, seconds = config.data.shards, 60 * float(minutes)
    records = [r for group in groups(load_manifest(shards, ["test"]), "test") for r in read_group(shards, group)][:IMAGES]
    asked = requests_of(records)
    images = {data_url(record.image): record.image for record in records}
    print(f"[benchmark] {len(asked)} questions on {len(records)} images, answered without Ray first", flush=True)
    expected = [alone(folder, [(images[url], question) for url, question in asked]) for folder in folders]
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = Settings(student=folders[0], replicas=2, queue=200, max_tokens=LIMIT, cpus=0.25)
    serve.run(build(settings), name="load", route_prefix="/")
    done, killed, memory = threading.Event(), list[float](), list[float]()
    start = time.monotonic()

    def attack() -> None:
        while not done.wait(PAUSE):
            if found := replicas("student"):
                psutil.Process(found[len(killed) % len(found)]).kill()
                killed.append(time.monotonic() - start)
                print(f"[benchmark] {killed[-1]:.0f} s: a replica was killed", flush=True)

    def look() -> None:
        while not done.wait(EVERY):
            total = 0
            for pid in (*replicas("student"), *replicas("Api")):
                try:
                    total += psutil.Process(pid).memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            memory.append(total / 2**20)

    def roll_over() -> None:
        if not done.wait(seconds / 2):
            serve.run(build(settings.model_copy(update={"student": folders[1]})), name="load", route_prefix="/")
            print(f"[benchmark] {time.monotonic() - start:.0f} s: the other student is served", flush=True)

    threads = [threading.Thread(target=work) for work in (attack, look, roll_over)]
    for thread in threads:
        thread.start()
    try:
        found = asyncio.run(_clients(f"http://127.0.0.1:{port}", asked, seconds))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    serve.shutdown()
    times = sorted(found.pop("times"))
    wrong = sum(text not in {side[place] for side in expected} for place, text in found["answers"])
    new = sum(text == expected[1][place] != expected[0][place] for place, text in found["answers"])
    quarters = [median(memory[i * len(memory) // 4 : (i + 1) * len(memory) // 4]) for i in range(4)]
    return {
        "answers": len(times),
        "failed": found["failed"],
        "wrong": wrong,
        "of the second student": new,
        "killed": len(killed),
        "rate": len(times) / seconds,
        "p50": times[len(times) // 2],
        "p99": times[int(0.99 * len(times))],
        "worst": times[-1],
        "memory": quarters,
        "seconds": seconds,
    }


async def _clients(address: str, asked: list[tuple[str, str]], seconds: float) -> dict:
    """{"answers": (place, text) of each request, "times", "failed": {status: requests}}."""
    answers: list[tuple[int, str]] = []
    times: list[float] = []
    failed: dict[str, int] = {}
    end, at = time.monotonic() + seconds, 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal at
        while time.monotonic() < end:
            place, at = at % len(asked), at + 1
            url, question = asked[place]
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
            body = {"model": "student", "messages": [{"role": "user", "content": content}]}
            start = time.monotonic()
            try:
                async with session.post(f"{address}/v1/chat/completions", json=body) as reply:
                    said = await reply.json()
                    status = str(reply.status)
            except (aiohttp.ClientError, ValueError) as error:
                status = type(error).__name__
            if status == "200":
                times.append(time.monotonic() - start)
                answers.append((place, said["choices"][0]["message"]["content"]))
            else:
                failed[status] = failed.get(status, 0) + 1

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    return {"answers": answers, "times": times, "failed": failed}


def load_table(found: dict) -> str:
    """What came of it."""
    rows = [
        ["answers", str(found["answers"])],
        ["requests without an answer", str(sum(found["failed"].values())) + (f" {found['failed']}" if found["failed"] else "")],
        ["answers that no student gives alone", str(found["wrong"])],
        ["replicas killed", str(found["killed"])],
        ["answers/s", f"{found['rate']:.1f}"],
        ["s of an answer: median; 99 %; worst", f"{found['p50']:.2f}; {found['p99']:.2f}; {found['worst']:.2f}"],
        ["MiB of the application, by quarter", "; ".join(f"{value:.0f}" for value in found["memory"])],
    ]
    note = (
        f"{CLIENTS} clients, {found['seconds']:.0f} s; one of two replicas killed every {PAUSE:.0f} s; another student half way."
    )
    return Table("The endpoint under load and faults", [("", "")], rows, note, "").text()
