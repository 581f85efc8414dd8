"""LoRAs kept on the device between requests, found by the sha256 of their file.

What a request holds is never taken away from it; of the rest the longest unused goes first. Knows no files, no ids and no owners.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from deployments.denoisers.lora.weights import LoraWeights

Load = Callable[[], LoraWeights]


@dataclass(frozen=True)
class CacheCounts:
    """Since the cache was made: requests served from it, files read for it, LoRAs that were let go; and what it holds now."""

    hits: int
    misses: int
    evictions: int
    entries: int
    nbytes: int


@dataclass(eq=False)
class _Entry:
    holders: int = 0
    weights: LoraWeights | None = None
    nbytes: int = 0
    loading: threading.Lock = field(default_factory=threading.Lock)


class LoraCache:
    """For one device and one transformer (a LoRA is read for a transformer). Any thread may hold and let go."""

    def __init__(self, limit_bytes: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """limit_bytes: of tensors on the device. What is held at once may exceed it; what is not held goes then. 0 keeps nothing."""
        if limit_bytes < 0:
            raise ValueError(f"A cache of {limit_bytes} bytes cannot be; 0 keeps nothing.")
        self._limit, self._device, self._dtype = limit_bytes, device, dtype
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._guard = threading.Lock()
        self._hits = self._misses = self._evictions = 0

    @property
    def counts(self) -> CacheCounts:
        with self._guard:
            return CacheCounts(self._hits, self._misses, self._evictions, len(self._entries), self._nbytes())

    @contextmanager
    def held(self, sha256: str, load: Load) -> Iterator[LoraWeights]:
        """The LoRA on the device, in the cache's type, for as long as the context lasts.

        load: reads the file; called only if the LoRA is not here, by one thread a LoRA while others go on. What it raises is passed on,
        and the next request tries anew.
        """
        with self._guard:
            entry = self._entries.setdefault(sha256, _Entry())
            self._entries.move_to_end(sha256)
            entry.holders += 1
        try:
            yield self._weights(entry, load)
        finally:
            with self._guard:
                entry.holders -= 1
                self._let_go()

    def drop(self, sha256: str) -> bool:
        """Lets one LoRA go that nobody holds (its owner deleted it). False if it is not here, or is held."""
        with self._guard:
            entry = self._entries.get(sha256)
            if entry is None or entry.holders:
                return False
            del self._entries[sha256]
            return True

    def _weights(self, entry: _Entry, load: Load) -> LoraWeights:
        with entry.loading:
            hit = entry.weights is not None
            weights = entry.weights or load().to(self._device, self._dtype)
            nbytes = entry.nbytes if hit else weights.nbytes
            with self._guard:
                entry.weights, entry.nbytes = weights, nbytes
                self._hits += hit
                self._misses += not hit
                self._let_go()
            return weights

    def _let_go(self) -> None:
        """With the guard held. An entry whose load failed has no weights, and goes with its last holder."""
        for sha256, entry in list(self._entries.items()):
            if entry.holders:
                continue
            if entry.weights is None:
                del self._entries[sha256]
            elif self._nbytes() > self._limit:
                del self._entries[sha256]
                self._evictions += 1

    def _nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())
