"""Figures of a classifier whose answer may also be unparsable, with intervals, for base and adapter on the same items.

Values are scikit-learn's. Accuracy, precision, recall and the unparsed are shares and have Wilson's intervals. F1 is
not, and has the bootstrap's, with the same samples for both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distft.evaluation.metrics import figure_of
from distft.evaluation.target import SideName
from distft.stats import RESAMPLES, Estimate, Floats, correlation, metrics_of_matrices

Classes = NDArray[np.int64]
"""Class numbers, [items]; in predictions, the number of classes marks an answer that could not be parsed."""

_TITLES = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "macro_f1": "macro F1",
    "unparsed": "answers without a label word",
}


def figures(
    labels: Classes, predicted: Mapping[SideName, Classes], classes: int, positive: int | None, seed: int, how: str = ""
) -> dict[str, dict[str, Any]]:
    """Every metric as a figure; `how` ends the titles. Without a class `positive`, those of a single class are left
    out."""
    if positive is None:
        found = figures(labels, predicted, classes, 0, seed, how)
        return {name: figure for name, figure in found.items() if name not in ("precision", "recall", "f1")}
    counts = [item_counts(labels, values, positive) for values in predicted.values()]
    return {
        name: figure_of(
            *estimates,
            title=_TITLES[name] + how,
            better="lower" if name == "unparsed" else "higher",
            # The sides predict the class `positive` for different numbers of items: the smaller number counts.
            count=min(side.get(name, len(labels)) for side in counts),
        )
        for name, estimates in compare(labels, predicted, classes, positive, seed).items()
    }


def confusion(labels: Classes, predicted: Classes, classes: int) -> list[list[int]]:
    """Counts as [class][predicted class], with the unparsed in the last column."""
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(labels, predicted, labels=range(classes + 1))[:classes]
    return [[int(count) for count in row] for row in matrix]


def metrics(labels: Classes, predicted: Classes, classes: int, positive: int) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of the class `positive`, macro F1, and the share of unparsed answers.

    A rate with a zero denominator is 0.
    """
    from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, labels=[positive], average="macro", zero_division=0
    )
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "macro_f1": float(f1_score(labels, predicted, labels=range(classes), average="macro", zero_division=0)),
        "unparsed": float((predicted == classes).mean()),
    }


def item_counts(labels: Classes, predicted: Classes, positive: int) -> dict[str, int]:
    """The denominator of each metric that is a share."""
    return {
        "accuracy": len(labels),
        "precision": int((predicted == positive).sum()),
        "recall": int((labels == positive).sum()),
        "unparsed": len(labels),
    }


def compare(
    labels: Classes, predicted: Mapping[SideName, Classes], classes: int, positive: int, seed: int
) -> dict[str, list[Estimate | None]]:
    """Every metric of base, adapter (None if there is none) and their difference.

    Shares have Wilson's intervals, and their difference Newcombe's with the correlation of the sides over bootstrap
    samples. F1 has the bootstrap's. A bootstrap sample draws how often each combination of class and predictions
    occurs (multinomial), which makes ten thousand samples cheap.
    """
    sides = list(predicted)
    combinations, counts = np.unique(
        np.stack([labels, *(predicted[side] for side in sides)]), axis=1, return_counts=True
    )
    drawn = np.random.default_rng(seed).multinomial(len(labels), counts / len(labels), size=RESAMPLES)
    resampled: dict[SideName, dict[str, Floats]] = {}
    for number, side in enumerate(sides, 1):
        matrices = np.zeros((RESAMPLES, classes, classes + 1))
        for column, (label, guess) in enumerate(zip(combinations[0], combinations[number], strict=True)):
            matrices[:, label, guess] += drawn[:, column]
        resampled[side] = metrics_of_matrices(matrices, positive)
    values = {side: metrics(labels, predicted[side], classes, positive) for side in sides}
    items = {side: item_counts(labels, predicted[side], positive) for side in sides}
    found: dict[str, list[Estimate | None]] = {}
    for name in values[sides[0]]:
        is_share = name in items[sides[0]]
        own = [
            Estimate.proportion(values[side][name], items[side][name])
            if is_share
            else Estimate.bootstrap(values[side][name], resampled[side][name])
            for side in sides
        ]
        if len(sides) < 2:
            found[name] = [*own, None, None]
            continue
        one, other = (resampled[side][name] for side in sides)
        if is_share:
            difference = Estimate.share_difference(own[0], own[1], correlation(one, other))
        else:
            difference = Estimate.bootstrap(own[1].value - own[0].value, other - one)
        found[name] = [*own, difference]
    return found
