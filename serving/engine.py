"""One model and the batch that it decodes: requests join it between two tokens, and those on one image share what it was read.

The loop runs in a thread of its own; requests come from, and answers go to, an asyncio loop. No ray.
"""

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geodistill.data.rows import Question
from geodistill.distill.cache import beginning, begun
from geodistill.distill.decode import Decoder
from geodistill.models import assemble
from geodistill.models.reader import Reader

QUESTIONS_PER_ROW = 8
READ_TOKENS = 8192  # of new images that are read between two steps: those that are being answered wait for it
PATIENCE = 4  # steps that a few requests wait for others to join with: reading two images costs little more than reading one


class Full(Exception):
    """So many requests wait that no more are taken."""


class TooLate(Exception):
    """A request was not answered in the time that it had."""


@dataclass(eq=False)
class Request:
    """prompt: token ids behind the image; image: its content, as a key, and what the model sees of it, uint8 [S, S, 3].

    temperature 0: the likeliest token; else the draw follows from `seed` alone, whatever else is in the batch.
    """

    prompt: list[int]
    key: str
    pixels: np.ndarray
    limit: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    deadline: float = float("inf")  # time.monotonic()
    streams: bool = False  # are tokens wanted before the last?
    tokens: list[int] = field(default_factory=list)
    log_p: float = 0.0  # of the answer so far, at temperature 1
    generator: np.random.Generator | None = None
    loop: asyncio.AbstractEventLoop | None = None
    events: asyncio.Queue = field(default_factory=asyncio.Queue)  # how many tokens there are, None at the end, or an exception


class Engine:
    """A saved model that answers. batch: questions in hand at most; queue: that may wait; prefix_bytes: what is kept of images
    that were asked about, for later questions. Raises ValueError for a folder that cannot be read."""

    def __init__(
        self,
        folder: str | Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 32,
        queue: int = 64,
        prefix_bytes: int = 2**30,
        image_size: int = 0,
    ):
        self.reader = Reader(folder, device, dtype, QUESTIONS_PER_ROW, share_rows=False, image_size=image_size)
        self.batch, self.queue, self.prefix_bytes = batch, queue, prefix_bytes
        self.model, self.packer, self.device = self.reader.model, self.reader.packer, self.reader.device
        self.context = self.model.model.config.get_text_config().max_position_embeddings
        self.digest = assemble.weights_digest(folder)
        self.decoder = Decoder([self.model], [1.0], self.reader.forbidden, self.reader.end, fixed=False)
        self.joins = self.decoder.can_join
        self.prefixes: OrderedDict[str, list[Tensor]] = OrderedDict()
        self.prefixes_hold = 0
        self.waiting: deque[Request] = deque()
        self.asked: dict[int, Request] = {}  # in the batch, by number
        self.taken: list[Request] = []  # from those that wait, to join
        self.numbered = 0
        self.since = 0  # steps, since requests joined
        self.gone: set[Request] = set()  # whose clients have left
        self.counts = {"requests": 0, "tokens": 0, "steps": 0, "images_read": 0, "images_known": 0}
        self.wakes = threading.Condition()
        self.closed = False
        self.failed: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="decode", daemon=True)

    # what an asyncio loop calls

    def room(self, prompt: list[int]) -> int:
        """Tokens that an answer can have at most."""
        return self.context - len(self.packer.prefix) - len(prompt)

    async def answer(self, request: Request) -> AsyncGenerator[int]:
        """The number of tokens of `request.tokens` so far, each time there are more; ends with the answer.

        Raises Full, TooLate, or what stopped the model. Whoever stops listening frees the place in the batch.
        """
        with self.wakes:
            if self.failed:
                raise self.failed
            if len(self.waiting) >= self.queue:
                raise Full
            if not self.thread.is_alive():
                self.thread.start()
            request.loop = asyncio.get_running_loop()
            self.waiting.append(request)
            self.counts["requests"] += 1
            self.wakes.notify()
        ended = False
        try:
            while True:
                found = await request.events.get()
                if isinstance(found, BaseException):
                    ended = True
                    raise found
                if found is None:
                    ended = True
                    return
                yield found
        finally:
            if not ended:
                with self.wakes:
                    if request in self.waiting:
                        self.waiting.remove(request)
                    else:
                        self.gone.add(request)
                    self.wakes.notify()

    def close(self) -> None:
        """End the loop; what is in hand is dropped."""
        with self.wakes:
            self.closed = True
            self.wakes.notify()
        if self.thread.is_alive():
            self.thread.join()

    # what the thread does

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while True:
                    with self.wakes:
                        while not (self.waiting or self.asked or self.closed):
                            self.wakes.wait()
                        if self.closed:
                            return
                        self.taken = self._take()
                    for group in self._groups(self.taken):
                        self._join(*group)
                    if self.asked:
                        self._step()
        except BaseException as error:  # the replica is told, and made anew
            self.failed = error
            with self.wakes:
                everyone = {*self.waiting, *self.taken, *self.asked.values()}
            self._tell([(request, error) for request in everyone])
            raise

    def _take(self) -> list[Request]:
        """The requests that join now; those that have left or are too late are dropped, waiting or in the batch."""
        now = time.monotonic()
        gone = {request for request in (*self.waiting, *self.asked.values()) if request in self.gone or request.deadline < now}
        if gone:
            self._tell([(request, TooLate()) for request in gone if request not in self.gone])
            self.waiting = deque(request for request in self.waiting if request not in gone)
            left = torch.tensor([number for number, request in self.asked.items() if request in gone], device=self.device)
            if len(left):
                self.decoder.leave(torch.isin(self.decoder.branches.number_B, left))
            self.asked = {number: request for number, request in self.asked.items() if request not in gone}
        self.gone.clear()
        self.since += 1
        few = 2 * len(self.waiting) < len(self.asked) and self.since < PATIENCE
        if not self.waiting or (self.asked and (few or not self.joins)):
            return []
        self.since = 0
        taken: list[Request] = []
        unread: set[str] = set()
        while self.waiting and len(taken) + len(self.asked) < self.batch:
            key = self.waiting[0].key
            if key not in self.prefixes and key not in unread:
                if unread and (len(unread) + 1) * len(self.packer.prefix) > READ_TOKENS:
                    break
                unread.add(key)
            taken.append(self.waiting.popleft())
        return taken

    def _groups(self, taken: list[Request]) -> list[tuple[dict[str, list[Request]], dict[str, int]]]:
        """Requests by image, and the rows of those images that other requests are being answered on. First what such a row takes,
        then what is on images that were read before, which what is read now may push out."""
        asked: dict[str, list[Request]] = {}
        for request in taken:
            asked.setdefault(request.key, []).append(request)
        rows = {
            key: row
            for key, requests in asked.items()
            if self.model.takes_rows and len(requests) <= QUESTIONS_PER_ROW
            if (row := self.decoder.row_for(number_of(key), len(requests))) is not None
        }
        parts: list[dict[str, list[Request]]] = [{}, {}, {}]
        for key, requests in asked.items():
            parts[0 if key in rows else 1 if key in self.prefixes else 2][key] = requests
        return [(part, rows if part is parts[0] else {}) for part in parts if part]

    def _join(self, images: dict[str, list[Request]], into: dict[str, int]) -> None:
        rows = self.packer.pack([[Question(r.prompt, None, "") for r in asked] for asked in images.values()])
        flat = [request for asked in images.values() for request in asked]
        numbers, limits = torch.zeros_like(rows.question_Rn), torch.zeros_like(rows.question_Rn)
        for place in rows.alive_Rn.nonzero().tolist():
            request = flat[int(rows.question_Rn[*place])]
            numbers[*place], limits[*place] = self.numbered, request.limit
            self.asked[self.numbered] = request
            self.numbered += 1
        keys = [*images]
        of_row = [keys[image] for image in rows.image_I.tolist()]
        rows, numbers, limits = rows.to(self.device), numbers.to(self.device), limits.to(self.device)
        known = keys[0] in self.prefixes
        self.counts["images_known" if into or known else "images_read"] += len(keys)
        for key in keys:
            if key in self.prefixes:
                self.prefixes.move_to_end(key)
        if into:
            self.decoder.add(rows, torch.tensor([into[key] for key in of_row], device=self.device), numbers, limits)
            return
        shown = torch.tensor([number_of(key) for key in of_row], device=self.device)
        if known:
            cache = begun(self.model.model, [self.prefixes[key] for key in of_row])
            self.decoder.join(rows, [None], numbers, limits, {0: cache}, shown)
            return
        pixels = np.stack([asked[0].pixels for asked in images.values()])
        z = self.model.project(self.model.see(self.model.prepare(torch.from_numpy(pixels).to(self.device))))
        caches = self.decoder.join(rows, [z], numbers, limits, shown_R=shown)
        if self.joins:
            for row, key in enumerate(of_row):
                if key not in self.prefixes:
                    self._remember(key, beginning(caches[0], row, len(self.packer.prefix)))

    def _remember(self, key: str, prefix: list[Tensor]) -> None:
        size = sum(part.nbytes for part in prefix)
        if size > self.prefix_bytes:
            return
        self.prefixes[key] = prefix
        self.prefixes_hold += size
        while self.prefixes_hold > self.prefix_bytes:
            _, oldest = self.prefixes.popitem(last=False)
            self.prefixes_hold -= sum(part.nbytes for part in oldest)

    def _step(self) -> None:
        step = self.decoder.step(self._draw)
        told: list[tuple[Request, int | BaseException | None]] = []
        parts = step.number_B, step.token_B, step.finished_B, step.mixture_B
        for number, token, finished, log_p in zip(*(part.tolist() for part in parts), strict=True):
            request = self.asked[number]
            request.log_p += log_p
            if token != self.decoder.end:
                request.tokens.append(token)
            if finished:
                del self.asked[number]
                told.append((request, None))
            elif request.streams:
                told.append((request, len(request.tokens)))
        self.counts["tokens"] += len(step.token_B)
        self.counts["steps"] += 1
        if told:
            self._tell(told)

    def _draw(self, log_p_BV: Tensor) -> Tensor:
        """The likeliest token; or, where a request has a temperature, the one at which its own random number lies."""
        drawn = log_p_BV.argmax(-1)
        asked = [self.asked[number] for number in self.decoder.branches.number_B.tolist()]
        for place, request in enumerate(asked):
            if request.temperature > 0:
                if request.generator is None:
                    request.generator = np.random.default_rng(request.seed)
                drawn[place] = sample(log_p_BV[place], request.temperature, request.top_p, request.generator.random())
        return drawn

    def _tell(self, events: list[tuple[Request, int | BaseException | None]]) -> None:
        for loop in {request.loop for request, _ in events}:
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, [one for one in events if one[0].loop is loop])


def _deliver(events: list[tuple[Request, int | BaseException | None]]) -> None:
    for request, event in events:
        request.events.put_nowait(event)


def sample(log_p_V: Tensor, temperature: float, top_p: float, number: float) -> int:
    """The token at which `number`, in [0, 1), lies in the cumulated distribution p^(1/T) over the likeliest tokens, as few as
    make up `top_p` of it."""
    p, token = torch.softmax(log_p_V.double() / temperature, -1).sort(descending=True, stable=True)
    cumulated = p.cumsum(0)
    kept = int((cumulated - p < top_p).sum())
    at = int(torch.searchsorted(cumulated[:kept], number * float(cumulated[kept - 1]), right=True))
    return int(token[min(at, kept - 1)])


def content_key(pixels: np.ndarray) -> str:
    """What stands for the content of an image."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def number_of(key: str) -> int:
    """The number by which a decoder knows the image of a key."""
    return int(key[:15], 16)
