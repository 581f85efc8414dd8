"""Places under the sky: beach, forest, snowy mountains, desert, city at night, park. Each function paints over a whole Sheet.

Lowest in a picture is the ground on which a full figure stands (its feet are at y = 0.82); what tells the places apart is at
the sides and at the top, where a head in close-up does not hide it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.mini.world.canvas import box, capsule, circle, ellipse
from training.mini.world.sheet import Colour, Sheet, cell, chance, scallops, zigzag

_TURN = 2 * math.pi


def beach(sheet: Sheet) -> None:
    """The sun goes down in the sea; a palm at one side."""
    x, y = sheet.x, sheet.y
    sheet.wash("#5a3f86", "#f27a6a", (y + 1) / 0.75)
    sheet.fill(-0.30 - y, sheet.mix("#f27a6a", "#ffc25e", (y + 0.30) / 0.42), ((y + 0.30) / 0.10).clamp(0, 1))
    side = sheet.side(1)
    sun = x + side * sheet.vary(0, 0.40, 0.62)
    sheet.glow(sun, y - 0.02, 0.55, "#ffd873", 0.55)
    sheet.fill(circle(sun, y - 0.02, 0.20), "#fff0b0")
    sheet.fill(0.12 - y, sheet.mix("#d9698a", "#4b4a8c", (y - 0.12) / 0.45))
    _glitter(sheet, sun)
    shore = 0.56 + 0.03 * torch.sin(x * 4 + sheet.vary(2) * _TURN)
    sheet.fill(shore - 0.035 - y, "#f7d9c4", 0.8)
    sheet.fill(shore - y, sheet.mix("#e9b483", "#cf8f63", (y - 0.5) / 0.5))
    _palm(sheet, (x - side * 0.80) * side, y)


def _glitter(sheet: Sheet, sun: Tensor) -> None:
    for depth, half in ((0.18, 0.20), (0.26, 0.13), (0.34, 0.17), (0.43, 0.09)):
        sheet.fill(capsule(sun, sheet.y, -half, depth, half, depth, 0.016), "#ffdf94", 0.85)


def _palm(sheet: Sheet, x: Tensor, y: Tensor) -> None:
    """x grows outwards from the foot of the trunk, which leans inwards."""
    bend = x + 0.16 * ((0.75 - y) / 1.25).clamp(0, 1) ** 2
    sheet.fill(torch.maximum(bend.abs() - 0.045 - 0.02 * (y - 0.1), torch.maximum(-0.50 - y, y - 0.75)), "#4a2a45")
    for reach, drop in ((-0.42, 0.16), (-0.30, -0.14), (0.05, -0.28), (0.34, -0.12), (0.40, 0.18)):
        sheet.fill(_leaf(x + 0.16, y + 0.50, reach, drop), "#3c2350")


def _leaf(x: Tensor, y: Tensor, reach: float, drop: float) -> Tensor:
    """A blade from the origin to (reach, drop), pointed at both ends and arched upwards."""
    length = math.hypot(reach, drop)
    along, across = (x * reach + y * drop) / length, (y * reach - x * drop) / length * math.copysign(1.0, reach)
    t = (along / length).clamp(0, 1)
    arch = 4 * t * (1 - t)
    return torch.maximum((across + 0.09 * arch).abs() - 0.055 * arch, (along - length / 2).abs() - length / 2)


def forest(sheet: Sheet) -> None:
    """Trunks in three depths of green mist, under a roof of leaves."""
    x, y = sheet.x, sheet.y
    sheet.wash("#dcefb4", "#7fb56f", (y + 1) / 1.7)
    _trunks(sheet, 0, (-0.92, -0.52, -0.18, 0.22, 0.55, 0.88), 0.045, "#9fc58a")
    _bushes(sheet, 3, 0.34, 0.30, 0.26, "#8cbb72")
    _trunks(sheet, 1, (-0.72, -0.32, 0.36, 0.76), 0.065, "#5f8f5a")
    _crown(sheet, 4, 0.50, -0.86, 0.34, "#5c9a57")
    _trunks(sheet, 2, (-0.90, 0.92), 0.105, "#5b4330")
    _crown(sheet, 5, 0.62, -1.06, 0.42, "#2f6b41")
    _bushes(sheet, 6, 0.30, 0.62, 0.20, "#3f7f47")
    sheet.fill(0.70 - y + 0.03 * torch.sin(x * 3 + sheet.vary(7) * _TURN), "#6f8f4e")


def _trunks(sheet: Sheet, shift: int, places: tuple[float, ...], half: float, colour: Colour) -> None:
    """shift: the variation that moves the whole row."""
    x = sheet.x - sheet.vary(shift, -0.10, 0.10)
    flare = half * (1 + 1.2 * (sheet.y - 0.25).clamp_min(0) ** 2)
    nearest = torch.stack([(x - place).abs() for place in places]).amin(0)
    sheet.fill(nearest - flare, colour)


def _crown(sheet: Sheet, shift: int, period: float, y: float, radius: float, colour: Colour) -> None:
    """A row of leaves hanging from the upper border."""
    row = scallops(sheet.x + sheet.vary(shift, 0.0, period), sheet.y - y, period, radius)
    sheet.fill(torch.minimum(row, sheet.y - y), colour)


def _bushes(sheet: Sheet, shift: int, period: float, y: float, radius: float, colour: Colour) -> None:
    """A row of bushes whose centres lie on y, solid from there downwards."""
    row = scallops(sheet.x + sheet.vary(shift, 0.0, period), sheet.y - y, period, radius)
    sheet.fill(torch.minimum(row, y - sheet.y), colour)


def mountains(sheet: Sheet) -> None:
    """Snow-capped peaks under a clear sky, firs at the sides, snow on the ground."""
    x, y = sheet.x, sheet.y
    sheet.wash("#4c97dc", "#dff1fb", (y + 1) / 1.1)
    far = 0.02 - 0.30 * zigzag(x * 1.3 + sheet.vary(2))
    sheet.fill(far - y, "#b6cce4")
    side = sheet.side(1)
    _peak(sheet, x + side * sheet.vary(3, 0.50, 0.66), -0.62, 0.95)
    _peak(sheet, x - side * sheet.vary(0, 0.44, 0.62), -0.84, 0.90)
    sheet.fill(0.36 + 0.05 * torch.sin(x * 2.4 + sheet.vary(4) * _TURN) - y, "#dbe8f5")
    for place, size in ((-0.90, 1.0), (-0.66, 0.75), (0.70, 0.8), (0.93, 1.05)):
        _fir(sheet, x - place - sheet.vary(5, -0.04, 0.04), y - 0.46, size)
    sheet.fill(0.56 + 0.04 * torch.sin(x * 2.0 + sheet.vary(6) * _TURN) - y, "#f8fbff")


def _peak(sheet: Sheet, x: Tensor, top: float, slope: float) -> None:
    """x from the summit. Sunlit on one side, shaded on the other, white to an indented line."""
    y = sheet.y
    body = (top + x.abs() * slope - y) / math.hypot(1, slope)
    shade = torch.maximum(body, 0.05 * (zigzag(y * 2.5) - 0.5) - x)
    snow = torch.maximum(body, y - top - 0.27 - 0.13 * zigzag(x * 4.5))
    sheet.fill(body, "#7d93b8")
    sheet.fill(shade, "#62789f")
    sheet.fill(snow, "#ffffff")
    sheet.fill(torch.maximum(snow, shade), "#d3e1f1")


def _fir(sheet: Sheet, x: Tensor, y: Tensor, size: float) -> None:
    """y from the foot. Three tiers, each a triangle with snow on top."""
    sheet.fill(box(x, y, 0.02 * size, 0.08 * size), "#5d4434")
    for foot, half, height in ((-0.05, 0.15, 0.22), (-0.17, 0.12, 0.19), (-0.28, 0.09, 0.17)):
        tier = _triangle(x, y - foot * size, half * size, height * size)
        sheet.fill(tier, "#2f6a5e")
        sheet.fill(torch.maximum(tier, y - (foot - 0.55 * height) * size), "#f4f9ff")


def _triangle(x: Tensor, y: Tensor, half: float, height: float) -> Tensor:
    """Upright, its base centred on the origin."""
    return torch.maximum((x.abs() * height - (y + height) * half) / math.hypot(half, height), y)


def desert(sheet: Sheet) -> None:
    """Dunes with a sunny and a shaded side, a table mountain, a cactus."""
    x, y = sheet.x, sheet.y
    sheet.wash("#54b4dc", "#fdeec4", (y + 1) / 1.1)
    side = sheet.side(1)
    sun = x + side * sheet.vary(0, 0.55, 0.75)
    sheet.glow(sun, y + 0.66, 0.34, "#fff6cf", 0.7)
    sheet.fill(circle(sun, y + 0.66, 0.13), "#fff9dc")
    mesa = x - side * sheet.vary(2, 0.45, 0.70)
    sheet.fill(torch.maximum(mesa.abs() - 0.34 - 0.25 * (y + 0.2), -0.20 - y), "#d08a62")
    for number, (top, colour) in enumerate(((0.10, "#f0bf78"), (0.32, "#e5a35c"), (0.58, "#d68b48"))):
        wave = torch.sin(x * (2.6 - 0.4 * number) + sheet.vary(3 + number) * _TURN)
        sheet.fill(top + 0.09 * wave - y, colour)
    _cactus(sheet, (x - side * 0.76) * side, y - 0.52)


def _cactus(sheet: Sheet, x: Tensor, y: Tensor) -> None:
    """x outwards, y from the foot."""
    parts = (
        (0.0, 0.02, 0.0, -0.72, 0.085),
        (0.0, -0.26, -0.22, -0.26, 0.055), (-0.22, -0.26, -0.22, -0.50, 0.055),
        (0.0, -0.16, 0.20, -0.16, 0.050), (0.20, -0.16, 0.20, -0.36, 0.050),
    )  # fmt: skip
    whole = torch.stack([capsule(x, y, *part) for part in parts]).amin(0)
    sheet.fill(whole, "#3d8757")
    sheet.fill(capsule(x - 0.03, y, 0.0, -0.02, 0.0, -0.70, 0.016), "#57a36d")


def city(sheet: Sheet) -> None:
    """Towers with lit windows under the moon."""
    x, y = sheet.x, sheet.y
    sheet.wash("#0c1236", "#7a4790", (y + 1) / 1.5)
    side = sheet.side(0)
    moon = x + side * 0.62
    sheet.glow(moon, y + 0.74, 0.26, "#cfd4ff", 0.35)
    sheet.fill(circle(moon, y + 0.74, 0.115), "#fbf3cf")
    _stars(sheet)
    _towers(sheet, 1, 0.34, -0.50, 0.55, "#352f6e", "#8a76bd")
    _towers(sheet, 2, 0.46, -0.32, 0.75, "#171a40", "#ffd873")
    sheet.fill(0.70 - y, "#2a2b4d")
    sheet.fill(box(x, y - 0.70, 2.0, 0.025), "#4a4a78")


def _stars(sheet: Sheet) -> None:
    column, x = cell(sheet.x * 4.5)
    row, y = cell(sheet.y * 4.5)
    seed = sheet.seed(3)
    off_x, off_y = chance(seed, column, row) - 0.5, chance(seed + 31, column, row) - 0.5
    star = circle(x - off_x * 0.7, y - off_y * 0.7, 0.045 + 0.03 * off_x)
    sheet.fill(star, "#e6e4ff", (chance(seed + 57, column, row) > 0.45).float() * 0.8, scale=4.5)


def _towers(sheet: Sheet, shift: int, width: float, top: float, spread: float, wall: Colour, window: Colour) -> None:
    """One row of towers, a cell each, `spread` between the highest and the lowest; three windows a floor, some of them lit."""
    seed = sheet.seed(shift)
    column, x = cell((sheet.x + sheet.vary(shift)) / width)
    x = x * width
    roof = top + spread * chance(seed, column)
    half = width * 0.47
    tower = torch.maximum(x.abs() - half, roof - sheet.y)
    sheet.fill(tower, wall)
    across, floors = half * 2 / 3.4, 0.15
    place, u = cell(x / across + 0.5)
    floor, v = cell((sheet.y - roof) / floors)
    lit = (chance(seed + 991, column, place, floor) > 0.40).float() * (floor > 0).float() * (place.abs() < 2).float()
    sheet.fill(torch.maximum(box(u * across, v * floors, across * 0.29, floors * 0.27), tower), window, lit)


def park(sheet: Sheet) -> None:
    """Lawn, a round tree, a bench, clouds."""
    x, y = sheet.x, sheet.y
    sheet.wash("#5fb4f0", "#dff3fd", (y + 1) / 1.2)
    for place, height, size in ((-0.62, -0.74, 1.0), (0.66, -0.58, 0.8)):
        _cloud(sheet, x - place - sheet.vary(0, -0.2, 0.2), y - height, size)
    _bushes(sheet, 2, 0.26, 0.16, 0.17, "#7fc07c")
    sheet.fill(0.18 + 0.03 * torch.sin(x * 2.2 + sheet.vary(3) * _TURN) - y, "#8ed06a")
    _path(sheet)
    side = sheet.side(1)
    _round_tree(sheet, x - side * sheet.vary(4, 0.70, 0.80), y)
    _bench(sheet, x + side * 0.72, y - 0.42)


def _cloud(sheet: Sheet, x: Tensor, y: Tensor, size: float) -> None:
    puffs = ((-0.17, 0.02, 0.09), (-0.03, -0.05, 0.13), (0.14, 0.0, 0.10))
    whole = torch.stack([circle(x - px * size, y - py * size, r * size) for px, py, r in puffs]).amin(0)
    sheet.fill(torch.maximum(torch.minimum(whole, box(x, y - 0.05 * size, 0.17 * size, 0.05 * size)), y - 0.08 * size), "#ffffff", 0.95)


def _path(sheet: Sheet) -> None:
    depth = ((sheet.y - 0.2) / 0.8).clamp(0, 1)
    middle = 0.15 * torch.sin(depth * 3 + sheet.vary(5) * _TURN)
    sheet.fill(torch.maximum((sheet.x - middle).abs() - 0.04 - 0.38 * depth**1.5, 0.22 - sheet.y), "#ecd9ae")


def _round_tree(sheet: Sheet, x: Tensor, y: Tensor) -> None:
    sheet.fill(ellipse(x, y - 0.48, 0.26, 0.04), "#6fb054")
    sheet.fill(torch.maximum(x.abs() - 0.05 - 0.06 * (y - 0.2).clamp_min(0), (y - 0.15).abs() - 0.33), "#8a5d3b")
    sheet.fill(_leaves(x, y + 0.32, 1.0), "#3f9a51")
    sheet.fill(_leaves(x + 0.05, y + 0.39, 0.72), "#58b563")


def _leaves(x: Tensor, y: Tensor, size: float) -> Tensor:
    puffs = ((0.0, -0.12, 0.27), (-0.21, 0.08, 0.22), (0.21, 0.08, 0.22), (0.0, 0.14, 0.22))
    return torch.stack([circle(x - px * size, y - py * size, r * size) for px, py, r in puffs]).amin(0)


def _bench(sheet: Sheet, x: Tensor, y: Tensor) -> None:
    for foot in (-0.18, 0.18):
        sheet.fill(box(x - foot, y - 0.02, 0.018, 0.16), "#4c4f57")
    for plank in (-0.13, -0.06, 0.04):
        sheet.fill(box(x, y - plank, 0.24, 0.024), "#b5753f")
