"""The paper of the character world: a grid of picture coordinates, signed distances, and layers painted back to front.

Knows nothing of people or places. Everything is batched, fp32, free of data-dependent control flow (so that it compiles),
and anti-aliased: coverage falls from 1 to 0 over about one pixel, hence CPU and GPU agree to a fraction of 1/255.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """Where a batch of pictures is evaluated.

    x, y: [n, H, W] picture coordinates, -1..1 over the picture, x right, y down. pixel: [n] side of one pixel in the same unit.
    """

    x: Tensor
    y: Tensor
    pixel: Tensor

    @staticmethod
    def whole(n: int, size: int, device: torch.device | str = "cpu") -> Grid:
        """Every pixel centre of n square pictures of `size` pixels."""
        axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size * 2 - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        return Grid(x.expand(n, -1, -1), y.expand(n, -1, -1), torch.full((n,), 2.0 / size, device=device))

    @staticmethod
    def under(affine: Tensor, size: int) -> Grid:
        """The grid of a crop. affine: [n, 2, 3], from crop coordinates (-1..1) to picture coordinates; a similarity."""
        crop = Grid.whole(affine.shape[0], size, affine.device)
        x = _of(affine[:, 0, 0]) * crop.x + _of(affine[:, 0, 1]) * crop.y + _of(affine[:, 0, 2])
        y = _of(affine[:, 1, 0]) * crop.x + _of(affine[:, 1, 1]) * crop.y + _of(affine[:, 1, 2])
        scale = (affine[:, 0, 0] ** 2 + affine[:, 1, 0] ** 2).sqrt()
        return Grid(x, y, scale * 2 / size)

    def take(self, index: Tensor) -> Grid:
        return Grid(self.x[index], self.y[index], self.pixel[index])


def _of(value: Tensor) -> Tensor:
    """[n] -> [n, 1, 1], to be broadcast over a picture."""
    return value.view(-1, 1, 1)


class Canvas:
    """RGB [n, 3, H, W] in 0..1 and a face-parsing map [n, H, W] (CelebAMask order, 0 = background), painted layer by layer."""

    def __init__(self, rgb: Tensor, labels: Tensor | None = None) -> None:
        self.rgb = rgb
        self.labels = labels if labels is not None else torch.zeros(rgb.shape[0], *rgb.shape[2:], dtype=torch.long, device=rgb.device)

    def paint(self, coverage: Tensor, colour: Tensor, label: int | None = None) -> None:
        """Lays `colour` ([n, 3, H, W] or broadcastable, e.g. [n, 3, 1, 1]) over the canvas where coverage [n, H, W] (0..1) says.

        label: the parsing class that the covered pixels take from half coverage on; None leaves the map as it is
        (shading, a blush, a translucent lens).
        """
        self.rgb = torch.lerp(self.rgb, colour.expand_as(self.rgb), coverage[:, None])
        if label is not None:
            self.labels = torch.where(coverage > 0.5, label, self.labels)


def cover(distance: Tensor, edge: Tensor) -> Tensor:
    """Signed distance (negative inside) -> coverage 0..1; `edge`: width of the soft border in the distance's unit."""
    return (0.5 - distance / edge).clamp(0, 1)


def circle(x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    return (x * x + y * y + 1e-12).sqrt() - radius


def box(x: Tensor, y: Tensor, half_width: Tensor | float, half_height: Tensor | float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def ellipse(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Approximate distance to an axis-aligned ellipse: exact in sign, right to first order near the border of a mild ellipse."""
    a_, b_ = torch.as_tensor(a, device=x.device, dtype=x.dtype), torch.as_tensor(b, device=x.device, dtype=x.dtype)
    return (((x / a_) ** 2 + (y / b_) ** 2 + 1e-9).sqrt() - 1) * torch.minimum(a_, b_)


def capsule(
    x: Tensor, y: Tensor, ax: Tensor | float, ay: Tensor | float, bx: Tensor | float, by: Tensor | float, radius: Tensor | float
) -> Tensor:
    """Distance to the segment (ax, ay)-(bx, by), thickened by radius."""
    dx, dy = bx - ax, by - ay
    along = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-9)).clamp(0, 1)
    return circle(x - ax - along * dx, y - ay - along * dy, radius)
