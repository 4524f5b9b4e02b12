"""Figures of a classifier, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from distft.evaluation.classifier import compare, confusion, item_counts, metrics
from distft.stats import metrics_of_matrices


def test_metrics_are_what_counting_gives() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1, 0, 2])  # 2: unparsed
    found = metrics(labels, predicted, 2, positive=1)
    assert found["accuracy"] == 5 / 8
    assert found["precision"] == 3 / 4
    assert found["recall"] == 3 / 5
    assert found["f1"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert found["unparsed"] == 1 / 8
    assert confusion(labels, predicted, 2) == [[2, 1, 0], [1, 3, 1]]


@pytest.mark.parametrize("seed", range(20))
def test_figures_of_bootstrap_samples_agree_with_scikit_learn(seed: int) -> None:
    draws = np.random.default_rng(seed)
    labels, predicted = draws.integers(0, 3, 30), draws.integers(0, 4 if seed % 2 else 2, 30)
    ours = {
        name: values[0]
        for name, values in metrics_of_matrices(np.array([confusion(labels, predicted, 3)], dtype=float), 1).items()
    }
    assert ours == pytest.approx(metrics(labels, predicted, 3, positive=1))
    theirs = sklearn_metrics.precision_recall_fscore_support(labels, predicted, labels=[0, 1, 2], zero_division=0)
    assert (ours["precision"], ours["recall"], ours["f1"]) == pytest.approx(
        tuple(float(column[1]) for column in theirs[:3])
    )
    assert ours["macro_f1"] == pytest.approx(float(theirs[2].mean()))


def test_the_difference_is_taken_over_pairs() -> None:
    labels = np.arange(200) % 2
    base = np.where(np.arange(200) % 5 == 0, 1 - labels, labels)
    better = base.copy()
    better[:50] = labels[:50]  # ten more are right, none is lost
    found = compare(labels, {"base": base, "adapter": better}, 2, 1, seed=0)["accuracy"]
    assert [side.value for side in found] == pytest.approx([0.8, 0.85, 0.05])
    assert found[2].low > 0
    assert found[0].high > found[1].low  # the sides' own intervals overlap


def test_a_share_of_all_or_nothing_has_a_width_and_a_share_of_no_items_none() -> None:
    labels = np.arange(224) % 2
    nothing, all_right = np.full(224, 2), labels.copy()  # no label word at all, and each class right
    found = compare(labels, {"base": nothing, "adapter": all_right}, 2, 1, seed=0)
    base, adapter, difference = found["accuracy"]
    assert (base.value, base.low) == (0, 0) and 0.01 < base.high < 0.02, "0 of 224"
    assert (adapter.value, adapter.high) == (1, 1) and adapter.low < 0.99
    assert difference.value == 1 and 0.9 < difference.low < 0.99
    assert found["recall"][1].low == pytest.approx(wilson_of_all(112))
    assert found["precision"][1].low == pytest.approx(wilson_of_all(112))
    assert np.isnan([found["precision"][0].low, found["precision"][2].low]).all(), "the base predicts it for no item"
    assert item_counts(labels, nothing, 1) == {"accuracy": 224, "precision": 0, "recall": 112, "unparsed": 224}


def wilson_of_all(count: int) -> float:
    return 1 / (1 + 1.959963984540054**2 / count)
