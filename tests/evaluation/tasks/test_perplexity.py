"""Perplexity and loss from the likelihoods of samples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distft.evaluation.tasks.perplexity import figures


def test_perplexity_is_exp_of_the_mean_per_token_and_pairs_narrow_the_difference() -> None:
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


def test_samples_count_by_their_tokens_in_the_interval_too() -> None:
    """Short samples are five times as hard. Over all tokens, that hardly matters; a mean of means would be 3."""
    tokens = np.repeat([1.0, 100.0], 40)
    found = figures({"base": np.repeat([5.0, 100.0], 40)}, tokens, seed=0)["loss"]["base"]
    assert found["value"] == pytest.approx(4200 / 4040)
    assert 1.02 < found["low"] < found["value"] < found["high"] < 1.08
