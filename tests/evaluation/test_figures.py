from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from distft.charts import evaluation_charts
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


def test_a_chart_has_the_categories_that_have_a_score() -> None:
    def side(value: float | None) -> dict[str, float | None]:
        return {"value": value, "low": value, "high": value}

    score = compared(Estimate(4, 3, 5), Estimate(6, 5, 7), Estimate(2, 1, 3), title="score", form=".2f")
    categories = {
        "math": {"count": 2, "base": side(3.0), "adapter": side(5.0)},
        "stem": {"count": 1, "base": side(None), "adapter": side(8.0)},
        "coding": {"count": 1, "base": side(None), "adapter": side(None)},
    }
    charts = evaluation_charts({"run": {"mt_bench": {"figures": {"score": score}, "categories": categories}}})
    whole, parts = charts
    assert whole.key == "evaluation_mt_bench" and parts.key == "evaluation_mt_bench_by_category"
    assert parts.head == ("figure", "base", "adapter")
    assert [row[0] for row in parts.rows] == ["math", "stem"], "of coding nothing is known"
    assert "3.00" in parts.rows[0][1] and "5.00" in parts.rows[0][2] and "8.00" in parts.rows[1][2]


@pytest.mark.parametrize(("right", "count", "low", "high"), [(0, 6, 0.0, 0.39), (4, 6, 0.30, 0.903), (6, 6, 0.61, 1.0)])
def test_a_share_has_an_interval_within_0_and_1_and_of_some_width(
    right: int, count: int, low: float, high: float
) -> None:
    """Wilson's, (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), by hand."""
    found = Estimate.proportion(right / count, count)
    assert (found.value, found.low, found.high) == pytest.approx((right / count, low, high), abs=0.005)
