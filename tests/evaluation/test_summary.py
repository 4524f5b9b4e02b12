"""What reports and the console make of the results of tasks."""

from __future__ import annotations

from typing import Any

from distft.evaluation.metrics import figure_of
from distft.evaluation.summary import figure_lines, figures, headline
from distft.stats import Estimate


def accuracy(low: float, high: float, **changes: Any) -> dict[str, Any]:
    difference = Estimate((low + high) / 2, low, high)
    return figure_of(Estimate(0.5, 0.4, 0.6), Estimate(0.6, 0.5, 0.7), difference, title="accuracy", count=40) | changes


def test_an_interval_that_contains_0_is_inconclusive_also_in_older_results() -> None:
    for figure in (accuracy(-0.1, 0.3), accuracy(-0.1, 0.3, verdict="no difference")):
        result = {"figures": {"accuracy": figure}}
        ((_, _, shown),) = figures({"imdb": result})
        assert shown["verdict"] == "inconclusive"
        assert headline({"imdb": result}) == "No change could be shown: inconclusive for imdb accuracy."
        (line,) = figure_lines("imdb", result)
        assert line == (
            "imdb: accuracy: base 0.500 [0.400, 0.600], adapter 0.600 [0.500, 0.700], "
            "difference 0.100 [-0.100, 0.300] (inconclusive)"
        )


def test_sides_that_agree_on_every_item_have_no_difference() -> None:
    assert accuracy(0.0, 0.0)["verdict"] == "no difference"
    assert headline({"imdb": {"figures": {"accuracy": accuracy(0.0, 0.0)}}}) == (
        "No change could be shown: no difference for imdb accuracy."
    )


def test_the_headline_names_changes_first_and_a_new_task_needs_no_entry_for_it() -> None:
    results = {
        "imdb": {"figures": {"accuracy": accuracy(-0.1, 0.3), "f1": accuracy(0.1, 0.2)}},
        "new_task": {"figures": {"score": accuracy(0.1, 0.2), "part": accuracy(0.1, 0.2) | {"detail": True}}},
    }
    assert headline(results) == ("The fine-tune changed accuracy 0.500 → 0.600 (gain). Inconclusive for imdb accuracy.")
