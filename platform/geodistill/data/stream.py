"""Ray Data: shards -> decode -> questions -> micro-batches, in an order that a seed and a step number alone decide.

The unit is the row group (a few images that `prepare` has shuffled). Epochs of permuted groups form one endless sequence;
step s of a run takes the next `images_per_step / images_per_group` groups of it, whatever the number of workers, and a
worker streams its own part through Ray Data tasks. So a run resumes at any step with the next unseen group.
"""

import functools
import json
import pickle
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import ray.data
import torch
from PIL import Image
from torch.nn.functional import interpolate

from geodistill.cluster import quiet_data
from geodistill.config import Config, TrainConfig
from geodistill.data.features import Stored, load_features, read_features
from geodistill.data.files import local
from geodistill.data.record import CLIP_MEAN, BadRecord, ImageRecord, open_image
from geodistill.data.rows import Packer, Question
from geodistill.data.shards import Group, groups, load_manifest, read_group
from geodistill.language import speaks_of_place

# of Ray Data in one process at a time: each polls its tasks ten times a second, which with hundreds would leave them no CPU
EXECUTIONS = threading.BoundedSemaphore(2)


@dataclass
class MicroBatch:
    """pixels uint8 [B, S, S, 3]; the questions of each image; what was set aside, with its reason.

    features: stored ones [B, N, H] in place of pixels (of which there are none then), as features.py has them.
    """

    ids: list[str]
    pixels: np.ndarray
    questions: list[list[Question]]
    rejected: list[str] = field(default_factory=list)
    features: np.ndarray | None = None


def square(image: Image.Image, size: int) -> np.ndarray:
    """Pad an RGB image to a square with the CLIP mean colour (GeoChat's training rule) and resize: uint8 [size, size, 3].

    Bicubic with antialiasing, through torch: three times as fast as Pillow, whose result it meets to a grey level or two
    (one value in 200 differs). transformers' own image processors resize with the same operator.
    """
    if image.width != image.height:
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), tuple(int(255 * c) for c in CLIP_MEAN))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    if image.width == size:
        return np.asarray(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def to_micro_batch(records: list[ImageRecord], packer: Packer, size: int, stored: Stored | None = None) -> MicroBatch:
    """Decode the images and tokenise the questions; a conversation that cannot be used is set aside, with its reason.

    stored: the features of these records, which take the place of their images.
    """
    batch = MicroBatch([], np.empty((0, size, size, 3), np.uint8), [])
    images = stored.features_BNH if stored else np.empty((len(records), size, size, 3), np.uint8)
    kept: list[int] = []
    for i, record in enumerate(records):
        rejected: list[BadRecord] = []
        questions = packer.questions(record.id, record.conversations, rejected=rejected)
        try:
            if stored:
                stored.need(i, record.id)
            else:
                images[i] = square(open_image(record.image, record.id), size)
        except BadRecord as error:
            questions, rejected = [], [error]
        batch.rejected += [str(error) for error in rejected]
        if questions:
            kept.append(i)
            batch.ids.append(record.id)
            batch.questions.append(questions)
    images = images if len(kept) == len(images) else images[kept]
    return replace(batch, features=images) if stored else replace(batch, pixels=images)


@dataclass(frozen=True)
class PackerSpec:
    """What a data task needs to build its Packer: the folder of the processor's tokenizer, and the sizes.

    features: the folder of stored features that are read in place of images, or "".
    """

    tokenizer: str
    image_token: str
    image_tokens: int
    image_size: int
    max_response: int
    questions_per_row: int
    around: tuple[str, str] = ("", "")
    tokens_per_row: int = 0
    share_rows: bool = True
    features: str = ""


@functools.lru_cache(maxsize=4)
def new_packer(spec: PackerSpec) -> Packer:
    """The Packer of `spec`; one per process."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(local(spec.tokenizer))
    sizes = spec.image_tokens, spec.max_response, spec.questions_per_row
    return Packer(tokenizer, spec.image_token, *sizes, spec.around, spec.tokens_per_row, spec.share_rows)


def load_group(folder: str, group: Group, spec: PackerSpec) -> MicroBatch:
    """A row group, decoded and tokenised."""
    if spec.features:
        records, stored = read_group(folder, group, ["id", "conversations"]), read_features(spec.features, group)
        return to_micro_batch(records, new_packer(spec), spec.image_size, stored)
    return to_micro_batch(read_group(folder, group), new_packer(spec), spec.image_size)


@functools.lru_cache(maxsize=1024)
def remember_group(folder: str, group: Group, spec: PackerSpec) -> MicroBatch:
    """`load_group`, kept in this process."""
    return load_group(folder, group, spec)


SMALL = 2**25  # bytes of images or features: a split below that stays in each data process, because every epoch asks for it again


def join(batches: list[MicroBatch]) -> MicroBatch:
    """Several micro-batches as one."""
    if len(batches) == 1:
        return batches[0]
    stored = batches[0].features is not None
    return MicroBatch(
        ids=[i for b in batches for i in b.ids],
        pixels=np.concatenate([b.pixels for b in batches]),
        questions=[q for b in batches for q in b.questions],
        rejected=[r for b in batches for r in b.rejected],
        features=np.concatenate([b.features for b in batches if b.features is not None]) if stored else None,
    )


def to_table(batch: MicroBatch | ValueError) -> pa.Table:
    """One row for Ray Data, with the arrays as they lie in memory: each copy would cost a twentieth of decoding them."""
    buffers: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
    columns = {}
    for number, data in enumerate([rest, *buffers]):
        buffer = pa.py_buffer(data)
        ends = pa.py_buffer(np.array([0, buffer.size]))
        columns[str(number)] = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, buffer])
    return pa.table(columns)


def from_table(row: pa.Table) -> MicroBatch:
    """The inverse of `to_table`, with arrays of its own that can be written to. Raises the error that was put in."""
    rest, *arrays = (row[str(number)][0].as_buffer() for number in range(row.num_columns))
    found = pickle.loads(rest, buffers=[bytearray(array) for array in arrays])
    if isinstance(found, ValueError):
        raise found
    return found


def augment(batch: MicroBatch, rng: np.random.Generator) -> MicroBatch:
    """Turn and flip every image of which no text speaks of a place; of one whose scene class alone is asked, take a part.

    An image from above has no upper side: its eight orientations are equally true. A part has half of the area or more.
    """
    pixels, size = batch.pixels.copy(), batch.pixels.shape[1]
    for i, asked in enumerate(batch.questions):
        if any(speaks_of_place(text) for q in asked for text in (q.text, *q.references)):
            continue
        image = np.rot90(pixels[i], int(rng.integers(4)))
        image = image[::-1] if rng.integers(2) else image
        if all(q.task == "scene_classification" for q in asked):
            side = size * rng.uniform(0.5, 1.0) ** 0.5
            x, y = rng.uniform(0, size - side, 2)
            part = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
            image = np.asarray(part)
        pixels[i] = image
    return replace(batch, pixels=pixels)


class Order:
    """The endless sequence of row groups: epoch after epoch, each a permutation that (seed, epoch) decides."""

    def __init__(self, found: list[Group], seed: int):
        self.found, self.seed = found, seed

    def __getitem__(self, position: int) -> Group:
        epoch, at = divmod(position, len(self.found))
        return self.found[self._permutation(epoch)[at]]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - two epochs at most are looked at
    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.found))


def plan(train: TrainConfig, per_group: int, rank: int, world: int, start: int) -> list[list[int]]:
    """The places in the Order of every micro-batch of one worker, from step `start` to the end of the run."""
    groups_per_step = train.images_per_step // per_group
    groups_per_micro = train.images_per_micro_batch // per_group
    found = []
    for step in range(start, train.steps):
        for micro in range(groups_per_step // (groups_per_micro * world)):
            first = step * groups_per_step + (micro * world + rank) * groups_per_micro
            found.append([first + i for i in range(groups_per_micro)])
    return found


def stream(
    config: Config, splits: list[str], train: TrainConfig, spec: PackerSpec, seed: int, rank: int, world: int, start: int
) -> Iterator[MicroBatch]:
    """The micro-batches of one worker from step `start` on, decoded ahead by Ray Data tasks."""
    folder = config.data.shards
    manifest = load_manifest(folder, splits)
    order = Order([g for split in splits for g in groups(manifest, split)], seed)
    planned = plan(train, manifest["settings"]["images_per_group"], rank, world, start)
    image_bytes = load_features(spec.features)["image_bytes"] if spec.features else 3 * spec.image_size**2
    small = image_bytes * sum(group.images for group in order.found) <= SMALL

    def load(row: pa.Table) -> pa.Table:
        asked = row["groups"][0].as_py()
        parts = []
        for place, group in json.loads(asked):
            try:
                part = (remember_group if small else load_group)(str(folder), Group(**group), spec)
            except OSError as error:  # an exception of the task itself would reach the worker without a readable reason
                name = f"{folder}/{group['file']}"
                return to_table(ValueError(f"{name} cannot be read ({error}); bring it back, and run the same command again"))
            parts.append(augment(part, np.random.default_rng([seed, place])) if train.augment else part)
        batch = join(parts)
        if not batch.ids:
            raise ValueError(f"no image of {asked} can be used: {batch.rejected[:1]}; run jobs/prepare.py again")
        return to_table(batch)

    context = quiet_data()
    context.execution_options.preserve_order = True
    context.memory_usage_poll_interval_s = None  # reading a process's memory map each second costs data tasks a few per cent
    name = uuid.uuid4().hex[:12]  # of all windows: by ids of their own Ray keeps every figure of each, a megabyte, for good
    items = [{"groups": json.dumps([(place, vars(order[place])) for place in places])} for places in planned]

    def decode(first: int, last: int) -> list[ray.ObjectRef]:
        tasks = config.cluster.data_tasks
        window = ray.data.from_items(items[first:last], override_num_blocks=min(last - first, 4 * tasks))
        pool = ray.data.TaskPoolStrategy(size=tasks)
        decoded = window.map_batches(load, batch_size=1, batch_format="pyarrow", num_cpus=0.5, compute=pool)
        decoded._set_uuid(name)
        with EXECUTIONS:
            return decoded.to_arrow_refs()

    # One window is trained on while the next is decoded: memory is bounded by two windows. One long execution with
    # back-pressure would do the same, but its scheduler then spins in the trainer's process and halves its speed.
    size = config.cluster.window
    bounds = [0, *range(min(4, len(items)), len(items), size), len(items)]
    with ThreadPoolExecutor(1) as ahead:
        pending = ahead.submit(decode, *bounds[:2])
        for first, last in zip(bounds[1:], [*bounds[2:], None], strict=True):
            window = pending.result()
            if last is not None:
                pending = ahead.submit(decode, first, last)
            ray.wait(window, num_returns=len(window), timeout=0)  # those of other nodes are on their way
            while window:
                block = ray.get(window.pop(0))
                yield from (from_table(block.slice(row, 1)) for row in range(block.num_rows))


def read_split(
    config: Config, split: str, spec: PackerSpec, images_per_batch: int, rank: int = 0, world: int = 1
) -> Iterator[MicroBatch]:
    """Every image of a split once, in file order, read in this process (validation); worker `rank` takes every world-th batch."""
    folder = config.data.shards
    manifest = load_manifest(folder, [split])
    found = groups(manifest, split)
    per_batch = max(1, images_per_batch // manifest["settings"]["images_per_group"])
    for i, at in enumerate(range(0, len(found), per_batch)):
        if i % world == rank:
            yield join([load_group(str(folder), group, spec) for group in found[at : at + per_batch]])
