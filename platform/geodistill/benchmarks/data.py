"""What the project costs on this machine: measurements that return plain dicts. Linux; one machine.

`measure_data`: the stream of the trainer against a plain loop over the same images, its memory, and what training waits for it.
Per core means: by CPU time of the data processes, everything that Ray does in them included; wall time is told beside it.
"""

import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from PIL import Image

from geodistill.config import Config, DataConfig, ModelConfig
from geodistill.data import synthetic
from geodistill.data.files import absolute_path
from geodistill.data.prepare import prepare
from geodistill.data.record import CLIP_MEAN, ImageRecord
from geodistill.data.rows import Packer
from geodistill.data.shards import groups, load_manifest, read_group
from geodistill.data.stream import PackerSpec, new_packer, stream
from geodistill.language import IMAGE

SIDE = 512  # pixels of a generated photograph
DISTINCT = 256  # of them differ; the others are the same bytes under other names
QUESTIONS = 3  # of each, about as many as GeoChat_Instruct has
SIZES = (64, 504)  # pixels that the model sees: the demo's, GeoChat's
ROUNDS = 5  # medians are told
PLAIN = 200  # images of the plain loop
TARGETS = {"ratio": 0.9, "growth_mb": 200.0, "data_wait": 0.05}


def make_photos(folder: Path, images: int) -> None:
    """A data set in LLaVA's layout: `images` JPEGs of SIDE pixels, generated scenes with the noise of a sensor on them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    entries: list[dict] = []
    said: list[list[tuple[str, str | None]]] = []
    for i in range(images):
        file = folder / f"images/{i:06d}.jpg"
        if i < DISTINCT:
            _, scene, conversations = synthetic.make_scene(0, "train", i)
            pixels = np.asarray(scene.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
            pixels = pixels + rng.integers(-16, 17, (SIDE, SIDE, 1), np.int16)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=85)
            said.append([c.turns[0] for c in conversations[:QUESTIONS]])
        else:
            file.unlink(missing_ok=True)
            os.link(folder / f"images/{i % DISTINCT:06d}.jpg", file)
        for question, answer in said[i % DISTINCT]:
            talk = [{"from": "human", "value": f"{IMAGE}\n{question}"}, {"from": "gpt", "value": answer}]
            entries.append({"id": str(len(entries)), "image": file.name, "conversations": talk})
    (folder / "annotations.json").write_text(json.dumps(entries))


def prepared_photos(config: Config, images: int) -> Config:
    """`images` photographs, nearly all of them in split train, through the real `prepare`."""
    folder = Path(absolute_path(config.run)) / f"benchmark/photos-{images}"
    data = DataConfig(
        source="llava",
        root=str(folder / "images"),
        annotations=str(folder / "annotations.json"),
        shards=str(folder / "data"),
        val_fraction=0.01,
        test_fraction=0.0,
        images_per_group=config.data.images_per_group,
        images_per_shard=config.data.images_per_shard,
    )
    if not (folder / "annotations.json").exists():
        print(f"[benchmark] drawing {min(DISTINCT, images)} photographs in {folder}", flush=True)
        make_photos(folder, images)
    config = replace(config, data=data, teacher=replace(config.teacher, model=ModelConfig()))
    prepare(config, parallel=True)
    return config


def timed(work: Callable[..., Any], *given: Any) -> tuple[Any, float, float]:
    """(result of work(*given), wall seconds, CPU seconds of this thread)."""
    wall, cpu = time.perf_counter(), time.thread_time()
    found = work(*given)
    return found, time.perf_counter() - wall, time.thread_time() - cpu


def plain_loop(records: list[ImageRecord], size: int) -> Iterator[Image.Image]:
    """What anyone would write with PIL: open, convert, pad, resize."""
    colour = tuple(int(255 * c) for c in CLIP_MEAN)
    for record in records:
        image = Image.open(io.BytesIO(record.image)).convert("RGB")
        if image.width != image.height:
            side = max(image.size)
            padded = Image.new("RGB", (side, side), colour)
            padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = padded
        yield image.resize((size, size), Image.Resampling.BICUBIC)


def raylet() -> psutil.Process:
    """The raylet of the local Ray that this process is connected to; its children are that Ray's workers."""
    session = ray.get_runtime_context().get_session_name()
    found = psutil.process_iter(["name", "cmdline"])
    return next(p for p in found if p.info["name"] == "raylet" and session in str(p.info["cmdline"]))


class Watch:
    """CPU time and memory of this process and of the local Ray, sampled five times a second inside a `with`.

    worker_cpu, own_cpu: CPU seconds of the processes that run data tasks, and of this one. store: bytes of the object store
    that were ever in use; peak: those and the memory of all processes, files that they have mapped left out.
    """

    def __init__(self) -> None:
        self.raylet = raylet()
        self.files = list(Path(f"/proc/{self.raylet.pid}/fd").iterdir())
        self.me = psutil.Process()
        self.cpu: dict[int, float] = {}
        self.ran: set[int] = set()  # Ray starts further processes in store, which may never run a task
        self.peak = self.store = 0
        self.end = threading.Event()

    def _sample(self) -> None:
        store = 0
        for file in self.files:
            with suppress(FileNotFoundError):  # closed meanwhile
                store += os.stat(file).st_blocks * 512 if os.readlink(file).startswith("/dev/shm/plasma") else 0
        total = store
        for process in (self.me, self.raylet, *self.raylet.children()):
            with suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError, IndexError):  # ended meanwhile
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
                title = process.cmdline()[0]
                if title.startswith(("ray::Map", "ray::IDLE")):
                    self.cpu[process.pid] = sum(process.cpu_times()[:2])
                if title.startswith("ray::Map"):
                    self.ran.add(process.pid)
        self.peak, self.store = max(self.peak, total), max(self.store, store)

    def _run(self) -> None:
        while not self.end.wait(0.2):
            self._sample()

    def __enter__(self) -> "Watch":
        self._sample()
        self.before, self.own = dict(self.cpu), sum(self.me.cpu_times()[:2])
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end.set()
        self.thread.join()
        self._sample()
        self.worker_cpu = sum(self.cpu[pid] - self.before.get(pid, 0.0) for pid in self.ran)
        self.own_cpu = sum(self.me.cpu_times()[:2]) - self.own


class Beside:
    """The plain loop in a thread, over and over while a `with` lasts: on another core, but at the speed of the same moment,
    because the speed of a shared machine drifts by more than the difference that is looked for.

    plain, plain_array: CPU milliseconds of this thread an image, without and with np.asarray of it; plain_wall: by the clock;
    tokens: of tokenising its questions.
    """

    def __init__(self, records: list[ImageRecord], packer: Packer, size: int):
        self.records, self.packer, self.size, self.end = records, packer, size, threading.Event()
        self.images, self.loop, self.array, self.asked, self.wall = 0, 0.0, 0.0, 0.0, 0.0

    def _run(self) -> None:
        while True:
            for record in self.records:
                if self.end.is_set():
                    return
                image, wall, cpu = timed(next, plain_loop([record], self.size))
                _, _, array = timed(np.asarray, image)
                _, _, asked = timed(self.packer.questions, record.id, record.conversations)
                self.images, self.loop, self.wall = self.images + 1, self.loop + cpu, self.wall + wall
                self.array, self.asked = self.array + array, self.asked + asked

    def __enter__(self) -> "Beside":
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end.set()
        self.thread.join()
        self.plain, self.plain_wall, self.tokens = (1000 * s / self.images for s in (self.loop, self.wall, self.asked))
        self.plain_array = self.plain + 1000 * self.array / self.images


def read_stream(config: Config, spec: PackerSpec, images: int) -> dict[str, float]:
    """Read `images` training images once through the trainer's stream, and drop them: seconds and bytes of that."""
    train = replace(config.student.train, splits=["train"], steps=images // config.student.train.images_per_step, augment=False)
    with Watch() as watch:
        batches = stream(config, ["train"], train, spec, config.seed, rank=0, world=1, start=0)
        images, wall, _ = timed(lambda: sum(len(batch.ids) for batch in batches))
    print(f"[benchmark] {spec.image_size} px: {images} images in {wall:.0f} s, {watch.peak / 1e6:.0f} MB", flush=True)
    seconds = {"wall": wall, "worker_cpu": watch.worker_cpu, "own_cpu": watch.own_cpu}
    return {"images": images, **seconds, "peak": watch.peak, "store": watch.store}


def some_records(config: Config) -> list[ImageRecord]:
    """PLAIN of the training images."""
    folder = config.data.shards
    some = groups(load_manifest(folder), "train")[: max(1, PLAIN // config.data.images_per_group)]
    return [record for group in some for record in read_group(folder, group)]


def one_round(config: Config, spec: PackerSpec, records: list[ImageRecord], images: int) -> dict[str, float]:
    """Rates (images/s per core), CPU milliseconds an image, and ratios of the plain loop's cost to the stream's.

    The stream's cost is the CPU time of the processes that ran its data tasks, with all that Ray does in them; tokenisation,
    which the plain loop does not do, is timed beside it and taken off for `ratio` and `ratio_to_arrays`.
    """
    with Beside(records, new_packer(spec), spec.image_size) as beside:
        stream = read_stream(config, spec, images)
    token = beside.tokens
    task, wall = (1000 * stream[key] / stream["images"] for key in ("worker_cpu", "wall"))
    cores = min(config.cluster.data_tasks, os.cpu_count() or 1)
    return {
        "plain_per_s": 1000 / beside.plain,
        "stream_per_s": 1000 / (task - token),
        "ratio": beside.plain / (task - token),
        "ratio_to_arrays": beside.plain_array / (task - token),
        "ratio_with_tokens": beside.plain / task,
        "ratio_wall": beside.plain_wall / (wall * cores),
        "plain_ms": beside.plain,
        "plain_array_ms": beside.plain_array,
        "task_ms": task,
        "tokens_ms": token,
    }


def measure_stream(config: Config, size: int) -> dict[str, Any]:
    """The medians of `one_round`, and the growth of memory (MB) from a tenth of the images to all of them, at `size` pixels."""
    train = config.student.train
    spec = PackerSpec(f"{config.data.shards}/tokenizer", IMAGE, 16, size, train.max_response, train.questions_per_row)
    images = load_manifest(config.data.shards)["splits"]["train"]["images"]
    once, tenfold = (read_stream(config, spec, part) for part in (images // 10, images))
    records = some_records(config)
    rounds = [one_round(config, spec, records, images // 10) for _ in range(ROUNDS)]
    return {name: float(np.median([one[name] for one in rounds])) for name in rounds[0]} | {
        "ratios": [one["ratio"] for one in rounds],
        "images": once["images"],
        "images_tenfold": tenfold["images"],
        "store_mb": once["store"] / 1e6,
        "store_tenfold_mb": tenfold["store"] / 1e6,
        "peak_mb": once["peak"] / 1e6,
        "peak_tenfold_mb": tenfold["peak"] / 1e6,
        "growth_mb": (tenfold["peak"] - once["peak"]) / 1e6,
    }


def data_wait(run: str | Path) -> dict[str, dict[str, float]]:
    """Of every stage of a run: the share of its time that rank 0 waited for data, over all steps and without the first line.

    The time up to the first line of metrics.jsonl holds the start of the data tasks.
    """
    found = {}
    for file in sorted([*Path(run).glob("*/metrics.jsonl"), *Path(run).glob("*/*/metrics.jsonl")]):
        rows = [row for row in map(json.loads, file.read_text().splitlines()) if "data_wait" in row]
        steps = np.diff([0, *(row["step"] for row in rows)])
        seconds = steps / np.array([row["images_per_second"] for row in rows])  # in units of a step's images
        waited = seconds * [row["data_wait"] for row in rows]
        if rows:
            rest = float(waited[1:].sum() / seconds[1:].sum()) if len(rows) > 1 else float("nan")
            found[str(file.parent.relative_to(run))] = {"all": float(waited.sum() / seconds.sum()), "after_first": rest}
    return found


def measure_data(config: Config) -> dict[str, Any]:
    """Rate, memory and waiting of the data. Its photographs, in run/benchmark, fill four windows, and ten times as many."""
    images = 4 * config.cluster.window * config.student.train.images_per_micro_batch
    photos = prepared_photos(config, 11 * images)
    return {
        "targets": TARGETS,
        "cores": os.cpu_count(),
        "data_tasks": config.cluster.data_tasks,
        "stream": {str(size): measure_stream(photos, size) for size in SIZES},
        "data_wait": data_wait(config.run),
    }


def data_table(found: dict[str, Any]) -> str:
    """`measure_data` in words, against its targets."""
    rows, targets = [], found["targets"]
    for size, one in found["stream"].items():
        spread = f"{min(one['ratios']):.2f} to {max(one['ratios']):.2f}"
        rows += [
            (f"{size} px: plain PIL, images/s per core", f"{one['plain_per_s']:.0f}", ""),
            (f"{size} px: stream without tokenisation, same", f"{one['stream_per_s']:.0f}", ""),
            (f"{size} px: stream / plain PIL, CPU time", f"{one['ratio']:.2f}", f">= {targets['ratio']:.2f} ({spread})"),
            (f"{size} px: same, plain PIL to NumPy arrays", f"{one['ratio_to_arrays']:.2f}", ""),
            (f"{size} px: same, tokenisation in the stream", f"{one['ratio_with_tokens']:.2f}", ""),
            (f"{size} px: same, wall time", f"{one['ratio_wall']:.2f}", ""),
            *(
                (f"{size} px: {part.replace('_', ' ')}, CPU ms an image", f"{one[f'{part}_ms']:.2f}", "")
                for part in ("plain", "plain_array", "task", "tokens")
            ),
            (f"{size} px: peak with {one['images']} images, MB", f"{one['peak_mb']:.0f}", ""),
            (f"{size} px: peak with {one['images_tenfold']} images, MB", f"{one['peak_tenfold_mb']:.0f}", ""),
            (f"{size} px: of it object store, MB", f"{one['store_tenfold_mb']:.0f}", ""),
            (f"{size} px: growth, MB", f"{one['growth_mb']:.0f}", f"< {targets['growth_mb']:.0f}"),
        ]
    for stage, share in found["data_wait"].items():
        rows.append(
            (f"{stage}: wait for data, after the first line", f"{share['after_first']:.1%}", f"< {targets['data_wait']:.0%}")
        )
        rows.append((f"{stage}: same, start included", f"{share['all']:.1%}", ""))
    wide = max(len(name) for name, *_ in rows)
    return "\n".join(f"{name:{wide}}  {value:>8}  {target}".rstrip() for name, value, target in rows)
