"""Hair: what hangs behind the body, and what lies on the head. Every style is the same few shapes with other measures.

Knows no style by name: hair_styles.py has the measures. A shape that a style lacks is moved out of the picture (`GONE`), so that
a batch of mixed styles takes one path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.mini.world import parsing
from training.mini.world.canvas import Canvas, Grid, capsule
from training.mini.world.scene import Scene
from training.mini.world.shapes import GONE, ramp, smooth_max, smooth_min
from training.mini.world.sitter import Sitter, sitter

# Hair behind the head lies in its shadow; skin just below a hairline a little, too.
_BEHIND, _UNDER_FRINGE, _FRINGE_SHADOW = 0.74, 0.80, 0.045
# Half-height of the lower half of the outline of straight hair: sides without end.
_STRAIGHT_DOWN = 1e3
# Scallops of curls: per radian around the head (an integer: the seam lies below the chin), per head unit along a hairline.
_CURLS_AROUND, _CURLS_ALONG = 8.0, 9.0
_WAVES_PER_UNIT = 6.0
# Hair behind the head slides against the face when the head turns: share of the face's own slide.
_BEHIND_FOLLOWS = -0.35
# Long hair (that ends below the chin, at 1) is cut to different lengths: head units about the style's own.
_SHORTEST, _LONGEST = -0.25, 0.30
# From this coverage on, stubble over skin counts as hair in the parsing map.
_LABEL_FROM = 0.3


def paint_back_hair(canvas: Canvas, identity: Tensor, scene: Scene, grid: Grid) -> None:
    """Long hair, an afro's mass, a ponytail or a bun, behind everything else of the person."""
    s = sitter(canvas, identity, scene, grid)
    style = s.traits.hair
    x = s.frame.x - _BEHIND_FOLLOWS * s.pose.turn
    curly = (style.curl > 0).to(x.dtype)
    mass = smooth_max(_outline(s, x, style.spread), s.frame.y - _length(s, style.fall) - curly, 0.30)
    behind = torch.minimum(mass + GONE * (style.fall < 0), _tail(s, x))
    s.canvas.paint(s.cover(behind), s.lit(s.traits.hair_colour * _BEHIND), parsing.HAIR)


def paint_front_hair(s: Sitter, head: Tensor) -> None:
    """The cap over the skull down to the hairline, the locks beside the face, and a shine. head: distance to the bare skull."""
    style = s.traits.hair
    outline = _outline(s, s.frame.x, style.side)
    below = s.frame.v - _hairline(s)
    cap = smooth_max(smooth_max(outline, below, 0.05), s.frame.x.abs() - style.crest, 0.22)
    front = smooth_min(cap, _locks(s, outline), 0.10)
    shadow = s.cover(front - _FRINGE_SHADOW) * s.cover(head) * (0.55 * (style.density > 0.9))
    s.canvas.paint(shadow, s.lit(s.traits.skin * _UNDER_FRINGE))
    shaved = s.cover(torch.maximum(head - 0.015, below)) * style.sides
    coverage = torch.maximum(s.cover(front) * style.density, shaved)
    s.canvas.paint(coverage, s.lit(s.traits.hair_colour))
    s.canvas.labels = torch.where(coverage > _LABEL_FROM, parsing.HAIR, s.canvas.labels)
    _paint_shine(s, coverage)


def _length(s: Sitter, end: Tensor) -> Tensor:
    varied = _SHORTEST + (_LONGEST - _SHORTEST) * s.traits.hair_length
    return end + varied * (end > 1)


def _outline(s: Sitter, x: Tensor, side: Tensor) -> Tensor:
    """The mass of the hair: a crown over the skull whose sides fall straight down or, curly, round off."""
    style, y = s.traits.hair, s.frame.y
    volume = 0.75 + 0.5 * s.traits.hair_volume
    # Far out at the side a leaning crown's height would pass through zero, and the level through infinity.
    top = (1 + (style.top - style.lean * s.traits.parting * x) * volume).clamp_min(0.3)
    bottom = torch.where(style.curl > 0, style.fall, _STRAIGHT_DOWN)
    half = s.traits.width + side * volume
    across, down = (x / half).abs().clamp_min(1e-4), (y / torch.where(y < 0, top, bottom)).abs().clamp_min(1e-4)
    level = (across**style.crown + down**style.crown) ** (1 / style.crown)
    wave = style.wave * torch.sin(y * _WAVES_PER_UNIT) * ramp(y, -0.4, 0.3)
    scallops = (torch.sin(torch.atan2(x, -(y + 0.1)) * _CURLS_AROUND)).abs() - 0.6
    return (level - 1) * half - wave - style.curl * scallops


def _hairline(s: Sitter) -> Tensor:
    """How far down the forehead hair comes, as v over u: higher at the parting, lower at the temples."""
    style, traits, u = s.traits.hair, s.traits, s.frame.u
    aside = u / traits.width
    parted = style.sweep * traits.parting * aside + style.part * torch.exp(-((u / 0.20) ** 2))
    line = torch.lerp(style.line + traits.hairline - parted, style.temple, ramp(aside.abs(), 0.62, 1.0))
    return line + style.curl * torch.sin(u * _CURLS_ALONG).abs()


def _locks(s: Sitter, outline: Tensor) -> Tensor:
    """What frames the face on both sides and falls over the shoulders, thinner towards its end."""
    style, y = s.traits.hair, s.frame.y
    inner = s.traits.width - style.panel * (1 - 0.5 * ramp(y, 0.3, 1.5))
    beside = smooth_max(outline, inner - s.frame.u.abs(), 0.05)
    ends = torch.maximum(y - _length(s, style.lock), -0.35 - y)
    return smooth_max(beside, ends, 0.12) + GONE * (style.panel <= 0)


def _tail(s: Sitter, x: Tensor) -> Tensor:
    """A knot, and the tail that hangs from it, fullest in its upper half; a bun's tail has no length."""
    style, y = s.traits.hair, s.frame.y
    root = style.tail_x * s.traits.parting
    hanging = style.tail_end - style.tail_y
    reach = ((y - style.tail_y) / hanging.clamp_min(0.1)).clamp(0, 1)
    thinning = (0.30 - 1.10 * reach + 1.35 * reach * reach) * (hanging > 0)
    thickness = style.tail * (0.9 + 0.2 * s.traits.hair_volume) * (1 - thinning)
    tip = root * (1 + 0.22 * hanging)
    return capsule(x, y, root, style.tail_y, tip, style.tail_end, thickness) + GONE * (style.tail <= 0)


def _paint_shine(s: Sitter, coverage: Tensor) -> None:
    """A light band across the crown, on the side of the light; curls have none."""
    x, y = s.frame.x - 0.15 * s.light.x, s.frame.y
    ring = ((x * x + y * y + 1e-6).sqrt() - 0.86) / 0.055
    smoothness = 0.30 * (1 - 4 * s.traits.hair.curl).clamp(0, 1)
    strength = torch.exp(-ring * ring) * ramp(y, -0.35, -0.75) * smoothness
    s.canvas.paint(coverage * strength, s.flat(s.traits.hair_colour * 0.55 + 0.45))
