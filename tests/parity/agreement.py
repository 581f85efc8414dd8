"""How ours is compared with what a reference implementation computed once (goldens/README.md)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
# Relative, in fp32: what another order of the same additions may cost.
TOLERANCE = 1e-5


@cache
def golden(name: str) -> dict[str, Tensor]:
    """The arrays of goldens/<name>.npz."""
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest number of theirs."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())
