"""Requests/s of the endpoint, beside the same endpoint over transformers' `generate`, one request at a time.

Both run behind the same Ray Serve application on this machine, and take turns. The clients are in this process and wait for each
answer before they ask again.
"""

import asyncio
import base64
import statistics
import time

import aiohttp
import torch
from ray import serve

from geodistill.cluster import ENVIRONMENT, free_port
from geodistill.config import Config
from geodistill.data.record import ImageRecord
from geodistill.data.shards import groups, load_manifest, read_group
from geodistill.evaluate.tables import Table
from geodistill.models.reader import Reader
from serving.app import Api, Settings, models_of
from serving.model import Asked, Said

ROUNDS, SECONDS, LIMIT = 3, 10.0, 64
CASES = {"16 clients, different images": 16, "8 clients, one image": 8, "1 client": 1}
BASELINE, FRESH = "generate", "fresh"


class OneAtATime:
    """What serving is without an engine: each request waits for the one before it, and is answered by `generate`."""

    def __init__(self, folder: str, threads: int):
        torch.set_num_threads(threads)
        self.reader = Reader(folder)
        self.forbidden = self.reader.forbidden.nonzero()[:, 0].tolist()
        self.turn = asyncio.Lock()

    def about(self) -> dict:
        """As `serving.model.Model` has it."""
        return {"size": self.reader.size}

    async def answer(self, asked: Asked) -> Said:
        """The whole answer."""
        async with self.turn:
            return await asyncio.get_running_loop().run_in_executor(None, self._generate, asked)

    @torch.inference_mode()
    def _generate(self, asked: Asked) -> Said:
        prompt = self.reader.prompt(asked.turns)
        ids = torch.tensor([self.reader.packer.prefix + prompt])
        pixels = self.reader.model.prepare(torch.from_numpy(asked.pixels.copy())[None])
        out = self.reader.model.model.generate(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=asked.limit or LIMIT,
            suppress_tokens=self.forbidden,
        )[0, ids.shape[1] :].tolist()
        return Said(self.reader.text(out), len(prompt), len(out), "stop")


def data_url(image: bytes) -> str:
    """A PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def requests_of(records: list[ImageRecord], case: str) -> list[tuple[str, str]]:
    """(image as a data URL, question) in the order of asking."""
    chosen = [max(records, key=lambda r: len(r.conversations))] if "one image" in case else records
    asked = [[conversation.turns[0][0] for conversation in record.conversations] for record in chosen]
    urls = [data_url(record.image) for record in chosen]
    most = max(map(len, asked))
    return [(urls[i], asked[i][turn % len(asked[i])]) for turn in range(most) for i in range(len(chosen))]


async def clients(address: str, model: str, asked: list[tuple[str, str]], count: int, seconds: float) -> dict:
    """Of `count` clients: {"rate": answers/s, "p50", "p99": seconds an answer, "answers": {place in asked: text}, "failed"}."""
    answers: dict[int, str] = {}
    times: list[float] = []
    failed = at = 0
    end = time.monotonic() + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal at, failed
        while time.monotonic() < end:
            place, at = at % len(asked), at + 1
            url, question = asked[place]
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
            body = {"model": model, "max_tokens": LIMIT, "messages": [{"role": "user", "content": content}]}
            start = time.monotonic()
            async with session.post(f"{address}/v1/chat/completions", json=body) as reply:
                said = await reply.json()
            if reply.status == 200:
                times.append(time.monotonic() - start)
                answers[place] = said["choices"][0]["message"]["content"]
            else:
                failed += 1

    start = time.monotonic()
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session) for _ in range(count)))
    took = time.monotonic() - start
    ordered = sorted(times)
    p50, p99 = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99))
    return {"rate": len(times) / took, "p50": p50, "p99": p99, "answers": answers, "failed": failed}


def measure_serve(config: Config) -> dict:
    """{"cases": {case: {"ours", "generate": {"rate", "p50", "p99", "failed"}, "ratio", "same": share of equal answers}}, "model"}
    of the run's student, medians of ROUNDS rounds. Raises ValueError where the run has no student or no test split."""
    folder, shards = f"{config.run}/distill/model", config.data.shards
    records = [r for group in groups(load_manifest(shards, ["test"]), "test") for r in read_group(shards, group)][:256]
    settings = Settings(student=folder, max_tokens=LIMIT)
    actor = {"num_cpus": 1, "runtime_env": {"env_vars": ENVIRONMENT}}
    plain = serve.deployment(OneAtATime, name=BASELINE, max_ongoing_requests=100, ray_actor_options=actor)
    models = models_of(settings) | {BASELINE: plain.bind(folder, settings.threads)}  # type: ignore[attr-defined]
    # the same student without memory of the images that it was asked about: every request is one on a new image
    models |= models_of(settings.model_copy(update={"prefix_mb": 0}), FRESH)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Api.bind(settings, models), name="benchmark", route_prefix="/")  # type: ignore[attr-defined]
    cases: dict[str, dict] = {}
    for case, count in CASES.items():
        asked = requests_of(records, case)
        ours = "student" if "one image" in case else FRESH
        rounds: dict[str, list[dict]] = {ours: [], BASELINE: []}
        for number in range(ROUNDS):
            for model, found in rounds.items():
                found.append(asyncio.run(clients(f"http://127.0.0.1:{port}", model, asked, count, SECONDS)))
                print(f"[benchmark] {case}, round {number + 1}, {model}: {found[-1]['rate']:.1f} answers/s", flush=True)
        figures = {
            model: {key: statistics.median(one[key] for one in found) for key in ("rate", "p50", "p99")}
            | {"failed": sum(one["failed"] for one in found)}
            for model, found in rounds.items()
        }
        mine, theirs = (found[0]["answers"] for found in rounds.values())
        both = mine.keys() & theirs.keys()
        cases[case] = {"ours": figures[ours], BASELINE: figures[BASELINE]} | {
            "ratio": figures[ours]["rate"] / figures[BASELINE]["rate"],
            "same": sum(mine[place] == theirs[place] for place in both) / len(both),
            "compared": len(both),
        }
    serve.shutdown()
    return {"cases": cases, "model": folder}


def serve_table(found: dict) -> str:
    """Requests/s and seconds of an answer, ours and one at a time."""
    rows = []
    for case, one in found["cases"].items():
        ours, theirs = one["ours"], one[BASELINE]
        times = [f"{1000 * side[key]:.0f}" for side in (ours, theirs) for key in ("p50", "p99")]
        rows.append([case, f"{ours['rate']:.1f}", f"{theirs['rate']:.1f}", f"{one['ratio']:.2f}", *times,
                     f"{100 * one['same']:.1f}% of {one['compared']}"])  # fmt: skip
    columns = [("answers/s", "ours"), ("answers/s", BASELINE), ("answers/s", "ratio"), ("ours, ms", "p50"), ("ours, ms", "p99"),
               (f"{BASELINE}, ms", "p50"), (f"{BASELINE}, ms", "p99"), ("", "equal answers")]  # fmt: skip
    note = f"{found['model']}, {LIMIT} tokens at most, behind Ray Serve; a replica of one thread, clients on the same machine."
    return Table("The endpoint", columns, rows, note, "").text()
