"""The body of a person below the head: shadow on the ground, legs, neck, trunk, arms and hands, back to front.

Everything that is not clothes is painted here; clothes.py dresses it. Arms lie over the trunk and behind the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.mini.world.canvas import Canvas, Grid, box, circle, ellipse
from training.mini.world.clothes import paint_behind_neck, paint_collar, paint_shoes, paint_sleeve, paint_top, paint_trousers
from training.mini.world.figure import Figure, figure_of
from training.mini.world.joints import LEFT, NECK_Y, RIGHT, SOLE_Y
from training.mini.world.parsing import NECK, SKIN
from training.mini.world.scene import Scene

UPPER_ARM_RADIUS, FOREARM_RADIUS = (0.21, 0.185), (0.18, 0.135)
_NECK_HALF_WIDTH = 0.30
_HAND_RADIUS, _HAND_BEYOND_WRIST = 0.185, 0.14


def paint_body(canvas: Canvas, identity: Tensor, scene: Scene, grid: Grid) -> None:
    """identity [n, 40]. Labels: CLOTH for all that is worn, NECK, and SKIN for arms and hands."""
    figure = figure_of(identity, scene, grid)
    figure.shadow(canvas, ellipse(figure.x, figure.y - SOLE_Y, 1.0, 0.14), 0.22)
    paint_trousers(canvas, figure)
    paint_shoes(canvas, figure)
    paint_behind_neck(canvas, figure)
    paint_top(canvas, figure)
    _paint_neck(canvas, figure)
    paint_collar(canvas, figure)
    for side in (RIGHT, LEFT):
        _paint_arm(canvas, figure, side)


def _paint_neck(canvas: Canvas, figure: Figure) -> None:
    """A column that widens into the shoulders, in the shadow of the chin above. It ends in the neckline."""
    flare = 0.5 * (figure.y - 1.15).clamp_min(0) ** 2
    column = box(figure.x, figure.y - 1.0, _NECK_HALF_WIDTH + flare, NECK_Y - 1.0)
    figure.paint(canvas, column, figure.skin * 0.96, NECK)
    chin = ellipse(figure.x, figure.y - 0.86, 0.75, 0.34)
    figure.paint(canvas, torch.maximum(column, chin), figure.skin * 0.80, None)


def _paint_arm(canvas: Canvas, figure: Figure, side: int) -> None:
    joints = figure.joints
    upper, _ = figure.limb(joints.shoulders, joints.elbows, side, UPPER_ARM_RADIUS)
    fore, _ = figure.limb(joints.elbows, joints.wrists, side, FOREARM_RADIUS)
    arm = torch.minimum(upper, fore)
    inside = torch.maximum(arm - 0.10, 1.75 - figure.y)
    figure.shadow(canvas, torch.maximum(inside, figure.torso()), 0.16)
    figure.paint(canvas, arm, figure.skin, SKIN)
    _paint_hand(canvas, figure, side)
    paint_sleeve(canvas, figure, side)


def _paint_hand(canvas: Canvas, figure: Figure, side: int) -> None:
    """A mitten: a round hand beyond the wrist, the thumb towards the body's middle."""
    wrist, elbow = figure.joints.wrists[:, side], figure.joints.elbows[:, side]
    direction = wrist - elbow
    direction = direction / direction.norm(dim=-1, keepdim=True)
    centre = wrist + _HAND_BEYOND_WRIST * direction
    inwards = 1.0 if side == RIGHT else -1.0
    thumb = centre + torch.stack((torch.full_like(centre[:, 0], inwards * 0.15), torch.full_like(centre[:, 0], -0.03)), dim=-1) + 0.05 * direction
    cx, cy, tx, ty = (value.view(-1, 1, 1) for value in (*centre.unbind(-1), *thumb.unbind(-1)))
    hand = circle(figure.x - cx, figure.y - cy, _HAND_RADIUS)
    hand = torch.minimum(hand, circle(figure.x - tx, figure.y - ty, 0.075))
    figure.paint(canvas, hand, figure.skin, SKIN)
