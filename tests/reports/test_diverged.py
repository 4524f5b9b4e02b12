"""Losses that are not finite are shown as such: an older value never passes for the last one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from distft.api.run import Metrics
from distft.experiments.expand import load_experiment
from distft.experiments.progress import Progress
from distft.reports.history import History
from distft.reports.html import page
from distft.reports.markdown import markdown
from distft.reports.report import report

from .conftest import make, row
from .conftest import report as report_command

NAN = math.nan
DIVERGED = [
    {"step": 10, "loss": 2.2, "grad_norm": 1.0},
    {"step": 10, "eval_loss": 2.1},
    {"step": 20, "loss": 1.9, "grad_norm": NAN},  # part of the window was still finite
    {"step": 30, "loss": 0.0, "grad_norm": NAN},
    {"step": 30, "eval_loss": NAN},
    {"step": 40, "loss": 0.0, "grad_norm": NAN},
    {"step": 40, "eval_loss": NAN},
    {"step": 40, "train_loss": 1.025, "train_runtime": 3.0},
]
"""What transformers logs of a training that diverges: its filter writes 0.0 for a loss that is NaN."""


def log(folder: Path, records: list[dict[str, Any]], name: str = "mine.json") -> Path:
    (folder / name).write_text(json.dumps(records), encoding="utf-8")
    return folder / name


def test_a_log_that_diverged_says_so_everywhere(tmp_path: Path) -> None:
    made = log(tmp_path, DIVERGED)
    text = markdown(None, [History.of_log(made)], "log")
    shown = row(text, "Logs", "mine")
    assert (shown["last train loss"], shown["mean train loss"], shown["last eval loss"]) == ("NaN", "NaN", "NaN")
    assert (shown["best eval loss"], shown["last perplexity"]) == ("2.1000", "NaN")
    losses = "loss is not finite from step 20 on, eval_loss is not finite from step 30 on"
    assert f"- Warning: mine diverged from step 20: {losses}." in text
    html = page("log", [History.of_log(made)])
    assert "mine diverged from step 20" in html and "mine from 2.2 to NaN" in html and "mine from 2.1 to NaN" in html
    report_command(tmp_path, "mine.json", "--output", "page.html")
    (record,) = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))["logs"]
    assert record["diverged_from_step"] == 20 and record["not_finite"] == {"loss": 20, "eval_loss": 30}
    assert record["figures"]["last_train_loss"] == record["figures"]["last_eval_loss"] == "NaN"


@pytest.mark.parametrize(
    ("records", "diverged", "last"),
    [
        ([{"step": 1, "loss": 2.0}, {"step": 2, "loss": NAN}, {"step": 3, "loss": 1.5}], None, 1.5),  # recovered
        ([{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.inf}], 2, math.inf),
        ([{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}], 2, NAN),  # strict JSON
        ([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "grad_norm": math.inf}], None, 1.5),  # fp16's scaler
        ([{"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 2, "loss": 0.0, "grad_norm": 0.1}], None, 0.0),
        ([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.0}, {"step": 2, "eval_loss": NAN}], 2, NAN),  # no norms
        ([{"step": 1, "loss": 2.0}, {"step": 1, "eval_a_loss": NAN}, {"step": 2, "loss": 1.5}], None, 1.5),
        ([{"step": 1, "eval_loss": 2.0}, {"step": 2, "eval_loss": NAN}], 2, None),  # only evaluations
    ],
)
def test_when_a_log_counts_as_diverged(
    records: list[dict[str, Any]], diverged: int | None, last: float | None, tmp_path: Path
) -> None:
    history = History.of_log(log(tmp_path, records))
    assert history.diverged == diverged
    assert history.final.get("last_train_loss") == pytest.approx(last, nan_ok=True)


def test_a_perplexity_that_overflows_is_the_last_one(tmp_path: Path) -> None:
    made = log(tmp_path, [{"step": 1, "eval_loss": 1.0}, {"step": 2, "eval_loss": 800.0}])
    assert row(markdown(None, [History.of_log(made)], "log"), "Logs", "mine")["last perplexity"] == "infinite"


def test_every_evaluation_set_is_in_table_and_json(tmp_path: Path) -> None:
    records = [
        {"step": 1, "loss": 2.0},
        {"step": 1, "eval_alpaca_loss": 3.0, "eval_alpaca_runtime": 1.0},
        {"step": 1, "eval_math_loss": 4.0},
        {"step": 2, "eval_alpaca_loss": 3.5, "eval_math_accuracy": 0.25},
        {"step": 2, "eval_math_loss": 3.75},
    ]
    made = log(tmp_path, records)
    shown = row(markdown(None, [History.of_log(made)], "log"), "Logs", "mine")
    assert (
        shown
        | {
            "best eval alpaca loss": "3.0000",
            "last eval alpaca loss": "3.5000",
            "best eval math loss": "3.7500",
            "last eval math loss": "3.7500",
            "last eval math accuracy": "0.2500",
        }
        == shown
    )
    assert not any("runtime" in head for head in shown)
    report_command(tmp_path, "mine.json", "--output", "page.html")
    (record,) = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))["logs"]
    assert record["figures"]["last_eval_alpaca_loss"] == 3.5 and record["figures"]["best_eval_math_loss"] == 3.75
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="chart-eval_alpaca_loss"' in html and 'id="chart-eval_math_loss"' in html


def test_a_byte_order_mark_before_json_is_read(tmp_path: Path) -> None:
    made = tmp_path / "trainer_state.json"
    made.write_text(json.dumps({"log_history": [{"step": 4, "loss": 1.0}]}), encoding="utf-8-sig")
    assert History.of_log(made).final == {"steps": 4, "last_train_loss": 1.0}
    folder = make(tmp_path, "a")
    for file in (folder.metrics, folder.summary, folder.recipe, folder.environment):
        file.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    (run,) = report([folder]).runs
    assert (run.figures["final_loss"], run.figures["steps"], run.facts["machine.cpus"]) == (2.25, 10, 2)


def test_a_run_whose_last_loss_is_nan_shows_nan_and_is_not_averaged_away(tmp_path: Path) -> None:
    good, bad = (make(tmp_path, name) for name in ("a", "a-2"))
    bad.append_metrics({"step": 11, "loss": NAN, "samples": 170, "tokens": 8100})
    bad.write_summary({**bad.read_summary(), "eval_after": {"loss": NAN, "perplexity": NAN}})
    made = report([good, bad])
    text = markdown(made)
    assert (
        row(text, "Runs", "a-2")["last train loss"] == "NaN" and row(text, "Runs", "a")["last train loss"] == "2.2500"
    )
    assert row(text, "Variants", "a")["perplexity after"] == "NaN"  # not the median of the finite ones
    figures = {run["name"]: run["figures"] for run in json.loads(made.to_json())["runs"]}
    assert figures["a-2"]["final_loss"] == figures["a-2"]["eval_loss_after"] == "NaN"
    assert made.verdict.startswith("Held-out perplexity 54.60 before training and NaN after")
    assert math.isnan(History.of_run(bad, "a").points("step", "loss")[-1][1])
    assert math.isnan(Metrics(bad.read_metrics())["loss"][-1])
    (run, *_) = load_experiment(["experiment=tiny"]).runs
    assert Progress.of(run, bad).cells()[3] == "NaN"


def test_losses_that_are_nan_are_neither_equal_nor_compared(tmp_path: Path) -> None:
    good = make(tmp_path, "a", "lora.r=4")
    bad = make(tmp_path, "b", "lora.r=8", eval_after={"loss": NAN, "perplexity": NAN})
    made = report([good, bad], equal=["loss"])
    assert {each.what: each.equal for each in made.equality}["loss"] is False
    verdicts = {item.figure: (item.verdict, item.why) for item in made.comparisons}
    assert verdicts["eval_loss_after"] == ("not compared", "it is NaN or infinite in a run")
    assert verdicts["samples_per_second"][0] == "withheld" and "NaN vs 2.0000" in verdicts["samples_per_second"][1]
