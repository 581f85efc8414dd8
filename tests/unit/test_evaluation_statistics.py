"""The arithmetic of evaluations against closed forms and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from training.evaluation.statistics import difference, interval, spread

Numbers = NDArray[np.float64]


def _drawn(count: int, seed: int = 5) -> Numbers:
    return np.random.default_rng(seed).normal(0.6, 0.1, count)


def test_location_and_spread_are_those_of_numpy() -> None:
    values = _drawn(37)
    found = spread(list(values), range(37))
    assert found is not None
    assert (found.mean, found.median, found.n) == (float(values.mean()), float(np.median(values)), 37)
    assert found.std == pytest.approx(float(stats.tstd(values)))  # of a sample: n - 1


def test_one_value_has_no_spread_and_none_has_nothing() -> None:
    one = spread([0.4], ["a"])
    assert one is not None and (one.mean, one.std, one.low, one.high) == (0.4, 0.0, 0.4, 0.4)
    assert spread([], []) is None


def test_without_clusters_the_interval_is_scipys_bootstrap() -> None:
    values = _drawn(36)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    ours = interval(list(values), range(36))
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.002)


@pytest.mark.parametrize("count", [9, 36, 72, 400])
def test_half_of_it_is_the_normal_distributions(count: int) -> None:
    """1.96 standard errors, of the population's formula: what a resample varies by."""
    values = _drawn(count)
    low, high = interval(list(values), range(count))
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(count), rel=0.08)


def test_repeating_a_prompt_promises_no_more_certainty() -> None:
    values = list(_drawn(9))
    repeated = [value for value in values for _ in range(8)]
    names = [place for place in range(9) for _ in range(8)]
    assert interval(repeated, names) == pytest.approx(interval(values, range(9)))
    alone = interval(repeated, range(72))  # as if every picture told something of its own
    assert alone[1] - alone[0] < 0.5 * (interval(values, range(9))[1] - interval(values, range(9))[0])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """30 prompts, 4 seeds each, whose prompts differ as much as their seeds do."""
    rng, held = np.random.default_rng(3), 0
    names = [prompt for prompt in range(30) for _ in range(4)]
    for _ in range(200):
        values = 0.5 + np.repeat(rng.normal(0, 0.1, 30), 4) + rng.normal(0, 0.1, 120)
        low, high = interval(list(values), names, resamples=400)
        held += low <= 0.5 <= high
    assert 0.88 <= held / 200 <= 0.985  # 95 %, of 200 trials, with percentiles that are somewhat narrow


def test_clusters_of_different_sizes_weigh_by_their_values() -> None:
    low, high = interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert (low, high) == (0.0, 1.0)  # only a, or only b


def test_a_difference_is_taken_in_pairs() -> None:
    """Prompts differ by much, the configurations by little: in pairs that is seen, between means it is not."""
    rng = np.random.default_rng(8)
    base = {place: float(rng.uniform(-1, 1)) for place in range(36)}
    better = {place: value + 0.05 + float(rng.normal(0, 0.02)) for place, value in base.items()}
    found = difference(base, better, {place: place for place in base})
    assert found is not None and found.pairs == 36 and found.clear
    gains = np.array([better[place] - base[place] for place in base])
    assert found.mean == pytest.approx(float(gains.mean()))
    assert found.higher == pytest.approx(float((gains > 0).mean()))
    theirs = stats.bootstrap((gains,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.001)
    apart = interval(list(better.values()), range(36))
    assert apart[0] < float(np.mean(list(base.values()))) < apart[1]


def test_only_what_both_have_is_a_pair() -> None:
    found = difference({"a": 0.1, "b": 0.2}, {"b": 0.5, "c": 0.9}, {"a": 1, "b": 2, "c": 3})
    assert found is not None and found.pairs == 1
    assert found.mean == pytest.approx(0.3)
    assert difference({"a": 0.1}, {"c": 0.9}, {"a": 1, "c": 3}) is None


def test_the_same_values_give_the_same_interval() -> None:
    values = list(_drawn(20))
    assert interval(values, range(20)) == interval(values, range(20))


def test_what_was_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        spread([0.1, math.nan], ["a", "b"])
    with pytest.raises(ValueError, match="2 values have 1 clusters"):
        interval([0.1, 0.2], ["a"])
