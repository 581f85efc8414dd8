"""A body about to be painted: the grid in body coordinates, the joints, the light on it, the limbs as signed distances.

Shared by body.py (what is skin) and clothes.py (what is worn). Paints nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.mini.world.canvas import Canvas, Grid, cover
from training.mini.world.joints import Joints, joints_of
from training.mini.world.lighting import light_of
from training.mini.world.scene import Scene
from training.mini.world.shapes import smooth_max
from training.mini.world.traits import traits_of

SOFTNESS_PIXELS = 1.25
Rgb = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Figure:
    """x, y: [n, H, W] body coordinates (joints.py); edge: [n, 1, 1] width of a soft border. joints: as in joints.py.

    light: [n, 3, H, W], what a painted colour is multiplied by. skin: [n, 3, 1, 1]. scene: clothes and colour of it.
    """

    x: Tensor
    y: Tensor
    edge: Tensor
    joints: Joints
    light: Tensor
    skin: Tensor
    scene: Scene

    def cover(self, distance: Tensor) -> Tensor:
        return cover(distance, self.edge)

    def paint(self, canvas: Canvas, distance: Tensor, colour: Tensor | Rgb, label: int | None, opacity: Tensor | float = 1.0) -> None:
        """Lays a lit colour ([n, 3, 1, 1], [n, 3, H, W] or one for all) over the inside of a distance."""
        paint = colour if isinstance(colour, Tensor) else torch.tensor(colour, device=self.x.device).view(1, 3, 1, 1)
        canvas.paint(self.cover(distance) * opacity, (paint * self.light).clamp(0, 1), label)

    def shadow(self, canvas: Canvas, distance: Tensor, strength: Tensor | float) -> None:
        """Darkens the inside of a distance."""
        canvas.paint(self.cover(distance) * strength, torch.zeros(1, 3, 1, 1, device=self.x.device))

    def limb(self, start: Tensor, end: Tensor, side: int, radius: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """A segment between two joints ([n, 2, 2] each) that tapers from one radius to the other.

        Returns its distance, and how far along it a point lies (0 at start, 1 at end, beyond at the round ends); [n, H, W] each.
        """
        ax, ay = start[:, side, 0].view(-1, 1, 1), start[:, side, 1].view(-1, 1, 1)
        dx, dy = end[:, side, 0].view(-1, 1, 1) - ax, end[:, side, 1].view(-1, 1, 1) - ay
        px, py = self.x - ax, self.y - ay
        along = (px * dx + py * dy) / (dx * dx + dy * dy)
        within = along.clamp(0, 1)
        away = ((px - within * dx) ** 2 + (py - within * dy) ** 2 + 1e-9).sqrt()
        return away - radius[0] - (radius[1] - radius[0]) * within, along

    def torso(self) -> Tensor:
        """Distance to the trunk, without an end below: sloping shoulders, a waist, hips."""
        across = self.x.abs()
        breadth = self.joints.breadth.view(-1, 1, 1)
        waist = ((self.y - 1.65) / 0.75).clamp(0, 1)
        half = 1.0 * breadth - (1.0 * breadth - 0.74) * (waist * waist * (3 - 2 * waist)) + 0.10 * ((self.y - 2.4) / 0.6).clamp(0, 1)
        return smooth_max(across - half, 1.22 + 0.30 * across * across - self.y, 0.22)


def figure_of(identity: Tensor, scene: Scene, grid: Grid) -> Figure:
    """identity: [n, 40]."""
    size = scene.head_size.view(-1, 1, 1)
    x = (grid.x - scene.head_x.view(-1, 1, 1)) / size
    y = (grid.y - scene.head_y.view(-1, 1, 1)) / size
    edge = grid.pixel.view(-1, 1, 1) / size * SOFTNESS_PIXELS
    return Figure(x, y, edge, joints_of(identity, scene), _light(scene, x, y), traits_of(identity).skin, scene)


def _light(scene: Scene, x: Tensor, y: Tensor) -> Tensor:
    """A body is lit as a column: brighter towards the light, a little darker downwards."""
    light = light_of(scene)
    shade = 1 + light.strength * (light.x * (x / 1.2).clamp(-1.2, 1.2) - 0.12 * (y - 1.5).clamp(0, 3))
    return light.tint * shade[:, None]
