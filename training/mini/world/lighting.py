"""The four lights of the world, as numbers: a tint, a direction, a strength, an exposure. Paints nothing itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.mini.world.scene import Scene

# Per light of scene.LIGHTS. Direction: where the light comes from, (x right, y down); strength: how much it models a face.
_TINT = ((1.0, 1.0, 1.0), (1.04, 0.98, 0.91), (0.92, 0.96, 1.04), (0.99, 0.98, 0.97))
_DIRECTION = ((-0.2, -0.5), (0.35, -0.3), (-0.35, -0.2), (0.9, -0.1))
_STRENGTH = (0.18, 0.20, 0.18, 0.36)
_EXPOSURE = (1.0, 0.99, 0.95, 0.96)


@dataclass(frozen=True, eq=False)
class Light:
    """tint: [n, 3, 1, 1], multiplies colours. x, y: [n, 1, 1] direction towards the light; strength: [n, 1, 1]."""

    tint: Tensor
    x: Tensor
    y: Tensor
    strength: Tensor


def light_of(scene: Scene) -> Light:
    """jitter[:, 0] chooses the side from which the light falls."""
    device = scene.light.device
    direction = torch.tensor(_DIRECTION, device=device)[scene.light]
    side = torch.where(scene.jitter[:, 0] > 0.5, 1.0, -1.0)
    return Light(
        tint=torch.tensor(_TINT, device=device)[scene.light].view(-1, 3, 1, 1),
        x=(direction[:, 0] * side).view(-1, 1, 1),
        y=direction[:, 1].view(-1, 1, 1),
        strength=torch.tensor(_STRENGTH, device=device)[scene.light].view(-1, 1, 1),
    )


def graded(rgb: Tensor, scene: Scene) -> Tensor:
    """The whole picture under the light: half the tint, and the exposure. rgb [n, 3, H, W] in 0..1 (not clamped)."""
    exposure = torch.tensor(_EXPOSURE, device=rgb.device)[scene.light].view(-1, 1, 1, 1)
    return rgb * (light_of(scene).tint * 0.5 + 0.5) * exposure
