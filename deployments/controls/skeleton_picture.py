"""Skeletons drawn as ControlNets were trained to read them: OpenPose's colours on black, limbs as thin ellipses, joints as dots.

The picture is that of controlnet_aux (src/controlnet_aux/dwpose/util.py, draw_bodypose), with soft edges. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, hypot
from typing import Final

import numpy as np

from deployments.contracts import RGB, Floats
from deployments.controls.skeleton import Skeleton, reframed

# There: limbSeq (counted from 1), and the colours of limbs and joints, RGB. Its last two limbs, shoulder to ear, are never drawn.
_LIMBS: Final = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
_COLOURS: Final = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85), (0, 255, 170),
    (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
_LIMB_BRIGHTNESS: Final = 0.6
# stickwidth and the radius of a joint there, in a picture whose shorter side is 512 pixels.
_STICK: Final = 4 / 512
# What counts as black (JPEG leaves up to 30 beside a limb), as a pure colour, and how much of a drawing is either.
_BLACK_UNTIL: Final = 32
_PURE_UNTIL: Final = 0.35
_COLOURED_AT_MOST, _PURE_AT_LEAST = 0.4, 0.5


def draw(skeletons: Sequence[Skeleton], width: int, height: int) -> RGB:
    """Skeletons of one picture -> RGB [height, width, 3]. A limb is drawn where both of its ends are visible.

    Widths grow with the shorter side. A skeleton of another aspect is put into the middle, whole and unstretched.
    """
    framed = [reframed(skeleton, width / height) for skeleton in skeletons]
    places = [skeleton.points * (width, height) for skeleton in framed]
    seen = [skeleton.visible for skeleton in framed]
    canvas, stick = np.zeros((height, width, 3), np.float32), _STICK * min(width, height)
    # All limbs lie under all joints, whoever's they are.
    for number, (start, end) in enumerate(_LIMBS):
        for points, visible in zip(places, seen, strict=True):
            if visible[start] and visible[end]:
                _paint(canvas, points[start], points[end], stick, np.array(_COLOURS[number], np.float32) * _LIMB_BRIGHTNESS)
    for number, colour in enumerate(_COLOURS):
        for points, visible in zip(places, seen, strict=True):
            if visible[number]:
                _paint(canvas, points[number], points[number], stick, np.array(colour, np.float32))
    return np.asarray(canvas.round(), np.uint8)


def is_drawn(picture: RGB) -> bool:
    """Whether RGB [H, W, 3] is a drawing of a skeleton already, of ours or another's, and no photograph to look for people in.

    Such a picture is black but for pure colours: of each the darkest channel is 0, also where it fades into the black. The white dots of a
    face and what JPEG does to borders are allowed for.
    """
    brightest, darkest = picture.max(-1), picture.min(-1)
    coloured = brightest > _BLACK_UNTIL
    share = float(coloured.mean())
    if not 0 < share < _COLOURED_AT_MOST:
        return False
    pure = (darkest < _PURE_UNTIL * brightest.astype(np.float32))[coloured]
    return float(pure.mean()) > _PURE_AT_LEAST


def _paint(canvas: Floats, start: Floats, end: Floats, stick: float, colour: Floats) -> None:
    """Lays the ellipse whose long axis is the segment from start to end (pixels; a disc where they are one) over the canvas, of which
    only the rows and columns that it touches are looked at."""
    half = hypot(*(end - start)) / 2
    long = max(half, stick / 2) if half else stick
    reach = np.abs(end - start) / 2 + stick + 1
    (x0, y0), (x1, y1) = (start + end) / 2 - reach, (start + end) / 2 + reach
    rows = slice(max(0, floor(y0)), min(canvas.shape[0], ceil(y1)))
    columns = slice(max(0, floor(x0)), min(canvas.shape[1], ceil(x1)))
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None] + 0.5 - (start[0] + end[0]) / 2
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5 - (start[1] + end[1]) / 2
    dx, dy = (end - start) / (2 * half) if half else (1.0, 0.0)
    distance = _to_oval(x * dx + y * dy, y * dx - x * dy, long, stick)
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]
    canvas[rows, columns] += coverage * (colour - canvas[rows, columns])


def _to_oval(x: Floats, y: Floats, a: float, b: float) -> Floats:
    """Distance in pixels, negative inside, to first order near the border (I. Quilez, "ellipse - distance bound"): the same measure that
    training/mini draws with, whose ControlNet learned from it. Far from a flat ellipse it would come out too small, hence the box."""
    level = np.sqrt((x / a) ** 2 + (y / b) ** 2 + 1e-6)
    slope = np.sqrt((x / a**2) ** 2 + (y / b**2) ** 2 + 1e-6)
    return np.asarray(np.maximum(level * (level - 1) / slope, np.maximum(np.abs(x) - a, np.abs(y) - b)), np.float32)
