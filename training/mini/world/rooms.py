"""Places under a roof: office, cafe, photo studio, library. Each function paints one place over a whole Sheet.

Lowest in a picture is the floor on which a full figure stands (its feet are at y = 0.86); what tells the places apart is at
the sides and at the top, where a head in close-up does not hide it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.mini.world.canvas import box, circle, ellipse
from training.mini.world.sheet import Sheet, cell, chance

_BACKDROPS = ("#e6b4a2", "#a3c4d9", "#b4ccab", "#cdb5de", "#e3cf9e")
_BOOKS = ("#b04a3f", "#3a5c8c", "#4f8260", "#d3a44c", "#e8d9ba", "#7a4c78")


def office(sheet: Sheet) -> None:
    """Windows over a pale skyline, a sideboard with a monitor on one side and a plant on the other."""
    x, y = sheet.x, sheet.y
    sheet.wash("#e9eef2", "#c9d3dc", (y + 1) / 2)
    _windows(sheet)
    sheet.fill(0.74 - y, "#8d97a3")
    sheet.fill(box(x, y - 0.56, 2.0, 0.20), "#c08d5c")
    sheet.fill(box(x, y - 0.375, 2.0, 0.025), "#dbb283")
    for seam in (-0.6, 0.0, 0.6):
        sheet.fill(box(x - seam, y - 0.57, 0.006, 0.17), "#9c6d43")
    side = sheet.side(1)
    _monitor(sheet, x - side * 0.68, y - 0.16)
    _plant(sheet, x + side * 0.76, y - 0.35)


def _windows(sheet: Sheet) -> None:
    y = sheet.y + 0.44
    x = torch.remainder(sheet.x + sheet.vary(0, 0.0, 0.9), 0.9) - 0.45
    opening = box(x, y, 0.37, 0.46)
    sheet.fill(opening - 0.035, "#fbfcfd")
    sky = sheet.mix("#7fbdec", "#e3f2fb", (y + 0.46) / 0.9)
    sheet.fill(opening, sky)
    for tower, top, half in ((-0.24, 0.14, 0.09), (-0.04, -0.04, 0.08), (0.20, 0.08, 0.12)):
        sheet.fill(torch.maximum(box(x - tower, y - top - 0.5, half, 0.5), opening), "#aecbe0")
    sheet.fill(torch.maximum(x.abs() - 0.014, opening), "#fbfcfd")


def _monitor(sheet: Sheet, x: Tensor, y: Tensor) -> None:
    sheet.fill(box(x, y - 0.15, 0.03, 0.06), "#59636f")
    sheet.fill(box(x, y - 0.195, 0.11, 0.015), "#59636f")
    sheet.fill(box(x, y, 0.20, 0.13) - 0.01, "#333c47")
    sheet.fill(box(x, y, 0.185, 0.115), sheet.mix("#5fa8d8", "#8fd0c8", x * 2 + 0.5))


def _plant(sheet: Sheet, x: Tensor, base: Tensor) -> None:
    for angle, colour in ((-0.8, "#3f8f5a"), (0.8, "#3f8f5a"), (-0.35, "#57ab6c"), (0.35, "#57ab6c"), (0.0, "#6fbf7c")):
        tilt = torch.tensor(angle)
        along, across = -(base + 0.10) * float(tilt.cos()) + x * float(tilt.sin()), x * float(tilt.cos()) + (base + 0.10) * float(tilt.sin())
        sheet.fill(ellipse(along - 0.19, across, 0.21, 0.062), colour)
    sheet.fill(torch.maximum(x.abs() - 0.10 + 0.25 * (base + 0.06), (base + 0.06).abs() - 0.08), "#e9e4dc")


def cafe(sheet: Sheet) -> None:
    """A warm wall, hanging lamps, a blackboard and a shelf of cups, a wooden counter."""
    x, y = sheet.x, sheet.y
    sheet.wash("#a85f43", "#7c4231", (y + 1) / 1.6)
    sheet.fill(box(x, y + 0.98, 2.0, 0.06), "#5b3024")
    side = sheet.side(1)
    _blackboard(sheet, x - side * 0.66, y + 0.12)
    _cups(sheet, x + side * 0.66, y - 0.10)
    shift = sheet.vary(0, -0.12, 0.12)
    for place in (-0.64, 0.0, 0.64):
        _lamp(sheet, x - place - shift, y + 0.58)
    sheet.fill(0.47 - y, "#5a3423")
    sheet.fill(box(x, y - 0.43, 2.0, 0.05), "#e0ad72")
    sheet.fill(torch.maximum((torch.remainder(x + 0.11, 0.22) - 0.11).abs() - 0.006, 0.50 - y), "#47281b")


def _lamp(sheet: Sheet, x: Tensor, y: Tensor) -> None:
    sheet.glow(x, y - 0.06, 0.26, "#ffd98a", 0.75)
    sheet.fill(box(x, y + 0.35, 0.007, 0.30), "#2f1b16")
    sheet.fill(circle(x, y - 0.055, 0.055), "#fff3cf")
    sheet.fill(torch.maximum(circle(x, y - 0.05, 0.125), y - 0.035), "#2f3b3a")


def _blackboard(sheet: Sheet, x: Tensor, y: Tensor) -> None:
    sheet.fill(box(x, y, 0.24, 0.24), "#d39a63")
    sheet.fill(box(x, y, 0.21, 0.21), "#2e3a38")
    for line, half in ((-0.12, 0.09), (-0.03, 0.14), (0.04, 0.12), (0.11, 0.14)):
        sheet.fill(box(x, y - line, half, 0.012), "#d9dfd6", 0.8)


def _cups(sheet: Sheet, x: Tensor, y: Tensor) -> None:
    sheet.fill(box(x, y, 0.26, 0.02), "#e0ad72")
    for place, colour in ((-0.16, "#f3ead9"), (0.0, "#6fae9f"), (0.16, "#f3ead9")):
        sheet.fill(circle(x - place - 0.055, y + 0.07, 0.032).abs() - 0.011, colour)
        sheet.fill(box(x - place, y + 0.072, 0.052, 0.052), colour)


def studio(sheet: Sheet) -> None:
    """A roll of coloured paper with a pool of light on it, a dark room and two softboxes around."""
    x, y = sheet.x, sheet.y
    palette = torch.cat([sheet.tone(colour) for colour in _BACKDROPS])
    paper = palette[(sheet.vary(1) * len(_BACKDROPS)).long().clamp_max(len(_BACKDROPS) - 1).flatten()][:, :, None, None].flatten(2)[..., None]
    sheet.wash("#3d3f4a", "#2c2d36", (y + 1) / 2)
    half = 0.83 + 0.07 * (y - 0.45).clamp_min(0) * 4
    sheet.fill(x.abs() - half, paper * 0.86)
    centre = sheet.vary(0, -0.12, 0.12)
    light = torch.exp(-((x - centre) ** 2 + (y + 0.15) ** 2) / 0.75)
    sheet.fill(x.abs() - half, (paper * 1.14).clamp(0, 1), light)
    sheet.fill(torch.maximum(x.abs() - half, 0.62 - y), paper * 0.80, 0.35)
    for side in (-1.0, 1.0):
        _softbox(sheet, x * side - 0.86, y + 0.66)


def _softbox(sheet: Sheet, x: Tensor, y: Tensor) -> None:
    """x: from the axis of its stand, outwards."""
    sheet.glow(x, y, 0.34, "#fff6e0", 0.55)
    sheet.fill(box(x - 0.07, y - 1.0, 0.012, 1.0), "#15161b")
    leaning_x, leaning_y = x * 0.94 + y * 0.34, y * 0.94 - x * 0.34
    sheet.fill(box(leaning_x, leaning_y, 0.15, 0.22), "#17181d")
    sheet.fill(box(leaning_x, leaning_y, 0.125, 0.195), "#fffaf0")


def library(sheet: Sheet) -> None:
    """Shelves full of books in a few colours."""
    sheet.wash("#4a2c1c", "#3a2116", (sheet.y + 1) / 2)
    _books(sheet)
    shelf = torch.remainder(sheet.y + 0.92, _SHELF_HEIGHT) - _SHELF_HEIGHT / 2
    sheet.fill(_SHELF_HEIGHT / 2 - 0.032 - shelf.abs(), "#a06a3d")
    upright = torch.remainder(sheet.x + sheet.vary(0, 0.0, 1.1), 1.1) - 0.55
    sheet.fill(upright.abs() - 0.04, "#b57b48")
    sheet.fill(0.74 - sheet.y, "#c79563")
    sheet.fill(box(sheet.x, sheet.y - 0.72, 2.0, 0.035), "#7d4f2d")


_SHELF_HEIGHT, _BOOK_WIDTH = 0.46, 0.098


def _books(sheet: Sheet) -> None:
    row, y = cell((sheet.y + 0.92) / _SHELF_HEIGHT)
    seed = sheet.seed(1)
    column, x = cell((sheet.x + sheet.vary(2)) / _BOOK_WIDTH)
    x, y = x * _BOOK_WIDTH, y * _SHELF_HEIGHT
    height = 0.26 + 0.10 * chance(seed, row, column)
    standing = torch.maximum(x.abs() - 0.043, torch.maximum(_SHELF_HEIGHT / 2 - 0.03 - height - y, y - _SHELF_HEIGHT / 2 + 0.03))
    choice = (chance(seed + 77, row, column) * len(_BOOKS)).long()
    palette = torch.cat([sheet.tone(colour) for colour in _BOOKS])[:, :, 0, 0]
    sheet.fill(standing, palette[choice].permute(0, 3, 1, 2))
    band = (y + _SHELF_HEIGHT / 2 - 0.03 - 0.36 + height - 0.0).abs()
    sheet.fill(torch.maximum(band - 0.018, standing), "#f4e6c4", 0.55)
