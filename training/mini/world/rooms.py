"""Places under a roof: office, cafe, photo studio, library. Each function paints one place over a whole Sheet.

Lowest in a picture is the floor on which a full figure stands (its feet are at y = 0.82); what tells the places apart is at
the sides and at the top, where a head in close-up does not hide it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.mini.world.canvas import box, circle, ellipse
from training.mini.world.sheet import Sheet, cell, chance

_BACKDROPS = ("#e6b4a2", "#a3c4d9", "#b4ccab", "#cdb5de", "#e3cf9e")
_BOOKS = ("#a84a3e", "#3d5f8a", "#54805f", "#c99a4a", "#8a5a46")
_SHELF_HEIGHT, _SHELVES_FROM, _BOARD, _BOOK_WIDTH = 0.565, 1.0, 0.035, 0.145
_TILT_COS, _TILT_SIN = math.cos(-0.35), math.sin(-0.35)


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


def _plant(sheet: Sheet, x: Tensor, y: Tensor) -> None:
    """y from the foot of the pot. Five leaves, the upright ones in front."""
    for angle, colour in ((-0.8, "#3f8f5a"), (0.8, "#3f8f5a"), (-0.35, "#57ab6c"), (0.35, "#57ab6c"), (0.0, "#6fbf7c")):
        along = x * math.sin(angle) - (y + 0.10) * math.cos(angle)
        across = x * math.cos(angle) + (y + 0.10) * math.sin(angle)
        sheet.fill(ellipse(along - 0.19, across, 0.21, 0.062), colour)
    sheet.fill(torch.maximum(x.abs() - 0.10 + 0.25 * (y + 0.06), (y + 0.06).abs() - 0.08), "#e9e4dc")


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
    """A roll of coloured paper with a pool of light on it, two softboxes in the dark beside it."""
    x, y = sheet.x, sheet.y
    sheet.wash("#4a4d5a", "#34353f", (y + 1) / 2)
    sheet.fill(0.66 - y, "#2a2b33")
    paper = sheet.choose(_BACKDROPS, 1)
    sweep = torch.maximum(x.abs() - 0.80 - 0.10 * ((y - 0.5) / 0.4).clamp(0, 1) ** 2, -0.96 - y)
    sheet.fill(sweep, paper * 0.84)
    spread = (x - sheet.vary(0, -0.12, 0.12)) ** 2 + (y + 0.15) ** 2
    sheet.fill(sweep, (paper * 1.14).clamp(0, 1), torch.exp(-spread / 0.75))
    sheet.fill(torch.maximum(sweep, 0.66 - y), paper * 0.72, 0.30)
    sheet.fill(box(x, y + 0.96, 0.86, 0.03), "#1f2027")
    for side in (-1.0, 1.0):
        _softbox(sheet, x * side - 0.83, y + 0.62)


def _softbox(sheet: Sheet, x: Tensor, y: Tensor) -> None:
    """x grows outwards from the middle of the box, which looks down and inwards."""
    sheet.glow(x, y, 0.36, "#fff6e0", 0.45)
    sheet.fill(box(x - 0.09, y - 1.0, 0.012, 1.0), "#15161b")
    along, across = y * _TILT_COS - x * _TILT_SIN, x * _TILT_COS + y * _TILT_SIN
    sheet.fill(box(across, along, 0.145, 0.225), "#17181d")
    sheet.fill(box(across, along, 0.12, 0.20), "#fffaf0")


def library(sheet: Sheet) -> None:
    """Shelves full of books in a few colours."""
    x, y = sheet.x, sheet.y
    sheet.wash("#57341f", "#452818", (y + 1) / 2)
    _paint_books(sheet)
    shelf = torch.remainder(y + _SHELVES_FROM, _SHELF_HEIGHT) - _SHELF_HEIGHT / 2
    sheet.fill(_SHELF_HEIGHT / 2 - _BOARD - shelf.abs(), "#a9713f")
    upright = torch.remainder(x + sheet.vary(0, 0.0, 1.3), 1.3) - 0.65
    sheet.fill(upright.abs() - 0.045, "#bb8049")
    sheet.fill(0.70 - y, "#cf9f6b")
    sheet.fill(box(x, y - 0.70, 2.0, 0.04), "#7d4f2d")


def _paint_books(sheet: Sheet) -> None:
    row, y = cell((sheet.y + _SHELVES_FROM) / _SHELF_HEIGHT)
    column, x = cell((sheet.x + sheet.vary(2)) / _BOOK_WIDTH)
    x, y, seed = x * _BOOK_WIDTH, y * _SHELF_HEIGHT, sheet.seed(1)
    foot = _SHELF_HEIGHT / 2 - _BOARD
    head = foot - 0.34 - 0.10 * chance(seed, row, column)
    book = torch.maximum(x.abs() - _BOOK_WIDTH * 0.45, torch.maximum(head - y, y - foot))
    palette = torch.cat([sheet.tone(colour) for colour in _BOOKS])[:, :, 0, 0]
    which = (chance(seed + 77, row, column) * len(_BOOKS)).long()
    sheet.fill(book, palette[which].permute(0, 3, 1, 2))
    sheet.fill(torch.maximum((y - head - 0.09).abs() - 0.02, book), "#f0dfb8", 0.6)
