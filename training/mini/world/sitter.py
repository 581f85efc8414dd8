"""What every part of a head needs to be painted: the canvas, the person's traits, where the head is, its light, its expression.

Knows the outline of a skull and how light models it; knows no feature of a face.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.mini.world.canvas import Canvas, Grid, cover
from training.mini.world.expressions import Expression, expression_of
from training.mini.world.head_pose import HeadFrame, HeadPose, head_frame, head_pose
from training.mini.world.lighting import Light, light_of
from training.mini.world.scene import Scene
from training.mini.world.shapes import ramp
from training.mini.world.traits import Traits, traits_of

# Exponent of the outline above the ears: a little fuller than an ellipse.
_CROWN = 2.25
# Shadows of flat illustrations are warm: red is darkened less than green and blue.
_SHADOW_RGB = (0.80, 1.0, 0.95)


@dataclass(frozen=True, eq=False)
class Sitter:
    """One head a picture, ready to be painted. shading: [n, 3, H, W], what the light leaves of a colour: 1 outside the shadow."""

    canvas: Canvas
    traits: Traits
    frame: HeadFrame
    expression: Expression
    light: Light
    shading: Tensor

    @property
    def pose(self) -> HeadPose:
        return self.frame.pose

    def cover(self, distance: Tensor) -> Tensor:
        """Distance in head units -> coverage with a border of about a pixel."""
        return cover(distance, self.frame.edge)

    def lit(self, colour: Tensor) -> Tensor:
        """A colour [n, 3, 1, 1] of the head's surface under the scene's light: [n, 3, H, W]."""
        return self.flat(colour) * self.shading

    def flat(self, colour: Tensor) -> Tensor:
        """A colour that takes the tint of the light but no shadow (eyes, teeth, frames of glasses)."""
        return (colour * self.light.tint).clamp(0, 1)

    def fixed(self, colour: tuple[float, float, float]) -> Tensor:
        """A flat colour that is the same for everybody: [n, 3, 1, 1]."""
        return self.flat(torch.tensor(colour, device=self.shading.device).view(1, 3, 1, 1))

    def paint_sides(self, coverage: Tensor, colour: Tensor, at_left: Tensor, labels: tuple[int, int]) -> None:
        """Paints a mirrored pair at once. at_left: bool [n, H, W], where the picture's left one of the two is;
        labels: the classes of the picture's left and right one."""
        self.canvas.paint(coverage, colour)
        mine = torch.where(at_left, labels[0], labels[1])
        self.canvas.labels = torch.where(coverage > 0.5, mine, self.canvas.labels)


def sitter(canvas: Canvas, identity: Tensor, scene: Scene, grid: Grid) -> Sitter:
    traits, light = traits_of(identity), light_of(scene)
    frame = head_frame(head_pose(scene, traits.width), grid)
    return Sitter(canvas, traits, frame, expression_of(scene.expression), light, _shading(frame, light))


def _shading(frame: HeadFrame, light: Light) -> Tensor:
    """Two tones with a soft border between them, as on a ball: shadow where the surface turns away from the light."""
    x, y = frame.x / frame.pose.width, frame.y
    facing = light.x * x + light.y * y + 0.55 * (1 - 0.8 * (x * x + y * y)).clamp_min(0).sqrt()
    dark = torch.tensor(_SHADOW_RGB, device=x.device).view(1, 3, 1, 1)
    return 1 - dark * (light.strength * ramp(facing, 0.34, -0.02))[:, None]


def skull(x: Tensor, y: Tensor, traits: Traits) -> Tensor:
    """Distance to the outline of the bare head, from the crown to the chin."""
    down = y.clamp_min(0)
    # Far below the chin the taper would pass through zero, and the level through infinity.
    half = traits.width * (1 - traits.taper * down * down).clamp_min(0.3)
    power = torch.where(y > 0, traits.square, _CROWN)
    level = ((x / half).abs().clamp_min(1e-4) ** power + y.abs().clamp_min(1e-4) ** power) ** (1 / power)
    return (level - 1) * traits.width
