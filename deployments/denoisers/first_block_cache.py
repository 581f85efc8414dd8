"""The first-block cache on a FLUX transformer: where the first block changes little from step to step, the other blocks are skipped.

diffusers' own (hooks/first_block_cache.py), put over whatever adapters have hooked into the blocks before: what is cached is then a block
with its identity inside. Hooked the other way round an identity is counted twice. It changes pixels. Knows no request.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from diffusers import FirstBlockCacheConfig

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


class FirstBlockCache:
    """In force from construction to `eject`. Construct it after every adapter was attached, and eject it before the first of them goes."""

    def __init__(self, transformer: FluxTransformer2DModel, threshold: float) -> None:
        """threshold: relative change of the first block's residual below which a step is skipped; 0.05 to 0.12 is common."""
        self._transformer = cast(Any, transformer)  # diffusers declares no attribute
        self._transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))

    def forget(self) -> None:
        """Before a drawing: nothing of the one before is to be seen in it."""
        self._transformer._reset_stateful_cache()

    def eject(self) -> None:
        """Leaves the transformer as it was."""
        self._transformer.disable_cache()


def cached(transformer: FluxTransformer2DModel, name: str) -> AbstractContextManager[None]:
    """Around a forward: whose residuals are compared, so that the two passes of true CFG keep apart. Nothing where there is no cache."""
    model = cast(Any, transformer)
    return cast(AbstractContextManager[None], model.cache_context(name)) if model.is_cache_enabled else nullcontext()
