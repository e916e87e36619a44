"""The Serve deployment that holds a model: an Engine, in a process of its own on a CPU or a GPU."""

import math
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
import torch
from ray.util import metrics

from serving.engine import Engine, Full, Request, TooLate, content_key
from serving.settings import Settings

SECONDS = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]


@dataclass
class Asked:
    """A conversation, and the image it is about as the model sees it, uint8 [S, S, 3]; the client puts it in."""

    turns: list[tuple[str, str | None]]
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.uint8))
    limit: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: list[str] = field(default_factory=list)
    seconds: float = 60.0


OTHER_SIZE = 409  # status: the model sees images of another size, `Said.text`


@dataclass
class Said:
    """An answer, or so far as it goes. reason: "stop", "length", or None where it goes on; status: of an answer that was refused,
    with its message in `text`."""

    text: str
    prompt: int = 0
    tokens: int = 0
    reason: str | None = None
    status: int = 200
    score: float = 0.0  # geometric mean of the probabilities of its tokens


class Model:
    """folder: as distill.py writes it."""

    def __init__(self, folder: str, name: str, settings: Settings):
        torch.set_num_threads(settings.threads)
        device, dtype = ("cuda", torch.bfloat16) if settings.gpus else ("cpu", torch.float32)
        kept, queue = settings.prefix_mb * 2**20, 2 * settings.batch  # Serve counts those that wait for the replica
        self.engine = Engine(folder, device, dtype, settings.batch, queue, kept, settings.image_size)
        self.max_tokens = settings.max_tokens
        tags = {"model": name}
        self.requests = metrics.Counter("geodistill_requests", "answers, by how they ended", ("model", "ended"))
        self.requests.set_default_tags(tags)
        self.tokens = metrics.Counter("geodistill_response_tokens", "tokens written", ("model",))
        self.tokens.set_default_tags(tags)
        self.seconds = metrics.Histogram("geodistill_answer_seconds", "from question to answer", SECONDS, ("model",))
        self.seconds.set_default_tags(tags)
        self.waiting = metrics.Gauge("geodistill_waiting", "requests that wait for a place in the batch", ("model",))
        self.waiting.set_default_tags(tags)
        self.in_hand = metrics.Gauge("geodistill_batch", "requests in the batch", ("model",))
        self.in_hand.set_default_tags(tags)

    def about(self) -> dict:
        """{"size": pixels of a side of the images that it sees, "digest": of its weights}."""
        return {"size": self.engine.reader.size, "digest": self.engine.digest}

    def counts(self) -> dict:
        """What the engine has counted."""
        return dict(self.engine.counts)

    def check_health(self) -> None:
        """Raise what stopped the engine: Serve then makes this replica anew."""
        if self.engine.failed:
            raise self.engine.failed

    async def answer(self, asked: Asked) -> Said:
        """The whole answer."""
        return [said async for said in self.stream(asked, streams=False)][-1]

    async def stream(self, asked: Asked, streams: bool = True) -> AsyncIterator[Said]:
        """The answer as it grows, each time the whole text so far."""
        start = time.monotonic()
        if len(asked.pixels) != self.engine.reader.size:  # made for the replica of another student
            yield Said(str(self.engine.reader.size), status=OTHER_SIZE)
            return
        try:
            prompt = self.engine.reader.prompt(asked.turns)
        except ValueError as error:
            yield self._ended(Said(str(error), status=400), start)
            return
        room = self.engine.room(prompt)
        limit = min(asked.limit or self.max_tokens, self.max_tokens, room)
        if limit < 1:
            text = (
                f"the conversation has {len(prompt)} tokens, {1 - room} more than fit behind the image in {self.engine.context}"
            )
            yield self._ended(Said(text, status=400), start)
            return
        request = Request(
            prompt, content_key(asked.pixels), asked.pixels, limit, asked.temperature, asked.top_p, asked.seed,
            deadline=start + asked.seconds, streams=streams or bool(asked.stop),
        )  # fmt: skip
        self._gauge()
        try:
            async with aclosing(self.engine.answer(request)) as growing:
                shown = 0
                async for count in growing:
                    text, stopped = self._text(request.tokens[:count], asked.stop)
                    if stopped:
                        yield self._ended(Said(text, len(prompt), count, "stop"), start)
                        return
                    text = text[: len(text) - unfinished(text, asked.stop)]
                    if streams and len(text) > shown:
                        shown = len(text)
                        yield Said(text, len(prompt), count)
        except Full:
            yield self._ended(Said("too many requests wait for this model; try again in a second", status=429), start)
            return
        except TooLate:
            yield self._ended(Said(f"the answer took longer than {asked.seconds:g} s", status=504), start)
            return
        except Exception as error:  # of the model: the replica is lost
            yield self._ended(Said(f"the model stopped ({type(error).__name__}: {error})", status=503), start)
            return
        count = len(request.tokens)
        text, stopped = self._text(request.tokens, asked.stop)
        reason = "length" if count == limit and not stopped else "stop"
        score = math.exp(request.log_p / max(count + (reason == "stop"), 1))
        yield self._ended(Said(text, len(prompt), count, reason, score=score), start)

    def _text(self, tokens: list[int], stops: list[str]) -> tuple[str, bool]:
        text = self.engine.reader.text(tokens)
        at = min((found for stop in stops if stop and (found := text.find(stop)) >= 0), default=-1)
        return (text, False) if at < 0 else (text[:at], True)

    def _ended(self, said: Said, start: float) -> Said:
        self.requests.inc(tags={"ended": said.reason or str(said.status)})
        if said.reason:
            self.tokens.inc(max(said.tokens, 1))
            self.seconds.observe(time.monotonic() - start)
        self._gauge()
        return said

    def _gauge(self) -> None:
        self.waiting.set(len(self.engine.waiting))
        self.in_hand.set(len(self.engine.asked))


def unfinished(text: str, stops: list[str]) -> int:
    """How much of the end of a text may not be shown yet: the beginning of a stop, or of a character of several tokens."""
    parts = [stop[:k] for stop in stops for k in range(1, len(stop))]
    half = len(text) - len(text.rstrip("\ufffd"))  # some tokenizers give one a byte
    return max((len(part) for part in parts if text.endswith(part)), default=0) or half


def new_seed() -> int:
    """A seed for a request that gives none."""
    return secrets.randbits(63)
