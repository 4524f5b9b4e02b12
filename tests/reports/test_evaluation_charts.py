"""Charts of evaluations."""

from __future__ import annotations

from distft.evaluation.metrics import figure_of
from distft.reports.evaluation_charts import evaluation_charts
from distft.stats import Estimate


def test_a_chart_shows_the_categories_with_a_score() -> None:
    def side(value: float | None) -> dict[str, float | None]:
        return {"value": value, "low": value, "high": value}

    score = figure_of(Estimate(4, 3, 5), Estimate(6, 5, 7), Estimate(2, 1, 3), title="score", form=".2f")
    categories = {
        "math": {"count": 2, "base": side(3.0), "adapter": side(5.0)},
        "stem": {"count": 1, "base": side(None), "adapter": side(8.0)},
        "coding": {"count": 1, "base": side(None), "adapter": side(None)},
    }
    charts = evaluation_charts({"run": {"mt_bench": {"figures": {"score": score}, "categories": categories}}})
    whole, parts = charts
    assert whole.key == "evaluation_mt_bench" and parts.key == "evaluation_mt_bench_by_category"
    assert parts.table.heads == ["figure", "base", "adapter"]
    assert [row[0] for row in parts.table.texts] == ["math", "stem"], "coding has no scores"
    (math, stem) = parts.table.texts
    assert "3.00" in math[1] and "5.00" in math[2] and "8.00" in stem[2]
