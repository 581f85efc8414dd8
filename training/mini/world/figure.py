"""A body about to be painted: the grid in body coordinates, the joints, the light on it, the limbs as signed distances.

Shared by body.py (what is skin) and clothes.py (what is worn); decides neither colour nor shape of what they paint with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.mini.world.canvas import Canvas, Grid, circle, cover
from training.mini.world.joints import LEFT, RIGHT, Joints, joints_of
from training.mini.world.lighting import light_of
from training.mini.world.scene import Scene
from training.mini.world.shapes import ramp, smooth_max
from training.mini.world.traits import traits_of

SOFTNESS_PIXELS = 1.25
# The trunk, in body units: half width of the waist, from where to where it narrows, how much wider the hips are again;
# height at which the shoulders meet the neck, and how they fall off (times the square of the distance from the middle).
_WAIST, _WAIST_FROM_TO, _HIPS_WIDER = 0.74, (1.65, 2.40), 0.10
_NECK_ROOT, _SHOULDER_SLOPE = 1.22, 0.30
Rgb = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Limbs:
    """The nearer of two limbs, a right and a left one. away: [n, H, W] distance to the line between its joints; along: [n, H, W],
    how far along that line (0 at its start, 1 at its end, outside of 0..1 beyond them)."""

    away: Tensor
    along: Tensor

    def tapered(self, start: float, end: float) -> Tensor:
        """Distance to the limb with these radii at its ends, which are round."""
        return self.away - start - (end - start) * self.along.clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Figure:
    """x, y: [n, H, W] body coordinates (joints.py); edge: [n, 1, 1] width of a soft border. joints: as in joints.py.

    torso: [n, H, W] distance to the trunk, which has no end below. upper_arms, forearms: from shoulder to elbow to wrist.
    light: [n, 3, H, W], what a painted colour is multiplied by. skin: [n, 3, 1, 1]. scene: clothes and colour of it.
    """

    x: Tensor
    y: Tensor
    edge: Tensor
    joints: Joints
    torso: Tensor
    upper_arms: Limbs
    forearms: Limbs
    light: Tensor
    skin: Tensor
    scene: Scene

    def cover(self, distance: Tensor) -> Tensor:
        return cover(distance, self.edge)

    def paint(self, canvas: Canvas, distance: Tensor, colour: Tensor | Rgb, label: int | None, opacity: Tensor | float = 1.0) -> None:
        """Lays a lit colour ([n, 3, 1, 1], [n, 3, H, W] or one for all) over the inside of a distance."""
        paint = colour if isinstance(colour, Tensor) else torch.tensor(colour, device=self.x.device).view(1, 3, 1, 1)
        canvas.paint(self.cover(distance) * opacity, paint * self.light, label)

    def shadow(self, canvas: Canvas, distance: Tensor, strength: Tensor | float) -> None:
        """Darkens the inside of a distance."""
        canvas.paint(self.cover(distance) * strength, torch.zeros(1, 3, 1, 1, device=self.x.device))

    def discs(self, centres: Tensor, radius: float) -> Tensor:
        """Distance to the nearer of two discs, [n, 2, 2] -> [n, H, W]."""
        x, y = self.x[:, None] - centres[:, :, 0, None, None], self.y[:, None] - centres[:, :, 1, None, None]
        return circle(x, y, radius).amin(1)


def figure_of(identity: Tensor, scene: Scene, grid: Grid) -> Figure:
    """identity: [n, 40]."""
    size = scene.head_size.view(-1, 1, 1)
    x = (grid.x - scene.head_x.view(-1, 1, 1)) / size
    y = (grid.y - scene.head_y.view(-1, 1, 1)) / size
    joints = joints_of(identity, scene)
    return Figure(
        x=x,
        y=y,
        edge=grid.pixel.view(-1, 1, 1) / size * SOFTNESS_PIXELS,
        joints=joints,
        torso=_torso(x, y, joints.breadth.view(-1, 1, 1)),
        upper_arms=limbs_between(x, y, joints.shoulders, joints.elbows),
        forearms=limbs_between(x, y, joints.elbows, joints.wrists),
        light=_light(scene, x, y),
        skin=traits_of(identity).skin,
        scene=scene,
    )


def limbs_between(x: Tensor, y: Tensor, starts: Tensor, ends: Tensor) -> Limbs:
    """x, y: [n, H, W]; starts, ends: [n, 2, 2] (side, then x, y), all in body coordinates."""
    right, along_right = _axis(x, y, starts[:, RIGHT], ends[:, RIGHT])
    left, along_left = _axis(x, y, starts[:, LEFT], ends[:, LEFT])
    return Limbs(torch.minimum(right, left), torch.where(right < left, along_right, along_left))


def _axis(x: Tensor, y: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to a segment, and how far along it."""
    ax, ay, dx, dy = (value.view(-1, 1, 1) for value in (*start.unbind(-1), *(end - start).unbind(-1)))
    px, py = x - ax, y - ay
    along = (px * dx + py * dy) / (dx * dx + dy * dy)
    within = along.clamp(0, 1)
    return circle(px - within * dx, py - within * dy, 0.0), along


def _torso(x: Tensor, y: Tensor, breadth: Tensor) -> Tensor:
    """Sloping shoulders, a waist, hips. breadth: [n, 1, 1], 1 = average shoulders."""
    across = x.abs()
    half = breadth + (_WAIST - breadth) * ramp(y, *_WAIST_FROM_TO) + _HIPS_WIDER * ((y - 2.4) / 0.6).clamp(0, 1)
    return smooth_max(across - half, _NECK_ROOT + _SHOULDER_SLOPE * across * across - y, 0.22)


def _light(scene: Scene, x: Tensor, y: Tensor) -> Tensor:
    """A body is lit as a column: brighter towards the light, a little darker downwards."""
    light = light_of(scene)
    shade = 1 + light.strength * (light.x * (x / 1.5).clamp(-0.9, 0.9) - 0.12 * (y - 1.5).clamp(0, 3))
    return light.tint * shade[:, None]
