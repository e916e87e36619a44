"""Models behind the endpoint, without Serve: another student comes while requests are asked."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from serving.client import Models
from serving.model import OTHER_SIZE, Asked, Said
from serving.openai import Refused


class Handle:
    """A model whose replicas see images of `sizes`, a request after the other; None: nobody answers."""

    def __init__(self, sizes: list):
        self.sizes, self.seen = sizes, []
        self.about, self.answer = (SimpleNamespace(remote=work) for work in (self._about, self._answer))
        self.stream = SimpleNamespace(remote=self._stream)

    def options(self, stream: bool):
        return self

    async def _about(self) -> dict:
        if self.sizes[0] is None:
            await asyncio.sleep(60)
        return {"size": self.sizes[0]}

    async def _answer(self, asked: Asked) -> Said:
        size = self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0]
        self.seen.append(len(asked.pixels))
        return Said("a ship", reason="stop") if len(asked.pixels) == size else Said(str(size), status=OTHER_SIZE)

    async def _stream(self, asked: Asked):
        yield await self._answer(asked)


def show(size: int) -> np.ndarray:
    return np.zeros((size, size, 3), np.uint8)


@pytest.mark.parametrize("streams", [False, True])
def test_a_student_of_another_image_size_is_shown_the_image_again(streams):
    handle = Handle([64, 128])
    models = Models({"student": handle})

    async def ask() -> Said:
        if streams:
            return [said async for said in models.grow("student", Asked([("?", None)]), show)][-1]
        return await models.ask("student", Asked([("?", None)]), show)

    assert [asyncio.run(ask()).text for _ in range(2)] == ["a ship"] * 2
    handle.sizes = [128]
    assert asyncio.run(ask()).text == "a ship" and handle.seen == [64, 64, 128, 128]
    assert models.sizes == {"student": 128}


def test_a_model_that_loads_is_waited_for_as_long_as_an_answer_may_take():
    models = Models({"student": Handle([None])})

    async def ask_many() -> list:
        asked = [models.ask("student", Asked([("?", None)], seconds=0.2), show) for _ in range(5)]
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 2)  # together, not one after another

    found = asyncio.run(ask_many())
    assert all(isinstance(error, Refused) and error.status == 503 for error in found)
