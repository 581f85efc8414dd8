"""What a background is painted with: plain colours, washes, soft-edged fills, lights, and random numbers for repeated things.

Knows no place. Random choices among repeated things (lit windows, books) come from an integer hash of their cell, never from the
sine of a large number: a CPU and a GPU must choose the same windows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.mini.world.canvas import Canvas, Grid, cover

SOFTNESS_PIXELS = 1.25
Colour = str | Tensor
"""A colour as "#rrggbb", or as a tensor broadcastable to [n, 3, H, W] in 0..1."""


class Sheet:
    """One batch of backgrounds of one place, under way. x, y: [n, H, W] picture coordinates; edge: [n, 1, 1] soft border."""

    def __init__(self, grid: Grid, variation: Tensor) -> None:
        self.x, self.y = grid.x, grid.y
        self.edge = grid.pixel.view(-1, 1, 1) * SOFTNESS_PIXELS
        self._variation = variation
        self._canvas = Canvas(torch.zeros(grid.x.shape[0], 3, *grid.x.shape[1:], device=grid.x.device))

    @property
    def rgb(self) -> Tensor:
        """[n, 3, H, W] in 0..1."""
        return self._canvas.rgb

    def vary(self, index: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Scene.variation[:, index], spread over low..high; [n, 1, 1]."""
        return low + (high - low) * self._variation[:, index].view(-1, 1, 1)

    def side(self, index: int) -> Tensor:
        """-1 or +1 per picture: on which side a thing stands; [n, 1, 1]."""
        return torch.where(self.vary(index) > 0.5, 1.0, -1.0)

    def seed(self, index: int) -> Tensor:
        """An integer per picture to hash cells with; exact on every device, as a product with a power of two is. [n, 1, 1]."""
        return (self.vary(index) * 65536).long()

    def tone(self, colour: Colour) -> Tensor:
        """Any Colour as a tensor; "#rrggbb" becomes [1, 3, 1, 1]."""
        if isinstance(colour, Tensor):
            return colour
        levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return torch.tensor(levels, device=self.x.device).view(1, 3, 1, 1)

    def choose(self, colours: tuple[str, ...], index: int) -> Tensor:
        """One of some colours per picture, by Scene.variation[:, index]; [n, 3, 1, 1]."""
        palette = torch.cat([self.tone(colour) for colour in colours])
        return palette[(self._variation[:, index] * len(colours)).long()]

    def mix(self, first: Colour, second: Colour, amount: Tensor) -> Tensor:
        """first at amount 0, second at 1. amount: [n, 1, 1] or [n, H, W], clamped."""
        start = self.tone(first)
        return start + (self.tone(second) - start) * amount.clamp(0, 1)[:, None]

    def wash(self, first: Colour, second: Colour, amount: Tensor) -> None:
        """The whole sheet in a gradient."""
        self._canvas.paint(torch.ones_like(self.x), self.mix(first, second, amount))

    def fill(self, distance: Tensor, colour: Colour, opacity: Tensor | float = 1.0, scale: float = 1.0) -> None:
        """The inside of a signed distance. scale: units of `distance` per picture unit, where coordinates were scaled."""
        self._canvas.paint(cover(distance, self.edge * scale) * opacity, self.tone(colour))

    def glow(self, x: Tensor, y: Tensor, radius: float, colour: Colour, strength: float) -> None:
        """A soft round light about the origin of the given coordinates; `radius`: where it has fallen to 1/e."""
        self._canvas.paint(torch.exp(-(x * x + y * y) / radius**2) * strength, self.tone(colour))


def cell(position: Tensor) -> tuple[Tensor, Tensor]:
    """position in cells -> (which cell, long; where in it, -0.5..0.5). What is painted in a cell has to end before its border,
    because a position on the border may fall on either side on different devices."""
    which = torch.floor(position)
    return which.long(), position - which - 0.5


def chance(seed: Tensor, *cells: Tensor) -> Tensor:
    """A number in 0..1 for each cell, from its integer indices (the finaliser of MurmurHash3 over 31 bits)."""
    mixed = seed
    for number, index in enumerate(cells):
        mixed = mixed + (index + 4096) * (7919 + 104729 * number)
    mixed = mixed & 0x7FFFFFFF
    mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
    mixed = ((mixed ^ (mixed >> 13)) * 0x45D9F3B) & 0x7FFFFFFF
    return ((mixed ^ (mixed >> 16)) & 0xFFFF).float() / 65536


def zigzag(position: Tensor) -> Tensor:
    """A triangle wave of period 1 in 0..1: 0 at whole positions."""
    return 1 - (torch.remainder(position, 1.0) - 0.5).abs() * 2


def scallops(x: Tensor, y: Tensor, period: float, radius: float) -> Tensor:
    """Distance to a row of overlapping circles along y = 0: the border of clouds, crowns of trees, bushes."""
    from_centre = torch.remainder(x, period) - period / 2
    return (from_centre * from_centre + y * y + 1e-12).sqrt() - radius
