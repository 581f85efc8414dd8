"""The five expressions as numbers: how far the moving parts of a face move. Paints nothing and knows no identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# Rows in the order of scene.EXPRESSIONS, columns in the order of Expression's fields.
_MOVES: Final = (
    # open  lid   squint slant  lift  worry  width  bend    upper  lower  teeth
    (1.00, 0.78, 0.00, 0.00, 0.00, 0.00, 0.92, 0.025, 0.000, 0.000, 0.00),  # neutral
    (0.98, 0.78, 0.24, 0.00, 0.02, 0.00, 1.18, 0.110, 0.000, 0.085, 1.00),  # smiling
    (0.92, 0.72, 0.55, 0.00, 0.05, 0.00, 1.26, 0.090, 0.030, 0.225, 1.00),  # laughing
    (1.10, 1.05, 0.00, 0.00, 0.11, 0.04, 0.60, 0.000, 0.110, 0.125, 0.00),  # surprised
    (0.96, 0.62, 0.00, 0.40, 0.01, 0.36, 0.86, -0.110, 0.000, 0.000, 0.00),  # sad
)


@dataclass(frozen=True, eq=False)
class Expression:
    """Each [n, 1, 1]. Lengths in head units.

    open: height of the eyes, as a factor. lid: how far up the upper lid is, as a share of the eye's half height. squint: how
    far the lower lid rises. slant: slope of the upper lid, falling outwards. lift: brows go up. worry: their inner ends go
    up (radians). width: of the mouth, as a factor. bend: corners above (positive) or below its middle. upper, lower: how far
    the mouth opens above and below its line. teeth: switch.
    """

    open: Tensor
    lid: Tensor
    squint: Tensor
    slant: Tensor
    lift: Tensor
    worry: Tensor
    width: Tensor
    bend: Tensor
    upper: Tensor
    lower: Tensor
    teeth: Tensor


def expression_of(index: Tensor) -> Expression:
    """index: [n] long, into scene.EXPRESSIONS."""
    row = torch.tensor(_MOVES, device=index.device)[index]
    return Expression(*(value.view(-1, 1, 1) for value in row.unbind(1)))
