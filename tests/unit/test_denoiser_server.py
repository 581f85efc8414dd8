"""Several requests at one denoiser: one is drawn, the others wait at hand, and whoever leaves there costs nothing."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from deployments.contracts import RGB, Drawn, GenerationSpec, Guides, Identities, Prompts
from deployments.denoiser_server import DenoiserServer, DenoiserSettings
from deployments.store.settings import StoreSettings
from tests.mini_drawing import forwards, spec, texts


@pytest.fixture
def server(tmp_path: Path) -> DenoiserServer:
    return DenoiserServer("flux1-mini", [], [], StoreSettings(url=f"sqlite:///{tmp_path}/s.db", folder=tmp_path), DenoiserSettings())


async def _picture(server: DenoiserServer, asked: GenerationSpec, prompts: Prompts | None = None) -> RGB:
    async for event in server.generate(asked, Identities(), prompts or Prompts(texts(), {}), Guides()):
        if isinstance(event, Drawn):
            assert event.peak_bytes is not None and event.peak_bytes > 100 * 2**20
            return event.picture
    raise AssertionError("no picture came")


def test_who_waits_at_hand_is_drawn_next_and_who_leaves_there_leaves_at_once(server: DenoiserServer) -> None:
    async def crowd() -> tuple[RGB, RGB, float]:
        first = asyncio.create_task(_picture(server, spec(seed=1, steps=8)))
        await asyncio.sleep(0.05)
        leaving, second = (asyncio.create_task(_picture(server, spec(seed=seed, steps=8))) for seed in (2, 3))
        await asyncio.sleep(0.05)
        left = time.perf_counter()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        took = time.perf_counter() - left
        assert not first.done() and not second.done()
        return await first, await second, took

    alone = [asyncio.run(_picture(server, spec(seed=seed, steps=8))) for seed in (1, 3)]
    started = time.perf_counter()
    asyncio.run(_picture(server, spec(seed=1, steps=8)))
    whole = time.perf_counter() - started
    with forwards(server._denoiser) as begun:
        *together, took = asyncio.run(crowd())
    assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))
    assert len(begun) == 16 and took < whole / 2


def test_of_who_leaves_while_waiting_nothing_is_kept_until_the_drawing_ends(server: DenoiserServer) -> None:
    async def crowd() -> list[bool]:
        first = asyncio.create_task(_picture(server, spec(seed=1, steps=8)))
        await asyncio.sleep(0.05)
        kept = []
        for seed in range(5):
            prompts = Prompts(texts(), {})
            kept.append(weakref.ref(prompts))
            waiting = asyncio.create_task(_picture(server, spec(seed=seed), prompts))
            del prompts
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.wait({waiting})
            del waiting
        gc.collect()
        held = [reference() is not None for reference in kept]
        assert not first.done()
        await first
        return held

    assert not any(asyncio.run(crowd()))
