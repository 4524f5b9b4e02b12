"""How far the repeats of two variants tell them apart: Welch's interval for a difference, and for a ratio on logarithms.

    ratio([40.1, 39.8, 40.4], [51.9, 51.2, 52.3])   # of the geometric means: centre, low, high

Welch (1947), "The generalization of Student's problem when several different population variances are involved", with the degrees of
freedom of Satterthwaite (1946). Runs are not paired by turn: what drifts over the turns then counts as noise of both sides, which makes
an interval wider and never too narrow, and pairs would halve the degrees of freedom, which a handful of repeats cannot spare.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
"""Of all intervals that are read together."""
POWER = 0.8
"""Of the comparisons in which a true difference is found, where it is asked how many repeats that takes."""
MOST = 1_000  # repeats
_GREATEST = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Interval:
    """An estimate and its bounds, which are None where there are too few values for any."""

    centre: float | None
    low: float | None = None
    high: float | None = None

    def excludes(self, value: float) -> bool:
        """Whether `value` is outside of the bounds; never where there are none."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def difference(one: Sequence[float], other: Sequence[float], together: int = 1) -> Interval:
    """The mean of `other` less that of `one`, with its interval; no bounds where a side has fewer than two values.

    `together` is how many intervals are read at once: each gets 1 − (1 − CONFIDENCE) / together (Bonferroni), so that all of them hold
    at once with CONFIDENCE. Where no value of a side differs from another the other side's spread decides alone, and where none of
    either does, the bounds are the estimate.
    """
    centre = statistics.fmean(other) - statistics.fmean(one)
    if min(len(one), len(other)) < 2:
        return Interval(centre)
    # Of the means. `statistics` computes exactly, so that equal values have no variance that rounding made.
    variances = [statistics.variance(side) / len(side) for side in (one, other)]
    error = math.sqrt(sum(variances))
    if error == 0:
        return Interval(centre, centre, centre)
    from scipy.special import stdtrit  # here, for a report on one run needs none of it

    shares = [
        variance / sum(variances) for variance in variances
    ]  # of 1, so that a tiny variance does not underflow in its square
    freedom = 1 / sum(share**2 / (len(side) - 1) for share, side in zip(shares, (one, other), strict=True))
    width = float(stdtrit(freedom, 1 - (1 - CONFIDENCE) / together / 2)) * error
    return Interval(centre, centre - width, centre + width)


def ratio(one: Sequence[float], other: Sequence[float], together: int = 1) -> Interval:
    """The geometric mean of `other` over that of `one`, with its interval: `difference` of the logarithms.

    Raises:
        ValueError: a value is 0 or negative.
    """
    found = difference([math.log(value) for value in one], [math.log(value) for value in other], together)
    centre, low, high = (None if it is None else _exp(it) for it in (found.centre, found.low, found.high))
    return Interval(centre, low, high)


def repeats_to_find(factor: float, one: Sequence[float], other: Sequence[float], together: int = 1) -> int | None:
    """How many values on each side it takes for `ratio` to exclude 1 in four of five comparisons whose true ratio is `factor`, with the
    spread of these; None where a side has fewer than two values or MOST do not suffice.

    The sample size of the t test (Chow, Shao, Wang and Lokhnygina, "Sample Size Calculations in Clinical Research", 3.2), with a central t
    for the power as well: within one of the exact number.
    """
    if min(len(one), len(other)) < 2:
        return None
    from scipy.special import stdtrit

    variance = statistics.fmean(statistics.variance(map(math.log, side)) for side in (one, other))
    for count in range(2, MOST + 1):
        quantiles = (float(stdtrit(2 * count - 2, share)) for share in (1 - (1 - CONFIDENCE) / together / 2, POWER))
        if sum(quantiles) * math.sqrt(2 * variance / count) <= abs(math.log(factor)):
            return count
    return None


def _exp(value: float) -> float:
    """Infinite where `math.exp` overflows: two runs that lie far apart leave a ratio all but open."""
    return math.inf if value > _GREATEST else math.exp(value)
