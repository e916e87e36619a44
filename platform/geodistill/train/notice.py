"""SIGTERM to the process of a job, told to the workers of its stage. Light: the actor has a process of its own, without torch."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Notice:
    """An actor that tells the workers of a stage that it shall stop."""

    def __init__(self) -> None:
        self.given = asyncio.Event()

    async def give(self) -> None:
        self.given.set()

    async def wait(self) -> None:
        await self.given.wait()


@contextmanager
def notice_of_sigterm() -> Iterator[tuple[Any, threading.Event]]:
    """(a Notice, an event): inside, SIGTERM to this process gives the one and sets the other, in place of ending the process."""
    # on the node of this process: what a lost node held would be taken for the notice
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    notice: Any = ray.remote(Notice).options(num_cpus=0, scheduling_strategy=here).remote()
    try:
        with _sigterm(notice) as told:
            yield notice, told
    finally:
        ray.kill(notice)  # a worker's unanswered wait would keep it for as long as the job


@contextmanager
def _sigterm(notice: Any) -> Iterator[threading.Event]:
    told, wakes, ended = threading.Event(), threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python has signals for the main thread alone
        yield told
        return

    def tell() -> None:
        wakes.wait()
        if not ended.is_set():
            print("SIGTERM: the workers make a checkpoint and stop", flush=True)
            notice.give.remote()

    def on_signal(*_: Any) -> None:
        told.set()
        wakes.set()

    before = signal.signal(signal.SIGTERM, on_signal)
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: not Python's
        ended.set()
        wakes.set()
        teller.join()
