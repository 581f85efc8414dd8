"""PromptServer: texts in, embeddings out, each text encoded once for all requests and workflows. See deployments/prompts/."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deployments import metrics
from deployments.catalog import load_catalog
from deployments.contracts import Prompts
from deployments.hardware import TorchSettings, claim


class PromptSettings(TorchSettings):
    """cache_folder: where replicas share what they encoded; None: each remembers for itself. cache_bytes: kept in memory."""

    cache_folder: str | None = None
    cache_bytes: int = 256 * 2**20


class PromptServer:
    def __init__(self, base: str, settings: PromptSettings) -> None:
        """base: the catalogue's id of the base model whose text encoders these are."""
        from deployments.prompts.cache import PromptCache
        from deployments.prompts.shared_folder import SharedFolder

        dtype = claim(settings)
        catalog = load_catalog()
        entry = catalog.entry(base)
        encoders = catalog.part(entry, "prompts")
        self._encoder: Any = encoders(
            entry.located("pipeline"), settings.device, dtype, files=entry.single_files("text_encoder", "text_encoder_2")
        )
        shared = SharedFolder(Path(settings.cache_folder)) if settings.cache_folder else None
        self._cache = PromptCache(self._encoder, memory_bytes=settings.cache_bytes, folder=shared)
        self._counted = metrics.prompt_cache()

    def encode(self, texts: Sequence[str], max_length: int) -> Prompts:
        started = time.perf_counter()
        embeds = self._cache.encode(texts, max_length)
        stats = self._cache.stats()
        self._counted.tell({"memory": stats.hits, "folder": stats.shared_hits, "encoder": stats.encodes})
        return Prompts(embeds, {"prompts": time.perf_counter() - started})

    def unread(self, texts: Sequence[str], max_length: int) -> tuple[str, ...]:
        """Of each text the end that is not read."""
        return tuple(self._encoder.unread(text, max_length) for text in texts)

    def stats(self) -> dict[str, int]:
        """Texts found in memory, found in the shared folder, encoded; bytes kept."""
        return asdict(self._cache.stats())

    def ready(self) -> bool:
        return True
