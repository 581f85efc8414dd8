"""Who somebody is: a point in the unit cube. What the numbers look like is the business of traits.py.

An identity is 40 independent uniform numbers; nothing of the scene enters it and it enters nothing of the scene.
The first coordinates are spoken for: 0 = sex, 1 = age.
"""

from __future__ import annotations

import torch
from torch import Tensor

IDENTITY_DIM = 40
AGE_BANDS = ("young adult", "adult", "senior")
_BAND_STARTS_YEARS = (35.0, 55.0)
_YOUNGEST_YEARS, _OLDEST_YEARS = 18.0, 75.0


def sample_identities(n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """[n, 40] in 0..1, the same for the same seed on every device."""
    return torch.rand(n, IDENTITY_DIM, generator=torch.Generator().manual_seed(seed)).to(device)


def sex(identity: Tensor) -> Tensor:
    """[n, 40] -> [n] long: 0 female, 1 male (insightface's order)."""
    return (identity[:, 0] >= 0.5).long()


def age_years(identity: Tensor) -> Tensor:
    """[n, 40] -> [n] years, 18..75."""
    return _YOUNGEST_YEARS + (_OLDEST_YEARS - _YOUNGEST_YEARS) * identity[:, 1]


def age_band(identity: Tensor) -> Tensor:
    """[n, 40] -> [n] long, an index into AGE_BANDS."""
    return torch.bucketize(age_years(identity), torch.tensor(_BAND_STARTS_YEARS, device=identity.device), right=True)
