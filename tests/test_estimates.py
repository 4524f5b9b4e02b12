"""Intervals of figures over the items of an evaluation: Student's, Wilson's, Newcombe's and the bootstrap's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from distft.stats import Estimate, bootstrap_weights, paired_share_difference


def test_the_interval_of_a_mean_is_scipys() -> None:
    values = np.random.default_rng(0).exponential(size=20)
    ours = Estimate.student(values)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (ours.value, ours.low, ours.high) == pytest.approx((values.mean(), theirs.low, theirs.high))


@pytest.mark.parametrize("values", [[], [4.0], [8.0, 8.0, 8.0]])
def test_few_items_without_spread_have_no_interval(values: list[float]) -> None:
    found = Estimate.student(np.array(values))
    assert math.isnan(found.low) and math.isnan(found.high)


GRADES = np.arange(2.0, 11.0, 2.0)


@pytest.mark.parametrize("count", [3, 5, 10, 20])
def test_the_interval_of_a_mean_difference_holds_its_level_on_few_items(count: int) -> None:
    """For grades from 1 to 5, doubled. A bootstrap interval covers the mean too rarely: 74% for 3 items, 83% for 5."""
    draws = np.random.default_rng(count)
    of_base, of_adapter = np.array([0.1, 0.2, 0.4, 0.2, 0.1]), np.array([0.05, 0.15, 0.3, 0.3, 0.2])
    mean = float(GRADES @ (of_adapter - of_base))
    held = bootstrap = 0
    for _ in range(2_000):
        differences = draws.choice(GRADES, count, p=of_adapter) - draws.choice(GRADES, count, p=of_base)
        found = Estimate.student(differences)
        held += math.isnan(found.low) or found.low <= mean <= found.high
        weights = draws.multinomial(count, np.full(count, 1 / count), size=200)
        resampled = Estimate.bootstrap(float(differences.mean()), weights @ differences / count)
        bootstrap += resampled.low <= mean <= resampled.high
    assert 0.93 <= held / 2_000 <= 0.985
    assert count > 5 or bootstrap / 2_000 < 0.86, "else the trial does not tell the two apart"


@pytest.mark.parametrize(
    ("count", "base", "adapter", "both"), [(20, 0.5, 0.9, 0.48), (20, 0.9, 0.95, 0.88), (50, 0.1, 0.9, 0.1)]
)
def test_the_interval_of_a_difference_of_shares_holds_its_level(
    count: int, base: float, adapter: float, both: float
) -> None:
    draws = np.random.default_rng(7)
    held = 0
    for _ in range(2_000):
        drawn = draws.choice(4, count, p=[both, base - both, adapter - both, 1 - base - adapter + both])
        found = paired_share_difference(np.isin(drawn, [0, 1]).astype(float), np.isin(drawn, [0, 2]).astype(float))
        held += found.low <= adapter - base <= found.high
    assert held / 2_000 >= 0.93


def test_the_interval_of_a_difference_of_paired_shares_is_newcombes() -> None:
    """His formula, from the counts of pairs right on both sides (e), only one (f or g) or neither (h)."""
    e, f, g, h = 36, 12, 2, 0
    one = np.array([1.0] * (e + f) + [0.0] * (g + h))
    other = np.array([1.0] * e + [0.0] * f + [1.0] * g + [0.0] * h)
    n, z = e + f + g + h, 1.959963984540054
    first, second = (e + f) / n, (e + g) / n

    def wilson(p: float) -> tuple[float, float]:
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (p + z * z / (2 * n) - half) / (1 + z * z / n), (p + z * z / (2 * n) + half) / (1 + z * z / n)

    (l1, u1), (l2, u2) = wilson(first), wilson(second)
    phi = (e * h - f * g) / math.sqrt((e + f) * (g + h) * (e + g) * (f + h))
    low = math.sqrt((second - l2) ** 2 - 2 * phi * (second - l2) * (u1 - first) + (u1 - first) ** 2)
    high = math.sqrt((u2 - second) ** 2 - 2 * phi * (u2 - second) * (first - l1) + (first - l1) ** 2)
    found = paired_share_difference(one, other)
    assert (found.value, found.low, found.high) == pytest.approx(
        (second - first, second - first - low, second - first + high)
    )
    all_alike = paired_share_difference(np.ones(30), np.zeros(30))
    assert all_alike.value == -1 and all_alike.low == -1 < all_alike.high < -0.8, "it has a width"


def test_bootstrap_samples_have_the_size_of_the_data_and_depend_on_the_seed() -> None:
    weights = bootstrap_weights(7, seed=3, resamples=50)
    assert (weights.sum(1) == 7).all()
    assert (weights == bootstrap_weights(7, seed=3, resamples=50)).all()
    assert (weights != bootstrap_weights(7, seed=4, resamples=50)).any()


@pytest.mark.parametrize(("right", "count", "low", "high"), [(0, 6, 0.0, 0.39), (4, 6, 0.30, 0.903), (6, 6, 0.61, 1.0)])
def test_the_interval_of_a_share_has_a_width_and_stays_within_0_and_1(
    right: int, count: int, low: float, high: float
) -> None:
    """Wilson's, (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), by hand."""
    found = Estimate.proportion(right / count, count)
    assert (found.value, found.low, found.high) == pytest.approx((right / count, low, high), abs=0.005)
    theirs = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_a_tie_is_half_in_a_share_and_no_items_have_no_interval() -> None:
    halves = Estimate.share(np.array([1.0, 0.5, 0.0, 0.5]))
    assert halves == Estimate.share(np.array([1.0, 1.0, 0.0, 0.0])) and halves.low < 0.2 < 0.8 < halves.high
    nothing = Estimate.share(np.array([]))
    assert math.isnan(nothing.value) and math.isnan(nothing.low)
    assert math.isnan(Estimate.proportion(0.0, 0).low)
