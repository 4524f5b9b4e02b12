"""Intervals and verdicts of figures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distft.evaluation.metrics import figure_of, mean_figure, share_figure
from distft.evaluation.tasks.perplexity import figures
from distft.stats import Estimate


def test_fewer_than_ten_items_give_no_verdict() -> None:
    """If three or four items go the same way, a bootstrap interval excludes 0, whatever the differences are."""
    for count, verdict in ((3, "too few items"), (9, "too few items"), (10, "loss")):
        base = np.full(count, 8.0) + np.arange(count) % 2
        adapter = np.full(count, 4.0)
        found = mean_figure({"base": base, "adapter": adapter}, title="score", form=".2f")
        assert found["verdict"] == verdict and found["difference"]["high"] < 0
        won = {"base": np.zeros(count), "adapter": np.ones(count)}
        assert (share_figure(won, title="won", form=".1%")["verdict"] == "too few items") == (count < 10)
        shared = figures(
            {"base": 3.0 * np.arange(5, 5 + count), "adapter": 1.0 * np.arange(5, 5 + count)},
            np.full(count, 4.0),
            seed=0,
        )
        assert (shared["loss"]["verdict"] == "gain") == (count == 10)
    hidden = np.full(30, np.nan)
    hidden[:9] = 1.0  # on both sides, nine of thirty
    found = mean_figure({"base": hidden, "adapter": hidden + 1 + np.arange(30) / 100}, title="score", form=".2f")
    assert (found["count"], found["verdict"]) == (30, "too few items")


@pytest.mark.parametrize(
    ("interval", "better", "verdict"),
    [
        ((0.1, 0.2), "higher", "gain"),
        ((-0.2, -0.1), "higher", "loss"),
        ((-0.2, -0.1), "lower", "gain"),
        ((-0.1, 0.2), "higher", "inconclusive"),
        ((0.0, 0.0), "higher", "no difference"),
        ((math.nan, math.nan), "higher", None),
    ],
)
def test_a_difference_is_a_gain_or_loss_only_if_its_interval_excludes_zero(interval, better, verdict) -> None:
    low, high = interval
    side = Estimate(1.0, 0.9, 1.1)
    assert figure_of(side, side, Estimate((low + high) / 2, low, high), title="x", better=better)["verdict"] == verdict
