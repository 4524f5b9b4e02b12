"""Figures with 95% intervals, and verdicts on their differences.

Shares have Wilson's interval and their differences Newcombe's. Means and paired differences of scores have Student's.
F1 and perplexity, which are neither, have the bootstrap's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000
FEWEST = 10
"""With fewer pairs there is no verdict. Ten differences of the same sign occur by chance once in 512 times (sign test),
and Student's interval holds its level for ten grades from 1 to 5. For three or four items that happen to agree, an
interval would be too narrow."""
TOO_FEW = "too few items"
_NORMAL = 1.959963984540054
"""The normal distribution's quantile at (1 + LEVEL) / 2."""

Floats = NDArray[np.float64]
Side = Literal["base", "adapter"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Estimate:
    """A value and the bounds of its interval at LEVEL; NaN if unknown."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: Floats) -> Estimate:
        """Percentile interval of the values in bootstrap samples (Efron 1979), ignoring those that are not finite."""
        known = resampled[np.isfinite(resampled)]
        if not len(known):
            return cls(float(value), math.nan, math.nan)
        low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        return cls(float(value), float(low), float(high))

    @classmethod
    def normal(cls, value: float, error: float) -> Estimate:
        """Normal interval from the standard error."""
        return cls(value, value - _NORMAL * error, value + _NORMAL * error)

    @classmethod
    def proportion(cls, value: float, count: int) -> Estimate:
        """Wilson's interval (1927) of the share `value` of `count` items. NaN bounds without items.

        It stays within 0 and 1 and has a width at both. Items may count in part (a tie as a half): values between 0 and
        1 vary less than zeros and ones, so the interval is then slightly too wide.
        """
        if count < 1 or math.isnan(value):
            return cls(value, math.nan, math.nan)
        square = _NORMAL**2 / count
        centre = (value + square / 2) / (1 + square)
        width = _NORMAL * math.sqrt(value * (1 - value) / count + square / (4 * count)) / (1 + square)
        # At 0 and 1 a bound equals the share, except for rounding.
        return cls(value, min(max(centre - width, 0.0), value), max(min(centre + width, 1.0), value))

    @classmethod
    def share(cls, values: Floats) -> Estimate:
        """`proportion` of the mean of `values` [items], each from 0 to 1."""
        return cls.proportion(float(values.mean()) if len(values) else math.nan, len(values))

    @classmethod
    def student(cls, values: Floats) -> Estimate:
        """Student's interval (1908) of the mean of `values` [items].

        NaN bounds for a single value, and for fewer than FEWEST values that are all equal: they say nothing about the
        spread.
        """
        count = len(values)
        value = float(values.mean()) if count else math.nan
        spread = count > 1 and float(np.ptp(values)) > 0
        if count < 2 or (count < FEWEST and not spread):
            return cls(value, math.nan, math.nan)
        error = float(values.std(ddof=1)) / math.sqrt(count) if spread else 0.0
        width = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
        return cls(value, value - width, value + width)

    @classmethod
    def apart(cls, base: Estimate, adapter: Estimate, correlation: float) -> Estimate:
        """adapter − base of two estimates whose samples have this `correlation`, with bounds from those of the sides.

        Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on paired
        data", method 10; Zou and Donner 2008 for estimates in general. Unlike a bootstrap interval it has a width even
        if all items change in the same way.
        """

        def reach(one: float, other: float) -> float:
            return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))

        value = adapter.value - base.value
        low = reach(adapter.value - adapter.low, base.high - base.value)
        return cls(value, value - low, value + reach(adapter.high - adapter.value, base.value - base.low))


def correlation(one: Floats, other: Floats) -> float:
    """Pearson's correlation of pairs; 0 if a side is constant."""
    if not len(one) or float(np.ptp(one)) == 0 or float(np.ptp(other)) == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])


def apart_in_pairs(base: Floats, adapter: Floats) -> Estimate:
    """adapter − base of two shares of the same items, from their values [items] between 0 and 1."""
    return Estimate.apart(Estimate.share(base), Estimate.share(adapter), correlation(base, adapter))


def figure_of(
    base: Estimate | None,
    adapter: Estimate | None,
    difference: Estimate | None = None,
    *,
    title: str,
    better: Better = "higher",
    form: str = ".3f",
    count: int | None = None,
    pairs: int | None = None,
) -> dict[str, Any]:
    """A figure as `result["figures"][name]` holds it: both sides, their difference and the verdict.

    `difference` is adapter − base, over pairs of the same item if there are any; None if a side is missing. Reports
    format values with `form`. `count` is the number of items, and `pairs` the number of items with a value on both
    sides (`count` if None).
    """
    verdict = None if difference is None else verdict_on(difference, better, count if pairs is None else pairs)
    sides = {"base": base, "adapter": adapter, "difference": difference}
    return {
        "title": title,
        "better": better,
        "form": form,
        "count": count,
        "level": LEVEL,
        **{name: None if side is None else asdict(side) for name, side in sides.items()},
        "verdict": verdict,
    }


def verdict_on(difference: Estimate, better: Better, pairs: int | None) -> str | None:
    """What a difference between adapter and base means.

    `gain` or `loss` if its interval excludes 0, `inconclusive` if the interval contains 0, and `no difference` if both
    are exactly 0. With fewer than FEWEST pairs the verdict is `too few items`, whatever the interval. None if nothing
    is known.
    """
    if not math.isnan(difference.value) and pairs is not None and pairs < FEWEST:
        return TOO_FEW
    if math.isnan(difference.low):
        return None
    if difference.low > 0 or difference.high < 0:
        return "gain" if (difference.value > 0) == (better == "higher") else "loss"
    return "no difference" if difference.low == difference.high == 0 else "inconclusive"


def mean_estimate(values: Floats) -> Estimate:
    """The mean of `values` [items] with Student's interval, ignoring NaN."""
    return Estimate.student(values[np.isfinite(values)])


def mean_figure(sides: Mapping[Side, Floats], *, title: str, form: str, better: Better = "higher") -> dict[str, Any]:
    """A figure from a value for each item [items] on each side, NaN where an item has none.

    The difference is the mean over the items with a value on both sides.
    """
    base, adapter = sides["base"], sides.get("adapter")
    other, difference, pairs = None, None, None
    if adapter is not None:
        other, difference = mean_estimate(adapter), mean_estimate(adapter - base)
        pairs = int(_known_on_both(base, adapter).sum())
    return figure_of(
        mean_estimate(base),
        other,
        difference,
        title=title,
        better=better,
        form=form,
        count=len(base),
        pairs=pairs,
    )


def share_figure(sides: Mapping[Side, Floats], *, title: str, form: str) -> dict[str, Any]:
    """Like `mean_figure`, for values from 0 to 1 (a tie is 0.5) whose mean is a share: Wilson's and Newcombe's
    intervals."""
    base, adapter = sides["base"], sides.get("adapter")
    estimates = {side: Estimate.share(values[np.isfinite(values)]) for side, values in sides.items()}
    difference, pairs = None, None
    if adapter is not None:
        both = _known_on_both(base, adapter)
        difference, pairs = apart_in_pairs(base[both], adapter[both]), int(both.sum())
    return figure_of(
        estimates["base"],
        estimates.get("adapter"),
        difference,
        title=title,
        form=form,
        count=len(base),
        pairs=pairs,
    )


def unparsed_figure(sides: Mapping[Side, float], title: str, count: int) -> dict[str, Any]:
    """A figure of a share of `count` items with Wilson's interval. It has no verdict: it measures the judge, not the
    model."""
    estimates = {side: Estimate.proportion(value, count) for side, value in sides.items()}
    return figure_of(estimates["base"], estimates.get("adapter"), title=title, better="lower", form=".1%", count=count)


def _known_on_both(base: Floats, adapter: Floats) -> NDArray[np.bool_]:
    return np.isfinite(base) & np.isfinite(adapter)


def bootstrap_weights(count: int, seed: int, resamples: int = RESAMPLES) -> NDArray[np.int32]:
    """How often each of `count` items is drawn in each bootstrap sample, [resamples, count].

    The same seed gives the same samples for every figure, which makes differences paired.
    """
    draws = np.random.default_rng(seed)
    weights = np.zeros((resamples, count), dtype=np.int32)
    for row in weights:  # one sample at a time: all draws at once would take ten times the memory
        row += np.bincount(draws.integers(0, count, count), minlength=count).astype(np.int32)
    return weights
