"""The arithmetic of an evaluation: location and spread, bootstrap intervals over clusters, differences in pairs. Knows no faces.

Pictures of one prompt are alike, whatever their seeds: what is drawn anew in a resample is a whole cluster, never a single picture, or
more seeds would promise a certainty that more prompts alone can give (Field and Welsh, Bootstrapping clustered data, 2007, the cluster
bootstrap). Intervals are percentiles; with few clusters they are somewhat narrow.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

RESAMPLES: Final = 4000
CONFIDENCE: Final = 0.95
_SEED: Final = 0
_Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """Of n values. std: of a sample (n - 1), 0 of a single value. low, high: the interval of the mean."""

    mean: float
    median: float
    std: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of `other - one` over pairs, its interval, and the share of pairs in which the other is higher. pairs: their number."""

    mean: float
    low: float
    high: float
    higher: float
    pairs: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def spread(values: Sequence[float], clusters: Sequence[Hashable]) -> Spread | None:
    """clusters: one a value. None for no values. Raises ValueError for values that are not finite, or another number of clusters."""
    numbers = _checked(values, clusters)
    if not len(numbers):
        return None
    low, high = interval(values, clusters)
    std = float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0
    return Spread(float(numbers.mean()), float(np.median(numbers)), std, low, high, len(numbers))


def interval(values: Sequence[float], clusters: Sequence[Hashable], resamples: int = RESAMPLES) -> tuple[float, float]:
    """The interval of the mean of all values, clusters drawn anew with all that is in them. The same values give the same interval."""
    numbers = _checked(values, clusters)
    places: dict[Hashable, int] = {}
    each = np.array([places.setdefault(cluster, len(places)) for cluster in clusters])
    sums, counts = np.bincount(each, numbers), np.bincount(each)
    drawn = np.random.default_rng(_SEED).integers(0, len(places), (resamples, len(places)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def difference(one: Mapping[Any, float], other: Mapping[Any, float], clusters: Mapping[Any, Hashable]) -> Difference | None:
    """Pairs are the keys that both have; clusters: of each key. None where there is no pair."""
    keys = [key for key in one if key in other]
    if not keys:
        return None
    gains = [other[key] - one[key] for key in keys]
    low, high = interval(gains, [clusters[key] for key in keys])
    return Difference(float(np.mean(gains)), low, high, float(np.mean([gain > 0 for gain in gains])), len(keys))


def _checked(values: Sequence[float], clusters: Sequence[Hashable]) -> _Numbers:
    numbers = np.asarray(values, np.float64)
    if len(numbers) != len(clusters):
        raise ValueError(f"{len(numbers)} values have {len(clusters)} clusters; give one each.")
    if not np.isfinite(numbers).all():
        raise ValueError("A value is not finite; leave out what was not measured.")
    return numbers
