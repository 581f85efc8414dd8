"""DenoiserServer: one base model with its adapters; draws one picture at a time and stops within a step. See deployments/denoisers/.

Drawing happens in a thread of its own, so that the event loop can hear a cancel. The slot of a cancelled request frees when its
thread has left the model, never before.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any

from deployments.catalog import load_catalog
from deployments.contracts import Drawn, GenerationSpec, Identities, Progress, Prompts
from deployments.hardware import TorchSettings, claim


class DenoiserServer:
    def __init__(self, base: str, methods: Sequence[str], settings: TorchSettings) -> None:
        """base, methods: ids of the catalogue; the adapter of every method is attached for good."""
        dtype = claim(settings)
        catalog = load_catalog()
        entry = catalog.entry(base)
        adapters = {}
        for method in methods:
            own = catalog.entry(method)
            adapters[method] = partial(catalog.part(own, "adapter"), path=own.located("adapter"))
        denoiser = catalog.part(entry, "denoiser")
        self._denoiser: Any = denoiser(entry.located("pipeline"), adapters, device=settings.device, dtype=dtype)
        self._thread = ThreadPoolExecutor(1, "denoise")

    async def generate(self, spec: GenerationSpec, identities: Identities, prompts: Prompts) -> AsyncIterator[Progress | Drawn]:
        """Progress after every step, then the picture. Cancelled, or left by its reader, it stops before the next forward."""
        loop, events, cancelled = asyncio.get_running_loop(), asyncio.Queue[Progress | None](), Event()

        def report(event: Progress | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        draw = partial(self._denoiser.draw, spec, prompts.embeds, identities.tokens, on_step=report, cancelled=cancelled.is_set)
        drawing = loop.run_in_executor(self._thread, draw)
        drawing.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            drawn: Drawn = await drawing
            yield replace(drawn, seconds={**prompts.seconds, **identities.seconds, **drawn.seconds})
        finally:
            cancelled.set()
            await _over(drawing)

    def ready(self) -> bool:
        return True


async def _over(work: asyncio.Future[Drawn]) -> None:
    """Returns when the work has ended, however often this task is cancelled meanwhile."""
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            continue
    if not work.cancelled():
        work.exception()  # seen: whoever was left has no use for it
