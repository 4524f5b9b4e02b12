"""Figures with 95% intervals, and verdicts on their differences.

Shares have Wilson's interval and their differences Newcombe's. Means and paired differences of scores have Student's.
F1 and perplexity, which are neither, have the bootstrap's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distft.stats import CONFIDENCE, FEWEST_ITEMS, Estimate, Floats, paired_share_difference

TOO_FEW = "too few items"
Side = Literal["base", "adapter"]
Better = Literal["higher", "lower"]


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
        "level": CONFIDENCE,
        **{name: None if side is None else asdict(side) for name, side in sides.items()},
        "verdict": verdict,
    }


def verdict_on(difference: Estimate, better: Better, pairs: int | None) -> str | None:
    """What a difference between adapter and base means.

    `gain` or `loss` if its interval excludes 0, `inconclusive` if the interval contains 0, and `no difference` if both
    are exactly 0. With fewer than FEWEST_ITEMS pairs the verdict is `too few items`, whatever the interval. None if
    nothing is known.
    """
    if not math.isnan(difference.value) and pairs is not None and pairs < FEWEST_ITEMS:
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
        difference, pairs = paired_share_difference(base[both], adapter[both]), int(both.sum())
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
