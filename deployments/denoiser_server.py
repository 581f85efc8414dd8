"""DenoiserServer: one base model with its adapters; draws one picture at a time and stops within a step. See deployments/denoisers/.

Drawing happens in a thread of its own, so that the event loop can hear a cancel. The slot of a cancelled request frees when its
thread has left the model, never before; that of one which waits for its turn, at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import copy_context
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from pydantic import Field

from deployments import metrics
from deployments.catalog import load_catalog
from deployments.contracts import Drawn, GenerationSpec, Guides, Identities, Progress, Prompts
from deployments.hardware import MemoryMode, TorchSettings, claim, forget_peak, peak_bytes
from deployments.store.settings import StoreSettings

if TYPE_CHECKING:
    from deployments.store.loras import LoraStore

_LOG = logging.getLogger("likeness.denoiser")


class DenoiserSettings(TorchSettings):
    """memory: how the weights lie (docs/memory_modes.md; fp8 and nf4 change pixels). lora_cache_bytes: of LoRAs on the device between
    requests. cache_threshold: of the first-block cache (docs/first_block_cache.md; it changes pixels); 0 is without it."""

    memory: MemoryMode = "full"
    lora_cache_bytes: int = Field(default=2 * 2**30, ge=0)
    cache_threshold: float = Field(default=0.0, ge=0, le=1)


class DenoiserServer:
    def __init__(
        self, base: str, methods: Sequence[str], controlnets: Sequence[str], store: StoreSettings, settings: DenoiserSettings
    ) -> None:
        """base, methods, controlnets: ids of the catalogue; the adapter of every method is attached for good. store: where LoRAs lie."""
        dtype = claim(settings)
        catalog = load_catalog()
        entry = catalog.entry(base)
        adapters = {}
        for method in methods:
            own = catalog.entry(method)
            adapters[method] = partial(catalog.part(own, "adapter"), path=own.located("adapter"))
        controls = {}
        for name in controlnets:
            own = catalog.entry(name)
            controls[name] = partial(catalog.part(own, "control"), folder=own.located("controlnet"), modes=own.options["modes"])
        denoiser = catalog.part(entry, "denoiser")
        self._denoiser: Any = denoiser(
            entry.located("pipeline"), adapters, controls=controls, files=entry.single_files("transformer", "vae"),
            loras=_lora_files(store), lora_cache_bytes=settings.lora_cache_bytes,
            memory=settings.memory, cache_threshold=settings.cache_threshold, device=settings.device, dtype=dtype,
        )  # fmt: skip
        self._thread, self._turn, self._device = ThreadPoolExecutor(1, "denoise"), asyncio.Lock(), settings.device
        self._lora_cache, self._applied = metrics.lora_cache(), frozenset[tuple[str, float]]()

    async def generate(
        self, spec: GenerationSpec, identities: Identities, prompts: Prompts, guides: Guides, previews: int = 0
    ) -> AsyncIterator[Progress | Drawn]:
        """Progress after every step, then the picture. Cancelled, or left by its reader, it stops before the next forward.

        previews: so many steps, at most, bring a small picture of what is coming.
        """
        async with self._turn:
            async with aclosing(self._drawing(spec, identities, prompts, guides, previews)) as events:
                async for event in events:
                    yield event

    async def _drawing(
        self, spec: GenerationSpec, identities: Identities, prompts: Prompts, guides: Guides, previews: int
    ) -> AsyncGenerator[Progress | Drawn]:
        loop, events, cancelled = asyncio.get_running_loop(), asyncio.Queue[Progress | None](), Event()

        def report(event: Progress | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        given = spec, prompts.embeds, identities.tokens, guides
        draw = partial(self._drawn, *given, on_step=report, cancelled=cancelled.is_set, previews=previews)
        # In a copy of this task's context: what is logged while drawing carries the request's id.
        drawing = loop.run_in_executor(self._thread, copy_context().run, draw)
        drawing.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            drawn: Drawn = await drawing
            spent = {stage: round(value, 4) for stage, value in drawn.seconds.items()}
            _LOG.info("a picture was drawn", extra={"steps": spec.steps, "seconds": spent})
            yield replace(drawn, seconds={**prompts.seconds, **identities.seconds, **guides.seconds, **drawn.seconds})
        finally:
            if not drawing.done():
                _LOG.info("a drawing is not wanted any more")
            cancelled.set()
            await _over(drawing)
            self._count(spec)

    def _drawn(self, *given: Any, **options: Any) -> Drawn:
        """One at a time, in the thread of drawing: the peak is this picture's."""
        forget_peak(self._device)
        drawn: Drawn = self._denoiser.draw(*given, **options)
        return replace(drawn, peak_bytes=peak_bytes(self._device))

    def _count(self, spec: GenerationSpec) -> None:
        loras = frozenset((lora.sha256, lora.scale) for lora in spec.loras if lora.scale)
        if loras != self._applied:
            metrics.swapped(spec.base)
        self._applied = loras
        counts = self._denoiser.lora_counts
        self._lora_cache.tell({"hit": counts.hits, "miss": counts.misses, "evicted": counts.evictions})

    def ready(self) -> bool:
        return True


def _lora_files(store: StoreSettings) -> Callable[[str], Path]:
    """Where the file of a sha256 lies. Opens no database before a LoRA is asked for."""

    @cache
    def opened() -> LoraStore:
        from deployments.store.loras import LoraStore

        return LoraStore(store.database, store.files)

    return lambda sha256: opened().path(sha256)


async def _over(work: asyncio.Future[Drawn]) -> None:
    """Returns when the work has ended, however often this task is cancelled meanwhile."""
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            continue
    if not work.cancelled():
        work.exception()  # seen: whoever was left has no use for it
