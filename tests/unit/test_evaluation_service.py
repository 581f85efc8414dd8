"""The thread in which an evaluation draws through a service: its own, and gone when the evaluation is over, however it ends."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serve.settings import load_settings
from training.evaluation.service import Service

SECONDS = 20


def service() -> Service:
    return Service(None, "ada", load_settings("local").faces.models)


async def alone() -> None:
    """One thread for everything that the loop does beside: whoever kept it would stop all others."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("evaluation")]


def test_it_keeps_no_thread_that_others_need_and_none_afterwards() -> None:
    going = threading.Event()

    async def run() -> Any:
        await alone()
        running = asyncio.create_task(service().run(lambda: going.wait(SECONDS) and threads()))
        await asyncio.wait_for(asyncio.to_thread(going.set), SECONDS / 2)
        return await running

    assert len(asyncio.run(run())) == 1 and not _left()


@pytest.mark.parametrize("cancelled", [False, True])
def test_nor_where_it_does_not_end_well(cancelled: bool) -> None:
    begun, over = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        over.wait(SECONDS if cancelled else 0)
        raise ValueError("It did not work.")

    async def run() -> None:
        await alone()
        running = asyncio.create_task(service().run(work))
        await asyncio.to_thread(begun.wait, SECONDS)
        if cancelled:
            running.cancel()
            asyncio.get_running_loop().call_later(0.1, over.set)
        await running

    with pytest.raises(asyncio.CancelledError if cancelled else ValueError):
        asyncio.run(run())
    assert not _left()


def _left() -> list[str]:
    for thread in threading.enumerate():
        if thread.name.startswith("evaluation"):
            thread.join(SECONDS)
    return threads()
