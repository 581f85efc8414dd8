"""The still parts of a face: ears, head, cheeks, beard, freckles, nose, the lines of age."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from training.mini.world import parsing
from training.mini.world.canvas import capsule, circle
from training.mini.world.shapes import GONE, oval, ramp, smooth_max
from training.mini.world.sitter import Sitter, skull

_BLUSH, _GOLD = (0.93, 0.42, 0.40), (0.90, 0.70, 0.25)
# Freckles of one cheek, (out from the middle, down), mirrored.
_FRECKLE_RADIUS = 0.024
_FRECKLES = ((0.22, 0.27), (0.31, 0.22), (0.40, 0.28), (0.29, 0.33), (0.47, 0.21))


def paint_ears(sitter: Sitter) -> None:
    """Behind the head, at its widest; turning slides them against the face. Earrings hang below them."""
    traits, frame = sitter.traits, sitter.frame
    x = frame.x + 0.30 * sitter.pose.turn
    out, y = x.abs() - traits.width * 0.97, frame.y - 0.10 + 0.3 * sitter.pose.nod
    shell = sitter.cover(oval(out, y, traits.ear * 0.68, traits.ear))
    sitter.paint_sides(shell, sitter.lit(traits.skin * 0.95), x < 0, (parsing.RIGHT_EAR, parsing.LEFT_EAR))
    hollow = oval(out - 0.015, y - 0.01, traits.ear * 0.36, traits.ear * 0.58)
    sitter.canvas.paint(sitter.cover(hollow), sitter.lit(traits.skin * 0.78))
    ring = circle(out - 0.02, y - traits.ear - 0.03, 0.055)
    sitter.canvas.paint(sitter.cover(ring) * traits.earring, sitter.fixed(_GOLD), parsing.EARRING)


def paint_skin(sitter: Sitter) -> Tensor:
    """The head itself, and a blush. Returns its distance: what lies on the skin is kept inside it."""
    traits, frame = sitter.traits, sitter.frame
    head = skull(frame.x, frame.y, traits)
    sitter.canvas.paint(sitter.cover(head), sitter.lit(traits.skin), parsing.SKIN)
    left, y, _ = sitter.pose.place(-traits.eye_x - 0.10, torch.full_like(traits.eye_y, 0.36))
    right, _, _ = sitter.pose.place(traits.eye_x + 0.10, torch.full_like(traits.eye_y, 0.36))
    out = torch.minimum((frame.x - left).abs(), (frame.x - right).abs())
    glow = torch.exp(-((out / 0.15) ** 2) - ((frame.y - y) / 0.12) ** 2) * traits.blush * sitter.cover(head)
    sitter.canvas.paint(glow, sitter.flat(traits.skin) * 0.35 + sitter.fixed(_BLUSH) * 0.65)
    return head


def paint_beard(sitter: Sitter, head: Tensor) -> None:
    """Moustache, goatee (with moustache), full beard. A beard is SKIN in CelebAMask-HQ's maps, and here."""
    traits = sitter.traits
    u, v, size = sitter.frame.u, sitter.frame.v, traits.beard_size
    aside = (u / traits.width).abs()
    edge = 0.52 - 0.10 * size - 0.75 * ramp(aside, 0.45, 1.0) + 0.10 * ramp(aside, 0.30, 0.0)
    full = smooth_max(head - (0.03 + 0.07 * size) * ramp(v, -0.05, 0.60), edge - v, 0.06)
    goatee = smooth_max(oval(u, v - 0.80, traits.mouth_width * 0.80 + 0.08, 0.27 + 0.05 * size), head - 0.02 - 0.06 * size, 0.05)
    along = u.abs() - traits.mouth_width * 0.45
    droop = traits.mouth_y - 0.115 - 0.7 * sitter.expression.upper + 0.45 * along.clamp_min(0) * (0.4 + size)
    moustache = oval(along, v - droop, traits.mouth_width * 0.72 + 0.02, 0.042 + 0.028 * size)
    worn = ((full, traits.full_beard), (goatee, traits.goatee), (moustache, traits.moustache))
    hair = reduce(torch.minimum, [shape + GONE * (1 - switch) for shape, switch in worn])
    sitter.canvas.paint(sitter.cover(hair), sitter.lit(traits.hair_colour * 0.88), parsing.SKIN)


def paint_marks(sitter: Sitter, head: Tensor) -> None:
    """Freckles and a mole."""
    traits = sitter.traits
    u, v = sitter.frame.u, sitter.frame.v
    aside, skin = u.abs(), sitter.cover(head)
    dots = reduce(torch.minimum, [(aside - out) ** 2 + (v - down) ** 2 for out, down in _FRECKLES])
    freckles = sitter.cover((dots + 1e-9).sqrt() - _FRECKLE_RADIUS)
    sitter.canvas.paint(freckles * skin * (traits.freckles * 0.75), sitter.lit(traits.skin * 0.66))
    mole = circle(u - traits.mole_x, v - traits.mole_y, 0.034)
    sitter.canvas.paint(sitter.cover(mole) * skin * traits.mole, sitter.lit(traits.skin * 0.32))


def paint_nose(sitter: Sitter) -> None:
    """A bridge hardly lighter than the skin, a round tip, and the shadow under it."""
    traits, frame = sitter.traits, sitter.frame
    x, y, _ = sitter.pose.place(torch.zeros_like(traits.nose_y), traits.nose_y)
    top_x, top_y, _ = sitter.pose.place(torch.zeros_like(traits.nose_y), traits.eye_y)
    bridge = capsule(frame.x, frame.y, top_x, top_y, x, y, traits.nose_width * 0.42)
    sitter.canvas.paint(sitter.cover(bridge), sitter.lit((traits.skin * 1.035).clamp(0, 1)), parsing.NOSE)
    across, down = frame.x - x, frame.y - y
    under = oval(across, down - traits.nose_height * 0.34, traits.nose_width, traits.nose_height)
    sitter.canvas.paint(sitter.cover(under), sitter.lit(traits.skin * 0.74), parsing.NOSE)
    tip = oval(across, down, traits.nose_width * 1.02, traits.nose_height)
    sitter.canvas.paint(sitter.cover(tip), sitter.lit((traits.skin * 1.045).clamp(0, 1)), parsing.NOSE)


def paint_lines(sitter: Sitter) -> None:
    """Of age: a fold from the nose past the mouth, a bag under each eye, on the straight face."""
    traits = sitter.traits
    u, v = sitter.frame.u, sitter.frame.v
    out = u.abs()
    fold = capsule(out, v, traits.nose_width + 0.05, traits.nose_y + 0.02, traits.mouth_width + 0.07, traits.mouth_y - 0.03, 0.011)
    arc = oval(out - traits.eye_x, v - traits.eye_y - 0.03, traits.eye_width * 0.95, traits.eye_height + 0.03)
    bag = torch.maximum(arc.abs() - 0.010, traits.eye_y + traits.eye_height * 0.55 - v)
    sitter.canvas.paint(sitter.cover(torch.minimum(fold, bag)) * traits.lines * 0.65, sitter.lit(traits.skin * 0.72))
