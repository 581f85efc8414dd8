"""Eyes, brows and glasses. Both eyes are drawn at once, mirrored; they look where the head looks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.mini.world import parsing
from training.mini.world.canvas import capsule, circle
from training.mini.world.shapes import GONE, oval, rounded_box, smooth_max
from training.mini.world.sitter import Sitter

_WHITE, _PUPIL, _LASH = (0.99, 0.985, 0.97), (0.06, 0.05, 0.06), (0.13, 0.09, 0.08)
# The iris as a share of the eye's half height, and of its half width, whichever is smaller; the pupil as a share of the iris.
_IRIS_OF_HEIGHT, _IRIS_OF_WIDTH, _PUPIL_OF_IRIS = 0.96, 0.72, 0.52


@dataclass(frozen=True, eq=False)
class Pair:
    """Coordinates about the nearer eye. out: away from the nose, down: as in the head's frame; [n, H, W], the narrowing of the
    turned head undone. at_left: bool, where the picture's left eye (the person's right) is nearer."""

    out: Tensor
    down: Tensor
    at_left: Tensor


def eye_pair(sitter: Sitter) -> Pair:
    traits, frame = sitter.traits, sitter.frame
    left_x, y, left_narrow = sitter.pose.place(-traits.eye_x, traits.eye_y)
    right_x, _, right_narrow = sitter.pose.place(traits.eye_x, traits.eye_y)
    at_left = frame.x < (left_x + right_x) / 2
    out = torch.where(at_left, (left_x - frame.x) / left_narrow, (frame.x - right_x) / right_narrow)
    return Pair(out, frame.y - y, at_left)


def paint_eyes(sitter: Sitter, pair: Pair) -> None:
    """Lashes, then the white as far as the lids leave it open, and iris, pupil and highlight within it."""
    traits, face = sitter.traits, sitter.expression
    cos, sin = torch.cos(traits.eye_tilt), torch.sin(traits.eye_tilt)
    along, across = pair.out * cos - pair.down * sin, pair.down * cos + pair.out * sin
    width, height = traits.eye_width, traits.eye_height * face.open
    lower = torch.where(across > 0, height * (1 - 0.75 * face.squint), height)
    lid = -across - face.lid * height + face.slant * along  # distance above the upper lid's edge
    white = smooth_max(oval(along, across, width, lower), lid, 0.05)
    _paint_lash(sitter, pair, along, across, lid)
    coverage = sitter.cover(white)
    sitter.canvas.paint(coverage, sitter.fixed(_WHITE))
    _paint_iris(sitter, pair, coverage)


def _paint_lash(sitter: Sitter, pair: Pair, along: Tensor, across: Tensor, lid: Tensor) -> None:
    """The dark upper rim: an eye a little larger and higher, of which the white leaves a crescent. Women's lashes end in a wing."""
    lashes, width, height = sitter.traits.lashes, sitter.traits.eye_width, sitter.traits.eye_height
    thick = 0.028 + 0.016 * lashes
    eye = oval(along, across + thick * 0.75, width + thick * 0.55, height * sitter.expression.open + thick * 0.3)
    rim = smooth_max(eye, lid - thick, 0.06)
    wing = capsule(along, across, width * 0.78, -height * 0.42, width + 0.075, -height * 0.42 - 0.075, 0.020)
    rim = torch.minimum(rim, wing + GONE * (1 - lashes))
    sitter.paint_sides(sitter.cover(rim), sitter.fixed(_LASH), pair.at_left, (parsing.RIGHT_EYE, parsing.LEFT_EYE))


def _paint_iris(sitter: Sitter, pair: Pair, white: Tensor) -> None:
    traits = sitter.traits
    radius = torch.minimum(traits.eye_height * _IRIS_OF_HEIGHT, traits.eye_width * _IRIS_OF_WIDTH)
    distance = circle(pair.out, pair.down, radius)
    sitter.canvas.paint(sitter.cover(distance) * white, sitter.flat(traits.iris * 0.55))
    sitter.canvas.paint(sitter.cover(distance + 0.022) * white, sitter.flat(traits.iris))
    sitter.canvas.paint(sitter.cover(distance + radius * (1 - _PUPIL_OF_IRIS)) * white, sitter.fixed(_PUPIL))
    rightwards = torch.where(pair.at_left, -pair.out, pair.out)  # the highlight is on the same side of both eyes
    spark = circle(rightwards + radius * 0.36, pair.down + radius * 0.38, radius * 0.27)
    sitter.canvas.paint(sitter.cover(spark) * white, sitter.fixed(_WHITE))


def paint_brows(sitter: Sitter, pair: Pair) -> None:
    traits, face = sitter.traits, sitter.expression
    tilt = traits.brow_tilt * 0.8 - face.worry
    up = pair.down + traits.eye_height + traits.brow_height + face.lift + 0.02
    cos, sin = torch.cos(tilt), torch.sin(tilt)
    along, across = pair.out * cos + up * -sin, up * cos + pair.out * sin
    reach = along / traits.brow_length
    bent = across + traits.brow_arch * (1 - reach * reach) - traits.brow_arch * 0.5
    thickness = traits.brow_thickness * (1 - 0.30 * reach.clamp(-1, 1))
    distance = capsule(along, bent, -traits.brow_length, 0.0, traits.brow_length, 0.0, thickness)
    sitter.paint_sides(sitter.cover(distance), sitter.flat(traits.brow_colour), pair.at_left, (parsing.RIGHT_BROW, parsing.LEFT_BROW))


def paint_glasses(sitter: Sitter, pair: Pair, head: Tensor) -> None:
    """Lenses, rims, bridge and temples. Frame and lens area are GLASSES, over the eyes behind them, as CelebAMask-HQ's maps have it
    once they are merged in the order of its classes (face-parsing.PyTorch's prepropess_data.py)."""
    traits = sitter.traits
    half = torch.minimum(traits.eye_width + 0.075, traits.eye_x - 0.045)
    down = pair.down - 0.015
    square = rounded_box(pair.out, down, half * 1.03, half * 0.82, half * 0.28)
    lens = torch.where(traits.square_glasses > 0.5, square, circle(pair.out, down, half))
    bridge = torch.maximum((down + 0.03).abs() - 0.020, pair.out + half)
    temple = torch.maximum((down + 0.05).abs() - 0.020, torch.maximum(half - pair.out, head - 0.01))
    rim = torch.minimum(lens.abs() - 0.024, torch.minimum(bridge, temple))
    glass, frame = sitter.cover(lens) * traits.glasses, sitter.cover(rim) * traits.glasses
    sitter.canvas.paint(glass * 0.16, sitter.fixed(_WHITE))
    sitter.canvas.paint(frame, sitter.flat(traits.frame_colour), parsing.GLASSES)
    sitter.canvas.labels = torch.where(glass > 0.5, parsing.GLASSES, sitter.canvas.labels)
