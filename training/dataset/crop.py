"""What is kept of a picture: as much as shows the subject and no other face, at an aspect that a bucket takes.

Arithmetic of rectangles; sees no pixel. Boxes are x0, y0, x1, y1 in pixels of the whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from training.dataset.values import Box, Crop, area, overlap

# From a detector's box (forehead to chin, cheek to cheek) to the head with its hair, in the box's sides: above, at either side, below.
_ABOVE, _BESIDE, _BELOW = 0.45, 0.30, 0.15
# To head and shoulders, which are kept where there is room for them.
_SHOULDERS_ABOVE, _SHOULDERS_BESIDE, _SHOULDERS_BELOW = 0.6, 1.0, 1.2
_MOST_OTHERS: Final = 24
"""Faces that are cut around, the largest: around a crowd there is no picture of one person."""


def head(face: Sequence[float], size: tuple[int, int]) -> Box:
    """The box of the head of a face's box, within a picture of (width, height)."""
    return _grown(face, size, _ABOVE, _BESIDE, _BELOW)


def plan(subject: Sequence[float], others: Sequence[Sequence[float]], size: tuple[int, int], aspect: tuple[float, float]) -> Crop | None:
    """subject, others: boxes of faces; size: (width, height); aspect: least and most of width over height.

    Cut so that no other head is in it. Where another head reaches into the subject's, but its face does not, the cut goes along that face
    and the rest of that head is `masked`. None where another face itself reaches into the subject's head: it cannot be cropped away.
    """
    mine = head(subject, size)
    near = sorted(others, key=area, reverse=True)[:_MOST_OTHERS]
    if any(area(overlap(mine, face)) > 0 for face in near):
        return None
    heads = [head(face, size) for face in near]
    # Where the heads meet, the face alone is kept out.
    shut = [face if area(overlap(mine, whole)) > 0 else whole for face, whole in zip(near, heads, strict=True)]
    room = _free(_grown(subject, size, _SHOULDERS_ABOVE, _SHOULDERS_BESIDE, _SHOULDERS_BELOW), shut, size) or _free(mine, shut, size)
    if room is None:
        return None
    box = _clamped(room, mine, aspect)
    masked = tuple(whole for whole in heads if area(overlap(whole, box)) > 0)
    outside = sum(area(overlap(face, box)) == 0 for face in others)
    return Crop(box=box, masked=masked, left_out=outside)


def _grown(face: Sequence[float], size: tuple[int, int], above: float, beside: float, below: float) -> Box:
    width, height = face[2] - face[0], face[3] - face[1]
    grown = face[0] - beside * width, face[1] - above * height, face[2] + beside * width, face[3] + below * height
    return max(grown[0], 0.0), max(grown[1], 0.0), min(grown[2], float(size[0])), min(grown[3], float(size[1]))


def _free(keep: Box, shut: Sequence[Sequence[float]], size: tuple[int, int]) -> Box | None:
    """The largest rectangle of the picture that holds `keep` and meets none of `shut`; None where there is none.

    Each thing that is shut out is cut off at one of four sides. Rectangles that were seen before are not followed again, so that a group
    of people costs some hundred of them and not 4 to the power of their number.
    """
    best: Box | None = None
    seen: set[Box] = set()
    left = [(0.0, 0.0, float(size[0]), float(size[1]))]
    while left:
        room = left.pop()
        if room in seen or (best is not None and area(room) <= area(best)):
            continue
        seen.add(room)
        inside = next((other for other in shut if area(overlap(room, other)) > 0), None)
        if inside is None:
            best = room
        else:
            left += [cut for cut in _cuts(room, inside) if _holds(cut, keep)]
    return best


def _cuts(room: Box, other: Sequence[float]) -> list[Box]:
    """What is left of the room beside, above and below the other, the largest last: it is followed first."""
    x0, y0, x1, y1 = room
    cuts = [(x0, y0, float(other[0]), y1), (float(other[2]), y0, x1, y1), (x0, y0, x1, float(other[1])), (x0, float(other[3]), x1, y1)]
    return sorted(cuts, key=area)


def _holds(room: Box, keep: Box) -> bool:
    return room[0] <= keep[0] and room[1] <= keep[1] and room[2] >= keep[2] and room[3] >= keep[3]


def _clamped(room: Box, mine: Box, aspect: tuple[float, float]) -> tuple[int, int, int, int]:
    """Whole pixels, no wider and no higher than the aspect allows; the head stays in, in the middle as far as there is room."""
    x0, y0, x1, y1 = math.ceil(room[0]), math.ceil(room[1]), math.floor(room[2]), math.floor(room[3])
    width, height = x1 - x0, y1 - y0
    if width > height * aspect[1]:
        x0, x1 = _around((mine[0] + mine[2]) / 2, math.floor(height * aspect[1]), x0, x1)
    elif width < height * aspect[0]:
        # A standing figure goes on downwards from its head.
        tall = math.floor(width / aspect[0])
        y0 = min(max(y0, math.floor(mine[1] - (mine[3] - mine[1]) / 2)), y1 - tall)
        y1 = y0 + tall
    return x0, y0, x1, y1


def _around(middle: float, length: int, low: int, high: int) -> tuple[int, int]:
    start = min(max(round(middle - length / 2), low), high - length)
    return start, start + length
