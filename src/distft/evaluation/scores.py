"""From a score for each item and side to figures: means with their intervals, and the difference over the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from distft.evaluation.generate import Answer
from distft.evaluation.metrics import Estimate, Floats, apart_in_pairs, compared

Side = Literal["base", "adapter"]


def mean_of_known(values: Floats) -> Estimate:
    """The mean of those of `values` [items] that are not NaN, with Student's interval."""
    return Estimate.student(values[np.isfinite(values)])


def paired(
    sides: Mapping[Side, Floats], *, title: str, form: str, better: Literal["higher", "lower"] = "higher"
) -> dict[str, Any]:
    """A figure (`figures.compared`) of a value for each item and side, NaN where an item has none. The difference is over the items that
    have one on both sides."""
    base, adapter = sides["base"], sides.get("adapter")
    difference = None if adapter is None else mean_of_known(adapter - base)
    return compared(
        mean_of_known(base), None if adapter is None else mean_of_known(adapter), difference,
        title=title, better=better, form=form, count=len(base), pairs=None if adapter is None else _pairs(base, adapter),
    )  # fmt: skip


def paired_shares(sides: Mapping[Side, Floats], *, title: str, form: str) -> dict[str, Any]:
    """The same of values from 0 to 1 (a tie is a half), whose mean is a share: Wilson's and Newcombe's intervals."""
    base, adapter = sides["base"], sides.get("adapter")
    own = {side: Estimate.share(values[np.isfinite(values)]) for side, values in sides.items()}
    difference = None
    if adapter is not None:
        both = np.isfinite(base) & np.isfinite(adapter)
        difference = apart_in_pairs(base[both], adapter[both])
    return compared(
        own["base"], own.get("adapter"), difference,
        title=title, form=form, count=len(base), pairs=None if adapter is None else _pairs(base, adapter),
    )  # fmt: skip


def _pairs(base: Floats, adapter: Floats) -> int:
    return int((np.isfinite(base) & np.isfinite(adapter)).sum())


def share(sides: Mapping[Side, float], title: str, count: int) -> dict[str, Any]:
    """A figure of a share of `count`, with Wilson's interval; its difference is nobody's gain."""
    estimates = {side: Estimate.proportion(value, count) for side, value in sides.items()}
    return compared(estimates["base"], estimates.get("adapter"), title=title, better="lower", form=".1%", count=count)


def described(answers: Sequence[Answer]) -> dict[str, Any]:
    """What is to be known of answers before a score of them is believed: how long they are, and how many were cut off or empty."""
    return {
        "count": len(answers),
        "mean_tokens": sum(answer.tokens for answer in answers) / len(answers) if answers else None,
        "cut_off": sum(not answer.finished for answer in answers),
        "empty": sum(not answer.text.strip() for answer in answers),
    }
