"""The models behind the endpoint: asked through Serve, and again on another replica where one was lost."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serving.model import OTHER_SIZE, Asked, Said
from serving.openai import Refused

BUSY = "too many requests wait for this model; try again in a second"
READY = 10.0  # seconds in which a model that is ready tells about itself
TRIES = 6  # replicas that a request is sent to before it is given up
logger = logging.getLogger("ray.serve")


Show = Callable[[int], np.ndarray]  # an image as a model of a size sees it, uint8 [S, S, 3]


class ReplicaLost(Exception):
    """The model of a replica stopped."""


class OtherSize(Exception):
    """The replica sees images of another size, which this is: another student has come."""


LOST = (RayActorError, DeploymentUnavailableError, ReplicaLost)


class Models:
    """handles: of each model by its name."""

    def __init__(self, handles: dict[str, DeploymentHandle]):
        self.handles = handles
        self.sizes: dict[str, int] = {}
        self.asks = asyncio.Lock()

    async def size(self, name: str, seconds: float, again: bool = False) -> int:
        """Pixels of a side of the images that a model sees, waited for as long as `seconds`; again: ask for it, also where it is
        known. Raises Refused."""
        if name in self.sizes and not again:
            return self.sizes[name]
        try:
            async with asyncio.timeout(seconds), self.asks:  # once, however many requests come first
                if again or name not in self.sizes:
                    self.sizes[name] = (await self.handles[name].about.remote())["size"]
        except BackPressureError as error:
            raise Refused(429, BUSY, retry_after=1) from error
        except (TimeoutError, *LOST) as error:
            raise Refused(503, f"{name} does not answer yet", retry_after=2) from error
        return self.sizes[name]

    async def _seen(self, name: str, asked: Asked, show: Show, end: float) -> Asked:
        """The question with the image as the model sees it."""
        size = await self.size(name, max(end - time.monotonic(), 0.01))
        if len(asked.pixels) == size:
            return asked
        return replace(asked, pixels=await asyncio.get_running_loop().run_in_executor(None, show, size))

    async def ask(self, name: str, asked: Asked, show: Show, waits: bool = False) -> Said:
        """The answer of a model to a question on the image `show`, asked again where a replica is lost; waits: and where too many
        wait. Raises Refused."""
        end = time.monotonic() + asked.seconds
        attempt = 0
        while attempt < TRIES:
            try:
                asked = await self._seen(name, asked, show, end)
                said = await asyncio.wait_for(self.handles[name].answer.remote(asked), max(end - time.monotonic(), 0.01))
                return _checked(said)
            except OtherSize as other:
                self.sizes[name] = int(str(other))
                attempt += 1
            except LOST as error:
                await self._again(name, attempt, error)
                attempt += 1
            except BackPressureError as error:
                if not waits or time.monotonic() > end:
                    raise Refused(429, BUSY, retry_after=1) from error
                await asyncio.sleep(0.2)
            except TimeoutError as error:
                raise Refused(504, f"the answer took longer than {asked.seconds:g} s") from error
        raise Refused(503, f"{name} lost its replicas {TRIES} times while it answered", retry_after=5)

    async def grow(self, name: str, asked: Asked, show: Show) -> AsyncIterator[Said]:
        """The answer as it grows. Where a replica is lost another one begins anew, which writes the same: nothing is said twice,
        and what a client has got already stands. Raises Refused, before the first words or after."""
        shown, end = "", time.monotonic() + asked.seconds
        for attempt in range(TRIES):
            try:
                asked = await self._seen(name, asked, show, end)
                growing: Any = self.handles[name].options(stream=True).stream.remote(asked)
                pieces = aiter(growing)
                while True:
                    try:
                        said = await asyncio.wait_for(anext(pieces), max(end - time.monotonic(), 0.01))
                    except StopAsyncIteration:
                        return
                    _checked(said)
                    if said.reason or len(said.text) > len(shown):
                        if not said.text.startswith(shown):
                            raise Refused(503, f"{name} lost a replica in the middle of an answer; ask again")
                        shown = said.text
                        yield said
            except OtherSize as other:
                self.sizes[name] = int(str(other))
            except LOST as error:
                await self._again(name, attempt, error)
            except BackPressureError as error:
                raise Refused(429, BUSY, retry_after=1) from error
            except TimeoutError as error:
                raise Refused(504, f"the answer took longer than {asked.seconds:g} s") from error
        raise Refused(503, f"{name} lost its replicas {TRIES} times while it answered", retry_after=5)

    async def _again(self, name: str, attempt: int, error: Exception) -> None:
        logger.warning("%s: a replica was lost (%s); the request is sent to another one", name, type(error).__name__)
        await asyncio.sleep(0.05 * 2**attempt)


def _checked(said: Said) -> Said:
    if said.status == OTHER_SIZE:
        raise OtherSize(said.text)
    if said.status == 503:
        raise ReplicaLost(said.text)
    if said.status != 200:
        raise Refused(said.status, said.text, retry_after=1 if said.status == 429 else None)
    return said
