"""Where in the picture a person acts: from what a request says to `contracts.Mask`, or a refusal.

A region is a name, a box or a painted picture. All masks of a drawing lie on one grid of cells, hence they can be compared, and a mask
counts as what it is brought to: values between cells are shares of a cell. Pure: knows no model and no request type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from deployments.contracts import Floats, Mask
from deployments.errors import InvalidImage, InvalidRequest
from deployments.images import DEFAULT_LIMITS, Limits, decode

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 as parts of the picture's width and height, 0..1, the origin at the top left."""

REGIONS: Final[Mapping[str, Box]] = {
    "left": (0, 0, 0.5, 1),
    "right": (0.5, 0, 1, 1),
    "top": (0, 0, 1, 0.5),
    "bottom": (0, 0.5, 1, 1),
    "left_third": (0, 0, 1 / 3, 1),
    "middle_third": (1 / 3, 0, 2 / 3, 1),
    "right_third": (2 / 3, 0, 1, 1),
    "centre": (0.25, 0.25, 0.75, 0.75),
}
"""Sides as the picture's viewer sees them: a person at the left of the picture is in `left`."""

# A token of mini is 8 pixels wide, one of FLUX.1 16: on this grid no edge that lies between tokens is moved. Larger pictures, which no base
# model of the catalogue draws, get larger cells.
_CELL_PX: Final = 8
_MOST_CELLS: Final = 256
# Twice the largest drawing in each direction; as floats such a mask takes 200 MB for a moment.
_MOST_PIXELS: Final = 4096 * 4096
_ALLOWED_OVERLAP: Final = 0.005
"""Share of the picture on which two people may both be: about what the edges of two painted masks have in common."""
_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def named(region: str, size: tuple[int, int], where: str) -> Mask:
    """A region of REGIONS in a picture of size (width, height) pixels. where: the request's field. Raises InvalidRequest."""
    if region not in REGIONS:
        raise InvalidRequest(
            f"`{where}` is {region!r}, and no region is called so.",
            f"Use one of {', '.join(REGIONS)}, a box [x0, y0, x1, y1] in 0..1, or a picture.",
            {"param": where, "choices": list(REGIONS)},
        )
    return boxed(REGIONS[region], size, where)


def boxed(box: Sequence[float], size: tuple[int, int], where: str) -> Mask:
    """All within the box (see Box), and nothing else, in a picture of size (width, height) pixels. Raises InvalidRequest."""
    if len(box) != 4 or not all(0 <= edge <= 1 for edge in box) or box[0] >= box[2] or box[1] >= box[3]:
        raise InvalidRequest(
            f"`{where}` is {list(box)}, and no box: [x0, y0, x1, y1] with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1.",
            "Write the left, upper, right and lower edge as parts of the picture's width and height.",
            {"param": where},
        )
    columns, rows = _cells(size)
    across, down = _coverage(columns, box[0], box[2]), _coverage(rows, box[1], box[3])
    return _mask(down[:, None] * across[None], where)


def painted(data: bytes, size: tuple[int, int], where: str, limits: Limits = DEFAULT_LIMITS) -> Mask:
    """A picture file in the shape of the drawing, of (width, height) pixels: white is here, black is not, grey is a share.

    What is transparent is not here. Raises InvalidImage, InvalidRequest.
    """
    try:
        picture = decode(data, replace(limits, pixels=min(limits.pixels, _MOST_PIXELS)), "black")
    except InvalidImage as error:
        raise InvalidImage(f"`{where}`: {error.message}", error.remedy, {**error.details, "param": where}) from error
    height, width = picture.shape[:2]
    if not _of_one_shape((width, height), size):
        raise InvalidRequest(
            f"The mask `{where}` is {width} x {height} pixels, the picture is {size[0]} x {size[1]}: not the same shape.",
            "Send a mask of the picture's size, or of its proportions.",
            {"param": where, "mask": [width, height], "picture": list(size)},
        )
    columns, rows = _cells(size)
    shares = np.asarray(picture @ _LUMA, np.float32) / np.float32(255)
    return _mask(_averaging(rows, height) @ shares @ _averaging(columns, width).T, where)


def refuse_overlaps(masks: Sequence[tuple[str, object, Mask]]) -> None:
    """masks: (field of the request, whom it is for, mask) of one drawing; equal people may lie upon one another.

    Raises InvalidRequest naming two fields where two people would both act: both would be one face there.
    """
    for number, (where, person, mask) in enumerate(masks):
        for other_where, other, other_mask in masks[:number]:
            if person != other:
                _refuse_overlap(other_where, other_mask, where, mask)


def _refuse_overlap(first: str, first_mask: Mask, second: str, second_mask: Mask) -> None:
    if (first_mask.width, first_mask.height) != (second_mask.width, second_mask.height):
        raise ValueError(f"The masks `{first}` and `{second}` are of different sizes: they were not made for one drawing.")
    both = float(((first_mask.shares > 0.5) & (second_mask.shares > 0.5)).mean())
    if both > _ALLOWED_OVERLAP:
        raise InvalidRequest(
            f"The masks `{first}` and `{second}` overlap on {both:.1%} of the picture, and they are of two people.",
            "Give each person a place of their own; only edges may touch.",
            {"param": second, "other": first, "overlap": round(both, 4)},
        )


def _cells(size: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows of the grid on a picture of size (width, height) pixels."""
    columns, rows = (min(_MOST_CELLS, -(-side // _CELL_PX)) for side in size)
    return columns, rows


def _coverage(cells: int, low: float, high: float) -> Floats:
    """[cells]: how much of each of them lies between low and high, parts of the whole row."""
    edges = np.arange(cells + 1, dtype=np.float64)
    shares = np.minimum(edges[1:], high * cells) - np.maximum(edges[:-1], low * cells)
    return np.asarray(np.clip(shares, 0, 1), np.float32)


def _averaging(cells: int, pixels: int) -> Floats:
    """[cells, pixels]: rows that sum up to 1, the mean over what of the pixels lies in each cell."""
    cell, pixel = (np.arange(count + 1, dtype=np.float64) / count for count in (cells, pixels))
    shared = np.minimum(cell[1:, None], pixel[None, 1:]) - np.maximum(cell[:-1, None], pixel[None, :-1])
    return np.asarray(np.maximum(shared, 0) * cells, np.float32)


def _of_one_shape(mask: tuple[int, int], picture: tuple[int, int]) -> bool:
    """Whether the one is the other made larger or smaller, with either of its sides rounded to a whole pixel, up or down."""
    across = abs(mask[0] - mask[1] * picture[0] / picture[1])
    down = abs(mask[1] - mask[0] * picture[1] / picture[0])
    return min(across, down) < 1


def _mask(shares: Floats, where: str) -> Mask:
    """shares: [rows, columns], 0..1. Raises InvalidRequest if there is nothing in it."""
    values = np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8)
    if not values.any():
        raise InvalidRequest(
            f"The mask `{where}` is empty: the person would be nowhere.",
            "White is where the person acts; for nobody at all use weight 0.",
            {"param": where},
        )
    rows, columns = values.shape
    return Mask(columns, rows, values.tobytes())
