"""Requests/s of the endpoint, beside the same endpoint over transformers' `generate`, one request at a time.

Both run behind the same Ray Serve application on this machine, and take turns. The clients are in this process and wait for each
answer before they ask again.
"""

import asyncio
import base64
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import torch
from ray import serve

from geodistill.benchmarks.distill import SMALL
from geodistill.cluster import ENVIRONMENT, free_port
from geodistill.config import Config
from geodistill.data.record import ImageRecord
from geodistill.data.shards import groups, load_manifest, read_group
from geodistill.evaluate.tables import Table
from geodistill.language import TASKS
from geodistill.models import assemble
from geodistill.models.reader import Reader
from serving.app import QUIET, Api, Settings, models_of
from serving.model import Asked, Said

ROUNDS, SECONDS, LIMIT = 3, 8.0, 64
BASELINE, FRESH = "generate", "fresh"


@dataclass(frozen=True)
class Case:
    """Which model is asked by how many clients, about one image or different ones, about what, for how many tokens."""

    name: str
    model: str
    clients: int
    one_image: bool = False
    tasks: tuple[str, ...] = TASKS
    limit: int = LIMIT


WORDS = ("captioning", "grounded_captioning")
SIDES = {"5M-64": 8, "5M-256": 16, "5M-1296": 36}  # patches of a side of what models of 5 million parameters see
SMALL_IMAGE, MIDDLE, GEOCHAT = SIDES
CASES = (
    Case("different images", "student", 16),
    Case("one image", "student", 8, one_image=True),
    Case("different images, descriptions", "student", 16, tasks=WORDS),
    Case("different images, 48 tokens", SMALL_IMAGE, 16, limit=48),
    Case("one image, 48 tokens", SMALL_IMAGE, 8, one_image=True, limit=48),
    Case("different images, 16 tokens", MIDDLE, 16, limit=16),
    Case("one image, 16 tokens", MIDDLE, 8, one_image=True, limit=16),
    Case("different images, 16 tokens", GEOCHAT, 16, limit=16),
    Case("one image, 16 tokens", GEOCHAT, 8, one_image=True, limit=16),
    Case("one client", "student", 1),
)


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


def requests_of(records: list[ImageRecord], one_image: bool = False, tasks: tuple[str, ...] = TASKS) -> list[tuple[str, str]]:
    """(image as a data URL, question) in the order of asking: the first of every image, then the second ..."""
    chosen = [max(records, key=lambda r: len(r.conversations))] if one_image else records
    asked = [[c.turns[0][0] for c in record.conversations if c.task in tasks] for record in chosen]
    urls = [data_url(record.image) for record in chosen]
    most = max(map(len, asked))
    return [(urls[i], asked[i][turn % len(asked[i])]) for turn in range(most) for i in range(len(chosen)) if asked[i]]


def larger_model(folder: Path, tokenizer: str, side: int) -> None:
    """Write a LLaVA of random weights: 5 million parameters, `side`^2 image tokens, the tokenizer of a model folder."""
    torch.manual_seed(0)
    sizes = SMALL.student
    sizes = replace(sizes, vision=replace(sizes.vision, image_size=side * sizes.vision.patch))
    words = assemble.load_tokenizer(tokenizer)
    model = assemble.new_model(sizes, words)
    assemble.save(model, assemble.new_processor(words, sizes.vision.image_size, sizes.vision.patch), folder)


async def clients(address: str, model: str, asked: list[tuple[str, str]], case: Case, seconds: float) -> dict:
    """Of a case's clients: {"rate": answers/s, "p50", "p99": seconds an answer, "answers": {place in asked: text}, "failed"}."""
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
            body = {"model": model, "max_tokens": case.limit, "messages": [{"role": "user", "content": content}]}
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
        await asyncio.gather(*(client(session) for _ in range(case.clients)))
    took = time.monotonic() - start
    ordered = sorted(times)
    p50, p99 = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99))
    return {"rate": len(times) / took, "p50": p50, "p99": p99, "answers": answers, "failed": failed}


def measure_serve(config: Config) -> dict:
    """{"cases": [{"model", "name", "clients", "ours", "generate": {"rate", "p50", "p99", "failed"}, "ratio", "same": share of
    equal answers, "compared"}], "model"} of the run's student and of larger models, medians of ROUNDS rounds. Raises ValueError
    where the run has no student or no test split."""
    shards = config.data.shards
    folders = {"student": f"{config.run}/distill/model"}
    records = [r for group in groups(load_manifest(shards, ["test"]), "test") for r in read_group(shards, group)][:256]
    for name, patches in SIDES.items():
        folder = Path(config.run) / f"benchmark/serve/{patches * patches}"
        larger_model(folder, folders["student"], patches)
        folders[name] = str(folder)
    actor = {"num_cpus": 0.1, "runtime_env": {"env_vars": ENVIRONMENT}}
    models: dict[str, Any] = {}
    for name, path in folders.items():
        settings = Settings(student=path, max_tokens=LIMIT, cpus=0.1)
        plain: Any = serve.deployment(
            OneAtATime, name=f"{name}-{BASELINE}", max_ongoing_requests=100, ray_actor_options=actor, logging_config=QUIET
        )
        models |= models_of(settings, name) | {f"{name}-{BASELINE}": plain.bind(path, settings.threads)}
        # the same without memory of the images that it was asked about: every request is one on a new image
        models |= models_of(settings.model_copy(update={"prefix_mb": 0}), f"{name}-{FRESH}")
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Api.bind(settings, models), name="benchmark", route_prefix="/")  # type: ignore[attr-defined]
    cases: list[dict] = []
    for case in CASES:
        asked = requests_of(records, case.one_image, case.tasks)
        sides = {"ours": case.model if case.one_image else f"{case.model}-{FRESH}", BASELINE: f"{case.model}-{BASELINE}"}
        rounds: dict[str, list[dict]] = {side: [] for side in sides}
        for number in range(ROUNDS):
            for side, model in sides.items():
                found = asyncio.run(clients(f"http://127.0.0.1:{port}", model, asked, case, SECONDS))
                rounds[side].append(found)
                print(
                    f"[benchmark] {case.model}, {case.name}, round {number + 1}, {side}: {found['rate']:.1f} answers/s",
                    flush=True,
                )
        figures = {
            side: {key: statistics.median(one[key] for one in found) for key in ("rate", "p50", "p99")}
            | {"failed": sum(one["failed"] for one in found)}
            for side, found in rounds.items()
        }
        mine, theirs = ({place: text for one in found for place, text in one["answers"].items()} for found in rounds.values())
        both = mine.keys() & theirs.keys()
        about = {"model": case.model, "name": case.name, "clients": case.clients}
        cases.append(
            about
            | figures
            | {
                "ratio": figures["ours"]["rate"] / figures[BASELINE]["rate"],
                "same": sum(mine[place] == theirs[place] for place in both) / len(both),
                "compared": len(both),
            }
        )
    serve.shutdown()
    return {"cases": cases, "model": folders["student"]}


def serve_table(found: dict) -> str:
    """Requests/s and seconds of an answer, ours and one at a time."""
    rows = []
    for one in found["cases"]:
        ours, theirs = one["ours"], one[BASELINE]
        times = [f"{1000 * side[key]:.0f}" for side in (ours, theirs) for key in ("p50", "p99")]
        rows.append([f"{one['model']}: {one['name']}", str(one["clients"]), f"{ours['rate']:.1f}", f"{theirs['rate']:.1f}",
                     f"{one['ratio']:.2f}", *times, f"{100 * one['same']:.1f}% of {one['compared']}"])  # fmt: skip
    columns = [("", "clients"), ("answers/s", "ours"), ("answers/s", BASELINE), ("answers/s", "ratio"), ("ours, ms", "p50"),
               ("ours, ms", "p99"), (f"{BASELINE}, ms", "p50"), (f"{BASELINE}, ms", "p99"), ("", "equal answers")]  # fmt: skip
    note = f"{found['model']}, {LIMIT} tokens at most, behind Ray Serve; a replica of one thread, clients on the same machine."
    return Table("The endpoint", columns, rows, note, "").text()
