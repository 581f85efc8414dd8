"""Previews of a drawing: which steps show one, how small it is, and what the picture would be if it ended there.

A preview is a look and nothing more: it reads the latents, draws no random number and touches nothing that a later step reads, so the
picture at the end is the same, bit for bit, with previews and without. Knows no VAE: it is handed a function that decodes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deployments.contracts import RGB
from deployments.denoisers.latents import Grid, unpack

_LOG = logging.getLogger(__name__)
LONGEST_SIDE = 256
"""Pixels of a preview's longer side, at most: decoding one costs a sixteenth of decoding a picture of 1024 x 1024."""

Decode = Callable[[Tensor], RGB]
"""[1, channels, h, w] latents as the transformer has them -> the picture."""


def preview_steps(total: int, most: int) -> frozenset[int]:
    """The steps, of 1..total, that show a preview: `most` of them or fewer, evenly spread. The last never does, the picture follows it."""
    count = max(0, min(most, total - 1))
    return frozenset(place * total // (count + 1) for place in range(1, count + 1))


def shrunk(latents: Tensor, pixels_per_latent: int) -> Tensor:
    """[1, c, h, w] -> [1, c, h', w'], averaged so that the decoded longer side is at most LONGEST_SIDE; as they are where it is so.

    Averaged latents are about the latents of the averaged picture, which is what makes a preview cheap; some contrast is lost on the way.
    """
    sides = latents.shape[-2:]
    share = LONGEST_SIDE / pixels_per_latent / max(sides)
    if share >= 1:
        return latents
    height, width = (max(1, int(side * share)) for side in sides)
    return F.adaptive_avg_pool2d(latents, (height, width))


class Previews:
    """Of one drawing."""

    def __init__(self, steps: frozenset[int], grid: Grid, pixels_per_latent: int, decode: Decode) -> None:
        """steps: of `preview_steps`. pixels_per_latent: of the VAE along a side. decode: called in the drawing's thread."""
        self._steps, self._grid, self._scale, self._decode = steps, grid, pixels_per_latent, decode
        self._made: tuple[int, RGB] | None = None

    def look(self, step: int, clean: Tensor) -> None:
        """step: that is done, from 1. clean: the latents without noise as that step would have them, [1, tokens, channels] fp32.

        Where the device has no room for the decoder beside the transformer there are no previews, and the drawing goes on.
        """
        if step not in self._steps:
            return
        try:
            self._made = step, self._decode(shrunk(unpack(clean, self._grid), self._scale))
        except torch.OutOfMemoryError:
            self._steps = frozenset()
            _LOG.warning("There is no room for previews beside the transformer; this picture is drawn without.")

    def of(self, step: int) -> RGB | None:
        """What was seen after that step, if anything was."""
        return self._made[1] if self._made is not None and self._made[0] == step else None
