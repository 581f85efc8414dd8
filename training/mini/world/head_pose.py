"""Head coordinates: where a point of the picture lies on a head that is moved, tilted and turned.

A head is drawn in its own frame: x right, y down, the unit is half a head's height, the tilt (roll) undone. Turning (yaw) and
nodding (pitch) leave the outline where it is and slide the features over it, the more the closer they are to the middle, as
on a relief: that is all the third dimension there is. The slide is an explicit function of where a feature sits on the face
that looks straight ahead (u, v), so landmarks are exact; only what crosses the whole face (hairline, beard, marks) uses its
approximate inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.mini.world.canvas import Grid
from training.mini.world.scene import Scene

# How far the middle of the face stands in front of the axis of the head, in head units.
_DEPTH = 0.80
# How fast the relief falls off towards the rim, upwards and sideways: (v / 1)^2 counts less than (u / width)^2.
_FALL_OFF_V = 0.45
# A feature on the far side of a turned head gets narrower; by how much at most, and how little wider on the near side.
_NARROWEST, _WIDEST = 0.70, 1.06
# The soft border of every shape is this many pixels wide.
_SOFT_PIXELS = 1.25
# At the strongest turn and nod of scene.py the inverse is then off by less than 0.03 head units over the inner 3/4 of the face.
_UNDOING_STEPS = 3


@dataclass(frozen=True, eq=False)
class HeadPose:
    """Each [n, 1, 1]. turn, nod: slide of the middle of the face to the right and upwards; cos, sin: of the roll;
    x, y, size: centre and unit of the head in picture coordinates; width: half-width of the head in head units."""

    turn: Tensor
    nod: Tensor
    cos: Tensor
    sin: Tensor
    x: Tensor
    y: Tensor
    size: Tensor
    width: Tensor

    def relief(self, u: Tensor, v: Tensor) -> Tensor:
        """1 in the middle of the face, 0 at its rim and outside; u, v broadcast with [n, 1, 1]."""
        return (1 - (u / self.width) ** 2 - _FALL_OFF_V * v * v).clamp_min(0)

    def place(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where a feature that sits at (u, v) on a straight face appears: x, y in the head's frame, and its narrowing."""
        relief = self.relief(u, v)
        narrowing = (1 - self.turn * 2 * u / self.width**2).clamp(_NARROWEST, _WIDEST)
        return u + self.turn * relief, v - self.nod * relief, narrowing

    def to_picture(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Head frame -> picture coordinates."""
        return self.x + self.size * (x * self.cos - y * self.sin), self.y + self.size * (x * self.sin + y * self.cos)


@dataclass(frozen=True, eq=False)
class HeadFrame:
    """A grid seen from a head. x, y: [n, H, W] in the head's frame; u, v: [n, H, W] the same points on the face that looks straight
    ahead; edge: [n, 1, 1] width of a soft border in head units."""

    pose: HeadPose
    x: Tensor
    y: Tensor
    u: Tensor
    v: Tensor
    edge: Tensor


def head_pose(scene: Scene, width: Tensor) -> HeadPose:
    """width: [n, 1, 1], Traits.width."""
    yaw, pitch, roll, x, y, size = (
        value.view(-1, 1, 1) for value in (scene.yaw, scene.pitch, scene.roll, scene.head_x, scene.head_y, scene.head_size)
    )
    return HeadPose(_DEPTH * torch.sin(yaw), _DEPTH * torch.sin(pitch), torch.cos(roll), torch.sin(roll), x, y, size, width)


def head_frame(pose: HeadPose, grid: Grid) -> HeadFrame:
    dx, dy = (grid.x - pose.x) / pose.size, (grid.y - pose.y) / pose.size
    edge = grid.pixel.view(-1, 1, 1) / pose.size * _SOFT_PIXELS
    x, y = dx * pose.cos + dy * pose.sin, dy * pose.cos - dx * pose.sin
    return HeadFrame(pose, x, y, *_straight(pose, x, y), edge)


def _straight(pose: HeadPose, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The slide of `HeadPose.place` undone by fixed-point steps."""
    u, v = x, y
    for _ in range(_UNDOING_STEPS):
        relief = pose.relief(u, v)
        u, v = x - pose.turn * relief, y + pose.nod * relief
    return u, v
