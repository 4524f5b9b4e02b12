"""From a score for each item and side to figures: means with their intervals, and the difference over the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from distft.evaluation.figures import Estimate, Floats, compared, mean
from distft.evaluation.writing import Answer

Side = Literal["base", "adapter"]


def mean_of_known(values: Floats, seed: int) -> Estimate:
    """The mean of those of `values` [items] that are not NaN."""
    return mean(values[np.isfinite(values)], seed)


def paired(
    sides: Mapping[Side, Floats], seed: int, *, title: str, form: str, better: Literal["higher", "lower"] = "higher"
) -> dict[str, Any]:
    """A figure (`figures.compared`) of a value for each item and side, NaN where an item has none. The difference is over the items that
    have one on both sides."""
    base, adapter = sides["base"], sides.get("adapter")
    difference = None if adapter is None else mean_of_known(adapter - base, seed)
    return compared(
        mean_of_known(base, seed), None if adapter is None else mean_of_known(adapter, seed), difference,
        title=title, better=better, form=form, count=len(base),
    )  # fmt: skip


def share(sides: Mapping[Side, float], title: str, count: int) -> dict[str, Any]:
    """A figure of a share that is no estimate of anything, so without an interval."""
    estimates = {side: Estimate(value, math.nan, math.nan) for side, value in sides.items()}
    return compared(estimates["base"], estimates.get("adapter"), title=title, better="lower", form=".1%", count=count)


def described(answers: Sequence[Answer]) -> dict[str, Any]:
    """What is to be known of answers before a score of them is believed: how long they are, and how many were cut off or empty."""
    return {
        "count": len(answers),
        "mean_tokens": sum(answer.tokens for answer in answers) / len(answers) if answers else None,
        "cut_off": sum(not answer.finished for answer in answers),
        "empty": sum(not answer.text.strip() for answer in answers),
    }
