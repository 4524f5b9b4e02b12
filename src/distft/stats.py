"""Confidence intervals: of differences and ratios between repeated runs, and of figures over the items of an
evaluation.

    ratio([40.1, 39.8, 40.4], [51.9, 51.2, 52.3])   # of the geometric means: centre, low, high

SciPy is imported inside functions: `scipy.stats` alone takes half a second, which most commands do not need to spend.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
"""Confidence level of an interval, or jointly of all intervals that are read together."""
POWER = 0.8
"""Probability of detecting a true difference, for estimates of how many repeats that takes."""
MAX_REPEATS = 1_000
RESAMPLES = 10_000
"""Number of bootstrap samples."""
FEWEST_ITEMS = 10
"""Below this number of pairs a figure gets no verdict. Ten differences of one sign happen by chance once in 512 times
(sign test), and Student's interval keeps its level for ten grades from 1 to 5. Three or four items that agree by
chance would give an interval that promises too much."""

_LARGEST_EXPONENT = math.log(sys.float_info.max)
_NORMAL = 1.959963984540054
"""Quantile of the normal distribution at (1 + CONFIDENCE) / 2."""

Floats: TypeAlias = NDArray[np.float64]


# ---- repeated runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """An estimate and its bounds; the bounds are None if there are too few values for them."""

    centre: float | None
    low: float | None = None
    high: float | None = None

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside the bounds; False without bounds."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def difference(one: Sequence[float], other: Sequence[float], together: int = 1) -> Interval:
    """Mean of `other` minus mean of `one`, with Welch's interval; no bounds if a side has fewer than two values.

    `together` is the number of intervals read at once. Each gets the level 1 − (1 − CONFIDENCE) / together
    (Bonferroni), so that they hold jointly with CONFIDENCE. If one side has no spread, the other's alone determines
    the width; if neither has, the bounds equal the estimate.

    Welch (1947), "The generalization of 'Student's' problem when several different population variances are
    involved", with the degrees of freedom of Satterthwaite (1946). The same as
    `scipy.stats.ttest_ind(equal_var=False).confidence_interval`, but exact for values without spread and without
    importing `scipy.stats`. Runs are not paired by turn: drift over the turns then counts as noise on both sides,
    which only widens the interval, while pairing would halve the degrees of freedom.
    """
    centre = statistics.fmean(other) - statistics.fmean(one)
    if min(len(one), len(other)) < 2:
        return Interval(centre)
    # Variances of the means. `statistics` computes exactly, so equal values have no variance from rounding.
    variances = [statistics.variance(side) / len(side) for side in (one, other)]
    error = math.sqrt(sum(variances))
    if error == 0:
        return Interval(centre, centre, centre)
    from scipy.special import stdtrit

    shares = [variance / sum(variances) for variance in variances]  # tiny variances would underflow when squared
    freedom = 1 / sum(share**2 / (len(side) - 1) for share, side in zip(shares, (one, other), strict=True))
    width = float(stdtrit(freedom, 1 - (1 - CONFIDENCE) / together / 2)) * error
    return Interval(centre, centre - width, centre + width)


def ratio(one: Sequence[float], other: Sequence[float], together: int = 1) -> Interval:
    """Geometric mean of `other` over that of `one`, with its interval: `difference` of the logarithms.

    Raises:
        ValueError: a value is not positive.
    """
    found = difference([math.log(value) for value in one], [math.log(value) for value in other], together)
    centre, low, high = (None if it is None else _exp(it) for it in (found.centre, found.low, found.high))
    return Interval(centre, low, high)


def repeats_to_find(factor: float, one: Sequence[float], other: Sequence[float], together: int = 1) -> int | None:
    """How many values per side `ratio` needs to exclude 1 with probability POWER if the true ratio is `factor` and
    the spread is that of these values. None if a side has fewer than two values, or MAX_REPEATS are not enough.

    Sample size of the t test (Chow, Shao, Wang and Lokhnygina, "Sample Size Calculations in Clinical Research", 3.2),
    with a central t distribution for the power as well: within one of the exact number.
    """
    if min(len(one), len(other)) < 2:
        return None
    from scipy.special import stdtrit

    variance = statistics.fmean(statistics.variance(map(math.log, side)) for side in (one, other))
    for count in range(2, MAX_REPEATS + 1):
        quantiles = (float(stdtrit(2 * count - 2, share)) for share in (1 - (1 - CONFIDENCE) / together / 2, POWER))
        if sum(quantiles) * math.sqrt(2 * variance / count) <= abs(math.log(factor)):
            return count
    return None


def _exp(value: float) -> float:
    """`math.exp`, but infinite where it would overflow: few values with a large spread leave a ratio almost
    unbounded."""
    return math.inf if value > _LARGEST_EXPONENT else math.exp(value)


# ---- items of an evaluation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A figure and its confidence interval (CONFIDENCE); NaN where there is nothing to compute it from."""

    value: float
    low: float
    high: float

    @classmethod
    def bootstrap(cls, value: float, resampled: Floats) -> Estimate:
        """Percentile interval (Efron 1979) from the figure in each bootstrap sample; ignores samples without a
        figure."""
        known = resampled[np.isfinite(resampled)]
        if not len(known):
            return cls(float(value), math.nan, math.nan)
        low, high = np.percentile(known, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
        return cls(float(value), float(low), float(high))

    @classmethod
    def normal(cls, value: float, error: float) -> Estimate:
        """Normal interval from the figure and its standard error."""
        return cls(value, value - _NORMAL * error, value + _NORMAL * error)

    @classmethod
    def proportion(cls, value: float, count: int) -> Estimate:
        """Wilson's interval (1927) of the share `value` of `count` items, which stays within 0 and 1 and has a width
        at both; no interval without items. Items may count as fractions (a tie as 0.5): values from 0 to 1 have at
        most the spread of 0 and 1, so the interval is then conservative."""
        if count < 1 or math.isnan(value):
            return cls(value, math.nan, math.nan)
        square = _NORMAL**2 / count
        centre = (value + square / 2) / (1 + square)
        width = _NORMAL * math.sqrt(value * (1 - value) / count + square / (4 * count)) / (1 + square)
        # At 0 and 1 one bound equals the share, up to rounding.
        return cls(value, min(max(centre - width, 0.0), value), max(min(centre + width, 1.0), value))

    @classmethod
    def share(cls, values: Floats) -> Estimate:
        """`proportion` of the mean of `values` [items], each from 0 to 1."""
        return cls.proportion(float(values.mean()) if len(values) else math.nan, len(values))

    @classmethod
    def student(cls, values: Floats) -> Estimate:
        """Mean of `values` [items] with Student's interval (1908). No interval for one value, nor for fewer than
        FEWEST_ITEMS equal ones, which say nothing about how much others would vary."""
        count = len(values)
        value = float(values.mean()) if count else math.nan
        spread = count > 1 and float(np.ptp(values)) > 0
        if count < 2 or (count < FEWEST_ITEMS and not spread):
            return cls(value, math.nan, math.nan)
        from scipy.special import stdtrit

        error = float(values.std(ddof=1)) / math.sqrt(count) if spread else 0.0
        width = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
        return cls(value, value - width, value + width)

    @classmethod
    def share_difference(cls, base: Estimate, adapter: Estimate, correlation: float) -> Estimate:
        """adapter − base for two shares whose items have this `correlation`, from the bounds of both sides (Newcombe
        1998, "Improved confidence intervals for the difference between binomial proportions based on paired data",
        method 10; Zou and Donner 2008 in general). It has a width even if every item changed the same way, unlike the
        bootstrap's."""

        def reach(one: float, other: float) -> float:
            return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))

        value = adapter.value - base.value
        low = reach(adapter.value - adapter.low, base.high - base.value)
        return cls(value, value - low, value + reach(adapter.high - adapter.value, base.value - base.low))


def correlation(one: Floats, other: Floats) -> float:
    """Pearson's correlation of pairs [items]; 0 if a side does not vary."""
    if not len(one) or float(np.ptp(one)) == 0 or float(np.ptp(other)) == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])


def paired_share_difference(base: Floats, adapter: Floats) -> Estimate:
    """adapter − base of the shares of the same items, whose values [items] are from 0 to 1."""
    return Estimate.share_difference(Estimate.share(base), Estimate.share(adapter), correlation(base, adapter))


def bootstrap_weights(count: int, seed: int, resamples: int = RESAMPLES) -> NDArray[np.int32]:
    """How often each bootstrap sample draws each of `count` items, [resamples, count]. All figures of one seed share
    the samples, which makes their differences paired."""
    draws = np.random.default_rng(seed)
    weights = np.zeros((resamples, count), dtype=np.int32)
    for row in weights:  # drawing all at once would take ten times the memory
        row += np.bincount(draws.integers(0, count, count), minlength=count).astype(np.int32)
    return weights


# ---- classification --------------------------------------------------------------------------------------------------


def metrics_of_matrices(matrices: Floats, positive: int) -> dict[str, Floats]:
    """Accuracy, precision, recall and F1 of the class `positive`, macro F1, and the share of unparsed answers, each as
    [samples], from many confusion matrices at once, [samples, classes, classes + 1].

    A rate with a zero denominator is 0.
    """
    classes = matrices.shape[1]
    right = np.diagonal(matrices, axis1=1, axis2=2)
    predicted, actual = matrices.sum(1)[:, :classes], matrices.sum(2)

    def rate(part: Floats, whole: Floats) -> Floats:
        return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)

    f1 = rate(2 * right, predicted + actual)
    total = actual.sum(1)
    return {
        "accuracy": right.sum(1) / total,
        "precision": rate(right, predicted)[:, positive],
        "recall": rate(right, actual)[:, positive],
        "f1": f1[:, positive],
        "macro_f1": f1.mean(1),
        "unparsed": matrices[:, :, classes].sum(1) / total,
    }
