from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from distft.evaluation.figures import Estimate, bootstrap_weights, compared, mean
from distft.evaluation.perplexity import figures


def test_a_mean_has_the_interval_that_scipy_gives_it() -> None:
    values = np.random.default_rng(0).exponential(size=200)
    ours = mean(values, seed=1)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=2).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_every_bootstrap_sample_draws_as_many_items_and_the_seed_decides_which() -> None:
    weights = bootstrap_weights(7, seed=3, resamples=50)
    assert (weights.sum(1) == 7).all()
    assert (weights == bootstrap_weights(7, seed=3, resamples=50)).all()
    assert (weights != bootstrap_weights(7, seed=4, resamples=50)).any()


@pytest.mark.parametrize(
    ("interval", "better", "verdict"),
    [
        ((0.1, 0.2), "higher", "gain"), ((-0.2, -0.1), "higher", "loss"), ((-0.2, -0.1), "lower", "gain"),
        ((-0.1, 0.2), "higher", "no difference"), ((0.0, 0.0), "higher", "no difference"), ((math.nan, math.nan), "higher", None),
    ],
)  # fmt: skip
def test_a_difference_is_one_where_its_interval_leaves_zero_out(interval, better, verdict) -> None:
    low, high = interval
    side = Estimate(1.0, 0.9, 1.1)
    assert compared(side, side, Estimate((low + high) / 2, low, high), title="x", better=better)["verdict"] == verdict


def test_perplexity_is_the_exponential_of_the_mean_over_tokens_and_pairs_beat_chance() -> None:
    draws = np.random.default_rng(5)
    tokens = draws.integers(5, 50, 80).astype(float)
    base = tokens * draws.normal(3.0, 1.0, 80)
    adapter = base - tokens * draws.normal(0.1, 0.05, 80)  # samples differ far more than the sides do
    found = figures({"base": base, "adapter": adapter}, tokens, seed=0)
    assert found["perplexity"]["base"]["value"] == pytest.approx(math.exp(base.sum() / tokens.sum()))
    assert found["loss"]["difference"]["value"] == pytest.approx((adapter - base).sum() / tokens.sum())
    assert found["loss"]["verdict"] == found["perplexity"]["verdict"] == "gain"
    wide = found["loss"]["base"]["high"] - found["loss"]["base"]["low"]
    assert found["loss"]["difference"]["high"] - found["loss"]["difference"]["low"] < wide / 5
