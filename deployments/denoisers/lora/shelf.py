"""The LoRAs of requests, ready for one transformer: found by the sha256 of their files, read once, kept while they are wanted.

Knows no ids and no owners: whoever may use which LoRA was decided where ids became hashes. Nor where files lie: a function says it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from deployments.contracts import LoraRequest
from deployments.denoisers.lora.cache import CacheCounts, LoraCache
from deployments.denoisers.lora.formats import open_lora
from deployments.denoisers.lora.stack import refuse_scales
from deployments.denoisers.lora.weights import LoraWeights
from deployments.errors import UnsupportedCombination

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

Files = Callable[[str], Path]
"""sha256 of a LoRA -> its file. Raises a LikenessError where it is gone."""
Stack = list[tuple[LoraWeights, float]]


class LoraShelf:
    """For one transformer, in its type and on its device. Any thread may hold."""

    def __init__(self, transformer: FluxTransformer2DModel, files: Files | None, limit_bytes: int) -> None:
        """files: None where no LoRAs are served. limit_bytes: see LoraCache."""
        model = cast(Any, transformer)  # diffusers declares no attribute
        self._transformer, self._files = transformer, files
        self._cache = LoraCache(limit_bytes, device=model.device, dtype=model.dtype)

    @property
    def counts(self) -> CacheCounts:
        return self._cache.counts

    @contextmanager
    def held(self, loras: Sequence[LoraRequest]) -> Iterator[Stack]:
        """Their weights and scales, in order, for as long as the context lasts; those of scale 0 are left out.

        Raises UnsupportedCombination where no LoRAs are served, InvalidRequest for a scale out of range, and as `open_lora` does.
        """
        with ExitStack() as stack:
            held = [(stack.enter_context(self._one(lora)), lora.scale) for lora in loras if lora.scale]
            refuse_scales(held)
            yield held

    def _one(self, lora: LoraRequest) -> Any:
        if self._files is None:
            raise UnsupportedCombination("This server draws without LoRAs.", "Leave `loras` out, or set a folder for them in its settings.")
        files = self._files
        return self._cache.held(lora.sha256, lambda: open_lora(files(lora.sha256), self._transformer))
