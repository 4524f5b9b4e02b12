"""Runs over pairs of answers in a report: the curves of their rewards, and the reward accuracy with its interval."""

from __future__ import annotations

from pathlib import Path

import pytest

from distft.reports.charts import charts
from distft.reports.comparison import Comparer
from distft.reports.history import History
from distft.reports.report import report_on_runs
from distft.reports.results import Run, read_run
from distft.reports.sections import document
from distft.runs.folder import RunFolder
from distft.stats import Estimate

from .conftest import make

CURVES = {"reward_margin", "reward_accuracy", "eval_reward_margin", "eval_reward_accuracy", "kl"}


def of_pairs(parent: Path, name: str, accuracy: float, pairs: int = 60) -> Run:
    measured = {"loss": 0.6, "rewards/accuracies": accuracy, "rewards/margins": 0.2, "kl_per_token": 0.01}
    folder = make(
        parent, name, eval_before={**measured, "rewards/accuracies": 0.0}, eval_after=measured | {"pairs": pairs}
    )
    for step in (5, 10):
        logged = {key: value + step for key, value in measured.items() if key != "loss"}
        folder.append_metrics({"step": step, "loss": 0.7 - step / 100, **logged})
        folder.append_metrics({"step": step, **{f"eval_{key}": value for key, value in measured.items()}})
    return read_run(folder)


def test_rewards_and_kl_have_curves(tmp_path: Path) -> None:
    of_pairs(tmp_path, "dpo", 0.75)
    history = History("dpo", "dpo", [{"step": 1, "loss": 1.0}])
    assert not CURVES & {chart.key for chart in charts([history])}, "texts have none"
    history = History("dpo", "dpo", RunFolder(tmp_path / "dpo").read_metrics())
    found = {chart.key: chart for chart in charts([history])}
    assert found.keys() >= CURVES
    assert found["reward_margin"].table.rows == (("dpo", 5.0, 5.2), ("dpo", 10.0, 10.2))
    assert "nats" not in found["loss_step"].description + found["eval_loss"].description


def test_reward_accuracy_has_the_interval_of_its_pairs(tmp_path: Path) -> None:
    """Wilson's interval, which a comparison judges by: 0.75 of 60 pairs is no news beside 0.65, and is beside 0.2."""
    runs = [of_pairs(tmp_path, name, share) for name, share in (("a", 0.75), ("b", 0.65), ("c", 0.2))]
    interval = Estimate.proportion(0.75, 60)
    assert runs[0].reward_accuracy == interval and 0.62 < interval.low < 0.75 < interval.high < 0.85
    compared = Comparer({run.name: [run] for run in runs}, (), 0.01)
    verdicts = {
        name: next(each.verdict for each in compared.compare("a", name) if each.figure == "reward_accuracy")
        for name in ("b", "c")
    }
    assert verdicts == {"b": "inconclusive", "c": "different"}


@pytest.mark.parametrize("pairs", [60, 0])
def test_the_table_of_runs_shows_it(tmp_path: Path, pairs: int) -> None:
    """Without the number of pairs, as in runs of before, without an interval."""
    run = of_pairs(tmp_path, "dpo", 0.75, pairs)
    (table,) = [each.table for each in document(report_on_runs([run])).sections if each.key == "runs"]
    assert table is not None
    place = [column.title for column in table.columns].index("held-out reward accuracy")
    expected = Estimate.proportion(0.75, 60)
    interval = f" ({expected.low:.3f}–{expected.high:.3f})" if pairs else ""
    shown = str(table.columns[place].show(table.rows[0][place]))
    assert shown == f"0.750{interval}" and run.pairs == pairs
