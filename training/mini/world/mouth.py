"""The mouth: lips, and what an open mouth shows. Drawn about its own anchor, so that it turns with the head undistorted."""

from __future__ import annotations

import torch
from torch import Tensor

from training.mini.world import parsing
from training.mini.world.shapes import oval, smooth_max
from training.mini.world.sitter import Sitter

_INSIDE, _TEETH, _TONGUE = (0.36, 0.08, 0.11), (0.99, 0.98, 0.96), (0.86, 0.38, 0.40)
# The line of the mouth is a parabola: with `bend` its corners rise by this share, and its middle sinks by the rest.
CORNER_SHARE = 0.6


def paint_mouth(sitter: Sitter) -> None:
    traits, face = sitter.traits, sitter.expression
    x, y, narrowing = sitter.pose.place(torch.zeros_like(traits.mouth_y), traits.mouth_y)
    half = traits.mouth_width * face.width
    across = (sitter.frame.x - x) / narrowing
    reach = (across / half).clamp(-1.2, 1.2)
    down = sitter.frame.y - y - face.bend * (1 - CORNER_SHARE - reach * reach)
    _paint_lips(sitter, across, down, reach, half)
    _paint_opening(sitter, across, down, half)


def _paint_lips(sitter: Sitter, across: Tensor, down: Tensor, reach: Tensor, half: Tensor) -> None:
    traits, face = sitter.traits, sitter.expression
    bow = 1 - 0.30 * torch.exp(-((reach / 0.22) ** 2))
    upper = oval(across, down, half, (traits.lip * 0.85) * bow + face.upper + 0.006)
    lower = oval(across, down, half, traits.lip * 1.1 + face.lower + 0.006)
    colour = traits.lip_colour
    sitter.canvas.paint(sitter.cover(torch.maximum(lower, -down)), sitter.lit(colour), parsing.LOWER_LIP)
    sitter.canvas.paint(sitter.cover(torch.maximum(upper, down)), sitter.lit(colour * 0.88), parsing.UPPER_LIP)
    line = torch.maximum(down.abs() - 0.011, across.abs() - half - 0.012)
    sitter.canvas.paint(sitter.cover(line), sitter.lit(colour * 0.48))


def _paint_opening(sitter: Sitter, across: Tensor, down: Tensor, half: Tensor) -> None:
    """Teeth hang from the upper edge, the tongue lies on the lower one; a closed mouth has an opening of no area."""
    face = sitter.expression
    opening = smooth_max(oval(across, down, half * 0.90, face.lower + 0.004), -down - face.upper, 0.03)
    opened = sitter.cover(opening) * (face.lower > 0).to(opening.dtype)
    sitter.canvas.paint(opened, sitter.fixed(_INSIDE), parsing.MOUTH)
    tongue = oval(across, down - face.lower, half * 0.55, face.lower * 0.45 + 0.001)
    sitter.canvas.paint(sitter.cover(tongue) * opened, sitter.fixed(_TONGUE))
    teeth = down - (face.lower * 0.30 + 0.02)
    sitter.canvas.paint(sitter.cover(teeth) * opened * face.teeth, sitter.fixed(_TEETH))
