"""A prompt that was encoded once is not encoded again: not for another request, another workflow or, with a folder, another process.

Addressed by content: the encoder's revision, the text and the length. Knows no model; it is handed an encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import torch

from deployments.contracts import PromptEmbeds
from deployments.prompts.shared_folder import SharedFolder

_MEMORY_BYTES = 256 * 2**20
"""Sixty prompts of FLUX.1-dev: 512 tokens of 4096 numbers in bf16 are 4 MiB."""


class TextEncoder(Protocol):
    """What a cache stands before. revision: another one for whatever changes a number."""

    revision: str

    def encode(self, texts: Sequence[str], max_length: int) -> PromptEmbeds: ...


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """Since the cache was made. hits: texts found in memory, or on their way; shared_hits: in the folder; encodes: by the encoder."""

    hits: int = 0
    shared_hits: int = 0
    encodes: int = 0
    bytes: int = 0


class PromptCache:
    """An encoder that remembers. The least recently used texts are forgotten; of equal texts asked for at once, one is encoded."""

    def __init__(self, encoder: TextEncoder, *, memory_bytes: int = _MEMORY_BYTES, folder: SharedFolder | None = None) -> None:
        self._encoder, self._folder, self._memory_bytes = encoder, folder, memory_bytes
        self._lock = Lock()
        self._kept: OrderedDict[str, PromptEmbeds] = OrderedDict()
        self._coming: dict[str, Future[PromptEmbeds]] = {}
        self._hits = self._shared_hits = self._encodes = self._bytes = 0

    def encode(self, texts: Sequence[str], max_length: int) -> PromptEmbeds:
        """One row a text, as the encoder gives it; copies, which are the caller's own. Raises what the encoder raises."""
        if not texts:
            raise ValueError("There is no text to encode.")
        rows = [self._row(text, max_length) for text in texts]
        return PromptEmbeds(torch.cat([row.states for row in rows]), torch.cat([row.pooled for row in rows]))

    def stats(self) -> CacheStats:
        with self._lock:
            return CacheStats(hits=self._hits, shared_hits=self._shared_hits, encodes=self._encodes, bytes=self._bytes)

    def _row(self, text: str, max_length: int) -> PromptEmbeds:
        key = self._key(text, max_length)
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                self._hits += 1
                return kept
            coming = self._coming.get(key)
            if coming is None:
                ours: Future[PromptEmbeds] = Future()
                self._coming[key] = ours
            else:
                self._hits += 1
        return self._settled(ours, key, text, max_length) if coming is None else coming.result()

    def _settled(self, ours: Future[PromptEmbeds], key: str, text: str, max_length: int) -> PromptEmbeds:
        """Makes the row and hands it, or the error, to whoever waits for it."""
        try:
            row = self._made(key, text, max_length)
        except BaseException as error:
            with self._lock:
                del self._coming[key]
            ours.set_exception(error)
            raise
        with self._lock:
            self._keep(key, row)
            del self._coming[key]
        ours.set_result(row)
        return row

    def _made(self, key: str, text: str, max_length: int) -> PromptEmbeds:
        shared = self._folder.get(key) if self._folder is not None else None
        if shared is not None:
            with self._lock:
                self._shared_hits += 1
            return shared
        row = self._encoder.encode([text], max_length)
        with self._lock:
            self._encodes += 1
        if self._folder is not None:
            self._folder.put(key, row)
        return row

    def _keep(self, key: str, row: PromptEmbeds) -> None:
        self._kept[key] = row
        self._bytes += _size(row)
        while self._bytes > self._memory_bytes:
            _, forgotten = self._kept.popitem(last=False)
            self._bytes -= _size(forgotten)

    def _key(self, text: str, max_length: int) -> str:
        return hashlib.sha256(json.dumps([self._encoder.revision, max_length, text]).encode()).hexdigest()


def _size(row: PromptEmbeds) -> int:
    return row.states.nbytes + row.pooled.nbytes
