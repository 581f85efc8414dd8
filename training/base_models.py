"""What a training needs of a base model, and which module opens it for which family. Knows no adapter, data or loss.

A new family is one module beside flux_base.py and qwen_base.py, its objective and target modules, and one entry of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from PIL.Image import Image

from deployments.catalog import Catalog, Entry
from deployments.contracts import PromptEmbeds
from deployments.errors import UnsupportedCombination
from deployments.prompts.cache import TextEncoder
from training.flux_base import FluxBase
from training.latent_cache import Moments
from training.qwen_base import QwenBase

Draw = Callable[[PromptEmbeds, PromptEmbeds, int, int], Image]
"""(a prompt's row, the empty text's row, side in pixels, seed) -> a square picture, drawn as the base's own pipeline does."""


class Base(Protocol):
    """One base model; each part is opened when it is asked for and no sooner, and strictly: a key that is missing or left over is
    CheckpointMismatch, which names it.

    text_tokens: places of a caption. pixels_of_a_token: its side.
    """

    entry: Entry
    text_tokens: int
    pixels_of_a_token: int

    def prompts(self) -> TextEncoder:
        """What encodes captions."""
        ...

    def moments(self) -> Moments:
        """What encodes pictures, in fp32: once per picture, and a picture's latent is a target."""
        ...

    def vae_revision(self) -> str:
        """Names the VAE's weights by their content."""
        ...

    def outline(self) -> Any:
        """The transformer on the meta device: shapes without numbers."""
        ...

    def transformer(self) -> Any:
        """On the base's device, in its type, frozen."""
        ...

    def tokenisers(self) -> dict[str, Any]:
        """Of its text encoders, by the names that people know."""
        ...

    def drawing(self, transformer: Any) -> Draw:
        """Draws with this transformer, as it is at each call."""
        ...


_FAMILIES: dict[str, Callable[[Catalog, Entry, torch.device, torch.dtype], Base]] = {"flux1": FluxBase, "qwen-image": QwenBase}


def open_base(catalog: Catalog, entry: Entry, device: torch.device, dtype: torch.dtype) -> Base:
    """device: where models are put; dtype: of their weights. Raises UnsupportedCombination for a family that cannot be opened, and as
    `Entry.located`."""
    if entry.family not in _FAMILIES:
        message = f"The weights of {entry.id} cannot be opened for training."
        raise UnsupportedCombination(message, f"Use a base model of {' or '.join(sorted(_FAMILIES))}.")
    return _FAMILIES[entry.family](catalog, entry, device, dtype)
