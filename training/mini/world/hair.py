"""Hair: what hangs behind the body, and what lies on the head. Every style is the same few shapes with other measures."""

from __future__ import annotations

import torch
from torch import Tensor

from training.mini.world import parsing
from training.mini.world.canvas import Canvas, Grid, capsule
from training.mini.world.scene import Scene
from training.mini.world.shapes import ramp, smooth_max, smooth_min
from training.mini.world.sitter import Sitter, sitter

# Hair behind the head is in the shadow of the head.
_BEHIND = 0.74
# Scallops around a head, and along a hairline (per head unit and radian).
_CURLS_AROUND, _CURLS_ALONG = 8.0, 9.0
_WAVES_PER_UNIT = 6.0
_GONE = 9.0


def paint_back_hair(canvas: Canvas, identity: Tensor, scene: Scene, grid: Grid) -> None:
    """Long hair, an afro's mass, a ponytail or a bun, behind everything else of the person."""
    s = sitter(canvas, identity, scene, grid)
    style = s.traits.hair
    x = s.frame.x + 0.35 * s.pose.turn
    fall = style.fall + (0.55 * s.traits.hair_length - 0.25) * (style.fall > 1)
    bulk = smooth_max(_shell(s, x, style.spread), s.frame.y - fall, 0.30 + style.spread)
    away = (style.fall < 0).to(bulk.dtype) * _GONE
    behind = torch.minimum(bulk + away, _tail(s, x))
    s.canvas.paint(s.cover(behind), s.lit(s.traits.hair_colour * _BEHIND), parsing.HAIR)


def _tail(s: Sitter, x: Tensor) -> Tensor:
    """A knot, and what hangs from it."""
    style, y = s.traits.hair, s.frame.y
    root = style.tail_x * s.traits.parting
    hanging = style.tail_end - style.tail_y
    reach = ((y - style.tail_y) / hanging.clamp_min(0.1)).clamp(0, 1) * (hanging > 0)
    thickness = style.tail * (1 - 0.55 * reach) * (0.9 + 0.2 * s.traits.hair_volume)
    tip = root * (1 + 0.22 * hanging)
    return capsule(x, y, root, style.tail_y, tip, style.tail_end, thickness) + _GONE * (style.tail <= 0)


def _shell(s: Sitter, x: Tensor, side: Tensor) -> Tensor:
    """The outline of the hair's mass: a crown over the skull whose sides fall straight down, scalloped by curls, waved."""
    style, y = s.traits.hair, s.frame.y
    volume = 0.75 + 0.5 * s.traits.hair_volume
    top = 1 + (style.top - style.lean * s.traits.parting * x) * volume
    half = s.traits.width + side * volume
    wide = half + style.wave * torch.sin(y * _WAVES_PER_UNIT)
    level = ((x / half).abs().clamp_min(1e-4) ** style.crown + (y / top).abs().clamp_min(1e-4) ** style.crown) ** (1 / style.crown)
    mass = torch.where(y < 0, (level - 1) * half, x.abs() - half) - (wide - half) * ramp(y, -0.4, 0.3)
    around = torch.atan2(x, -(y + 0.1))
    return mass - style.curl * ((torch.sin(around * _CURLS_AROUND)).abs() - 0.6)


def paint_front_hair(s: Sitter, head: Tensor) -> None:
    """The cap over the skull down to the hairline, the locks beside the face, a soft shadow under them, and a shine."""
    style, y = s.traits.hair, s.frame.y
    u, v = s.frame.straight()
    shell = _shell(s, s.frame.x, style.side)
    below = v - _hairline(s, u)
    cap = smooth_max(smooth_max(shell, below, 0.05), s.frame.x.abs() - style.crest, 0.22)
    inner = s.traits.width - style.panel * (1 - 0.5 * ramp(y, 0.3, 1.5))
    lock = style.lock + (0.55 * s.traits.hair_length - 0.25) * (style.lock > 1)
    locks = smooth_max(smooth_max(shell, inner - u.abs(), 0.05), torch.maximum(y - lock, -0.35 - y), 0.12)
    front = smooth_min(cap, locks + _GONE * (style.panel <= 0), 0.10)
    worn = style.density
    s.canvas.paint(s.cover(front - 0.045) * s.cover(head) * 0.55 * (worn > 0.9), s.lit(s.traits.skin * 0.80))
    shaved = s.cover(torch.maximum(head - 0.015, below)) * style.sides
    coverage = torch.maximum(s.cover(front) * worn, shaved)
    s.canvas.paint(coverage, s.lit(s.traits.hair_colour), parsing.HAIR)
    _paint_shine(s, coverage)


def _hairline(s: Sitter, u: Tensor) -> Tensor:
    """How far down the forehead hair comes, over u."""
    style, traits = s.traits.hair, s.traits
    aside = u / traits.width
    line = style.line + traits.hairline
    middle = line - style.sweep * traits.parting * aside - style.part * torch.exp(-((u / 0.20) ** 2))
    temple = torch.lerp(middle, style.temple, ramp(aside.abs(), 0.62, 1.0))
    return temple + style.curl * torch.sin(u * _CURLS_ALONG).abs()


def _paint_shine(s: Sitter, coverage: Tensor) -> None:
    """A light band across the crown."""
    x, y = s.frame.x - 0.15 * s.light.x, s.frame.y
    ring = ((x * x + y * y + 1e-6).sqrt() - 0.86) / 0.055
    strength = torch.exp(-ring * ring) * ramp(y, -0.35, -0.75) * (1 - 4 * s.traits.hair.curl).clamp(0, 1) * 0.30
    s.canvas.paint(coverage * strength, s.flat(s.traits.hair_colour * 0.55 + 0.45))
