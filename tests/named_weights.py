"""Weights and inputs for parity tests: numbers that follow from a name alone, the same in any library and on any machine.

A reference implementation and ours, filled by the names that both use, hold the same weights without any file of weights.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor, nn

# Of a uniform number in -1..1 this makes one of variance 1.
_UNIT = 3.0**0.5
_SPREAD_OF_VECTORS = 0.2


def named_tensor(name: str, *shape: int) -> Tensor:
    """fp32 of variance 1. Numpy's legacy generator is frozen (NEP 19), and uniform numbers need no libm: no last bit may differ."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    uniform = np.random.RandomState(seed).random_sample(shape) * 2 - 1
    return torch.from_numpy((uniform * _UNIT).astype(np.float32))


def fill(module: nn.Module) -> None:
    """Fills every parameter: matrices keep the variance of what they are applied to, norms and biases lie near 1 and near 0."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(_scaled(name, named_tensor(name, *parameter.shape)))


def _scaled(name: str, drawn: Tensor) -> Tensor:
    if drawn.ndim > 1:
        return drawn / math.sqrt(drawn[0].numel())
    return drawn * _SPREAD_OF_VECTORS + (1.0 if name.endswith("weight") else 0.0)
