"""Signed distances that the people need beyond canvas.py's circle and capsule, and ways to join them.

Knows nothing of what is drawn. All are negative inside, continuous, and right to first order near the border, so that
`canvas.cover` gives a border of one pixel whatever the proportions.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the distance of a shape that is not there (a batch mixes people with and without): more than any picture is wide.
GONE = 9.0
_EPS = 1e-6


def oval(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Ellipse with half-axes a and b (either may vary over the picture, e.g. another b above than below the axis).

    k (k - 1) / |grad| with k = |(x/a, y/b)|: the first-order distance (I. Quilez, "ellipse - distance bound"). Unlike
    (k - 1) min(a, b) it stays sharp at the tips of a very flat ellipse. Far from one it would come out too small, hence the box around it.
    """
    p, q = x / a, y / b
    level = (p * p + q * q + _EPS).sqrt()
    slope = ((p / a) ** 2 + (q / b) ** 2 + _EPS).sqrt()
    return torch.maximum(level * (level - 1) / slope, torch.maximum(x.abs() - a, y.abs() - b))


def rounded_box(x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor, radius: Tensor) -> Tensor:
    """Exact distance to a box (outer half sizes given) whose corners are rounded by `radius`."""
    dx, dy = x.abs() - half_width + radius, y.abs() - half_height + radius
    outside = (dx.clamp_min(0) ** 2 + dy.clamp_min(0) ** 2 + _EPS * _EPS).sqrt()
    return outside + torch.maximum(dx, dy).clamp_max(0) - radius


def smooth_max(a: Tensor, b: Tensor, rounding: Tensor | float) -> Tensor:
    """Intersection of two shapes with the corner between them rounded over about `rounding` (polynomial smooth maximum)."""
    mix = (0.5 + 0.5 * (a - b) / rounding).clamp(0, 1)
    return torch.lerp(b, a, mix) + rounding * mix * (1 - mix)


def smooth_min(a: Tensor, b: Tensor, rounding: Tensor | float) -> Tensor:
    """Union of two shapes with the corner between them filled over about `rounding`."""
    return -smooth_max(-a, -b, rounding)


def ramp(value: Tensor, start: float, end: float) -> Tensor:
    """0 at `start`, 1 at `end` (in either direction), smooth in between (Hermite)."""
    t = ((value - start) / (end - start)).clamp(0, 1)
    return t * t * (3 - 2 * t)
