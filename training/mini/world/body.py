"""The body of a person below the head: shadow on the ground, legs, neck, trunk, arms and hands, back to front.

Everything that is not clothes is painted here; clothes.py dresses it. Arms lie over the trunk and behind the head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from training.mini.world.canvas import Canvas, Grid, box, ellipse
from training.mini.world.clothes import paint_behind_neck, paint_collar, paint_shoes, paint_sleeves, paint_top, paint_trousers
from training.mini.world.figure import Figure, figure_of
from training.mini.world.joints import NECK_Y, SOLE_Y
from training.mini.world.parsing import NECK, SKIN
from training.mini.world.scene import Scene

_UPPER_ARM_RADII, _FOREARM_RADII = (0.21, 0.185), (0.18, 0.135)
_NECK_HALF_WIDTH = 0.30
_HAND_RADIUS, _HAND_BEYOND_WRIST = 0.185, 0.14
_THUMB_RADIUS, _THUMB_INWARDS, _THUMB_FORWARD = 0.075, 0.15, 0.04


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
    _paint_arms(canvas, figure)
    paint_sleeves(canvas, figure)


def _paint_neck(canvas: Canvas, figure: Figure) -> None:
    """A column that widens into the shoulders, in the shadow of the chin above. It ends in the neckline."""
    flare = 0.5 * (figure.y - 1.15).clamp_min(0) ** 2
    column = box(figure.x, figure.y - 1.0, _NECK_HALF_WIDTH + flare, NECK_Y - 1.0)
    figure.paint(canvas, column, figure.skin * 0.96, NECK)
    chin = ellipse(figure.x, figure.y - 0.86, 0.75, 0.34)
    figure.paint(canvas, torch.maximum(column, chin), figure.skin * 0.80, None)


def _paint_arms(canvas: Canvas, figure: Figure) -> None:
    """Bare arms and hands, with their shadow on the trunk."""
    arms = torch.minimum(figure.upper_arms.tapered(*_UPPER_ARM_RADII), figure.forearms.tapered(*_FOREARM_RADII))
    figure.shadow(canvas, torch.maximum(torch.maximum(arms - 0.10, 1.75 - figure.y), figure.torso), 0.16)
    figure.paint(canvas, torch.minimum(arms, _hands(figure)), figure.skin, SKIN)


def _hands(figure: Figure) -> Tensor:
    """Mittens: a round hand beyond each wrist, the thumb towards the middle of the body. Distance [n, H, W]."""
    direction = functional.normalize(figure.joints.wrists - figure.joints.elbows, dim=-1)
    inwards = torch.tensor(((1.0, 0.0), (-1.0, 0.0)), device=direction.device)
    palms = figure.joints.wrists + _HAND_BEYOND_WRIST * direction
    thumbs = palms + _THUMB_INWARDS * inwards + _THUMB_FORWARD * direction
    return torch.minimum(figure.discs(palms, _HAND_RADIUS), figure.discs(thumbs, _THUMB_RADIUS))
