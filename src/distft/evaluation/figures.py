"""Figures with what chance does to them: 95% intervals, and whether a difference means anything."""

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
_NORMAL = 1.959963984540054
"""The normal distribution's quantile at (1 + LEVEL) / 2."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and the bounds of its interval (LEVEL); NaN where there is nothing to take it from."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: Floats) -> Estimate:
        """From the figure and what it is in bootstrap samples: their percentiles (Efron 1979); samples that give none are left out."""
        known = resampled[np.isfinite(resampled)]
        if not len(known):
            return cls(float(value), math.nan, math.nan)
        low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        return cls(float(value), float(low), float(high))

    @classmethod
    def normal(cls, value: float, error: float) -> Estimate:
        """From the figure and its standard error, as a normal distribution."""
        return cls(value, value - _NORMAL * error, value + _NORMAL * error)

    @classmethod
    def proportion(cls, value: float, count: int) -> Estimate:
        """From the share `value` of `count` items: Wilson's interval (1927), which stays within 0 and 1 and has a width at both."""
        interval = stats.binomtest(round(value * count), count).proportion_ci(LEVEL, method="wilson")
        return cls(value, float(interval.low), float(interval.high))


def compared(
    base: Estimate | None,
    adapter: Estimate | None,
    difference: Estimate | None = None,
    *,
    title: str,
    better: Literal["higher", "lower"] = "higher",
    form: str = ".3f",
    count: int | None = None,
) -> dict[str, Any]:
    """A figure as `result["figures"][name]` holds it: both sides, adapter − base, and the verdict on it.

    `difference` comes from pairs where there are pairs; None where a side is missing. `form` is how the report writes it, `count` of
    how many items it is. The verdict is `gain` or `loss` where the interval of the difference leaves 0 out, else `no difference`.
    """
    verdict = None
    if difference is not None and not math.isnan(difference.low):
        verdict = "no difference"
        if difference.low > 0 or difference.high < 0:
            verdict = "gain" if (difference.value > 0) == (better == "higher") else "loss"
    sides: Mapping[str, Estimate | None] = {"base": base, "adapter": adapter, "difference": difference}
    return {
        "title": title, "better": better, "form": form, "count": count, "level": LEVEL,
        **{name: None if side is None else asdict(side) for name, side in sides.items()}, "verdict": verdict,
    }  # fmt: skip


def bootstrap_weights(count: int, seed: int, resamples: int = RESAMPLES) -> NDArray[np.int32]:
    """How often each of `count` items is drawn in each bootstrap sample, [resamples, count]: the same for every figure of one seed,
    which is what makes differences paired."""
    draws = np.random.default_rng(seed)
    weights = np.zeros((resamples, count), dtype=np.int32)
    for row in weights:  # one at a time: the draws of all would take ten times the memory
        row += np.bincount(draws.integers(0, count, count), minlength=count).astype(np.int32)
    return weights


def mean(values: Floats, seed: int) -> Estimate:
    """The mean of `values` [items] and its bootstrap interval over them."""
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan)
    return Estimate.of(float(values.mean()), bootstrap_weights(len(values), seed) @ values / len(values))
