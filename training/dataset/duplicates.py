"""Whether two pictures are the same one: saved anew, resized, cropped a little. By the pixels about the face, which move with it.

A hash of the whole picture changes with the crop; what is seen within twice the face's size around it does not. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from deployments.contracts import RGB, Floats

_CELLS: Final = 32
"""Of a look, either way: a cell is an eighth of a face, over which an encoder's noise averages out and an expression does not."""
_AROUND: Final = 4.0
_COMPARED: Final = 0.08
"""Of the cells, at least. A face alone has a sixteenth of them, and two portraits of one evening may be the same in so little."""
# Grey levels squared: of a picture without contrast nothing can be said.
_FLAT: Final = 4.0


def look(picture: RGB, box: Sequence[float]) -> bytes:
    """picture [H, W, 3], box of a face -> [32, 32, 4] uint8 as bytes: the square of four times the face's longer side about its middle,
    RGB, and in the last channel 255 where there is picture and 0 where it ends."""
    side = _AROUND * max(box[2] - box[0], box[3] - box[1], 1.0)
    left, top = (box[0] + box[2] - side) / 2, (box[1] + box[3] - side) / 2
    height, width = picture.shape[:2]
    edges = np.linspace(0, side, _CELLS + 1)
    columns, rows = np.round(left + edges).astype(int), np.round(top + edges).astype(int)
    inside_x, inside_y = (columns[:-1] >= 0) & (columns[1:] <= width), (rows[:-1] >= 0) & (rows[1:] <= height)
    cells = np.zeros((_CELLS, _CELLS, 4), np.uint8)
    if inside_x.any() and inside_y.any():
        (x0, x1), (y0, y1) = _ends(columns, inside_x), _ends(rows, inside_y)
        size = int(inside_x.sum()), int(inside_y.sum())
        seen = cv2.resize(picture[y0:y1, x0:x1], size, interpolation=cv2.INTER_AREA)
        place = np.ix_(inside_y, inside_x)
        cells[place] = np.dstack([seen, np.full(size[::-1], 255, np.uint8)])
    return cells.tobytes()


def likeness(first: bytes, second: bytes) -> float:
    """-1..1: correlation of two looks where both show something, each colour about its own mean, so that brightness and contrast may have
    been changed; 0 where they share too little."""
    one, other = _cells(first), _cells(second)
    shared = (one[..., 3] > 0) & (other[..., 3] > 0)
    if shared.mean() < _COMPARED:
        return 0.0
    a, b = _centred(one[shared]), _centred(other[shared])
    energy = float((a * a).sum()), float((b * b).sum())
    if min(energy) < _FLAT * a.size:
        return 0.0
    return float((a * b).sum() / np.sqrt(energy[0] * energy[1]))


def _ends(edges: NDArray[np.int_], inside: NDArray[np.bool_]) -> tuple[int, int]:
    where = np.flatnonzero(inside)
    return int(edges[where[0]]), int(edges[where[-1] + 1])


def _cells(packed: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(packed, np.uint8).reshape(_CELLS, _CELLS, 4)


def _centred(cells: NDArray[np.uint8]) -> Floats:
    colours = cells[:, :3].astype(np.float32)
    return np.asarray(colours - colours.mean(0), np.float32)
