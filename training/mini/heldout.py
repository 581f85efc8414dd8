"""People whom no model of the pack was trained on, for samples and for evaluation; and the sample characters, by name."""

from __future__ import annotations

from torch import Tensor

from training.mini.world.identity import sample_identities

HELD_OUT_SEED = 900_000
"""Training draws its people from seeds below; evaluation from this seed and the ones after it."""

SAMPLE_CHARACTERS = ("Ada", "Bruno", "Chiyo", "Dario", "Esi", "Farid", "Greta", "Hugo")
_CHARACTER_SEED = 910_000
_CHARACTER_ROWS = (0, 24, 29, 32, 7, 8, 10, 9)
"""Rows of the seed's draw, chosen by eye so that the eight differ in age, sex, hair and colour, and fit their names."""


def held_out_people(n: int, offset: int = 0) -> Tensor:
    """[n, 40]; different offsets give disjoint groups."""
    return sample_identities(n, HELD_OUT_SEED + offset)


def character_identity(name: str) -> Tensor:
    """[1, 40] of a sample character. Raises ValueError naming those that exist."""
    if name not in SAMPLE_CHARACTERS:
        raise ValueError(f"there is no sample character '{name}'; the samples are {', '.join(SAMPLE_CHARACTERS)}")
    row = _CHARACTER_ROWS[SAMPLE_CHARACTERS.index(name)]
    return sample_identities(64, _CHARACTER_SEED)[row : row + 1]
