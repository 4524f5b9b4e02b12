"""What is reported as a difference, what as inconclusive, and when there is no verdict at all."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from distft.cli.main import main
from distft.reports.markdown import markdown
from distft.reports.report import Report, report
from distft.runs.folder import RunFolder
from distft.stats import Estimate

from .conftest import equal, make, row, verdicts


def runs(parent: Path, name: str, r: int, *speeds: float | None, **figures: Any) -> list[RunFolder]:
    """A variant with one run for each of `speeds`."""
    return [
        make(parent, f"{name}-r{n}", f"lora.r={r}", samples_per_second=speed, **figures)
        for n, speed in enumerate(speeds, 1)
    ]


def test_a_difference_within_the_spread_is_not_reported_as_one(tmp_path: Path) -> None:
    folders = [
        *runs(tmp_path, "base", 1, 40, 40.4, 39.6),
        *runs(tmp_path, "near", 2, 40.2, 40.5, 40.1),
        *runs(tmp_path, "wide", 6, 39, 41, 42),
        *runs(tmp_path, "fast", 3, 52, 51.5, 51.8),
        *runs(tmp_path, "slow", 5, 20, 20.1, 20.2),
        *runs(tmp_path, "once", 4, 80),
    ]
    made = report(folders)
    assert verdicts(made, "samples_per_second") == {
        "near-r1": "no difference",
        "wide-r1": "inconclusive",
        "fast-r1": "different",
        "slow-r1": "different",
        "once-r1": "no spread",
    }
    assert set(verdicts(made, "train_loss").values()) == {"equal"}
    found = {item.variant: item for item in made.comparisons if item.figure == "samples_per_second"}
    near, wide, fast, slow = (found[f"{name}-r1"] for name in ("near", "wide", "fast", "slow"))
    assert near.low and near.high and 1 / 1.05 < near.low < 1 < near.high < 1.05
    assert wide.low and wide.high and wide.low < 1 and wide.high > 1.05
    assert fast.low and fast.high and fast.ratio and 1 < fast.low < fast.ratio < fast.high
    text = markdown(made)
    shown = {
        name: row(text, "Compared with `base-r1`", f"{name}-r1")["samples/s"]
        for name in ("near", "wide", "fast", "once")
    }
    assert shown == {
        "near": f"no difference ({near.low:.3f}–{near.high:.3f})",
        "wide": f"inconclusive ({wide.low:.3f}–{wide.high:.3f})",
        "fast": f"{fast.ratio:.3f}× ({fast.low:.3f}–{fast.high:.3f})",
        "once": "(2.000×)",
    }
    assert "(1.23×): no interval. Either a side has a single run" in text
    assert "jointly for the 4 variants in a column (Bonferroni)" in text
    for sentence in (
        f"No difference in speed between near-r1 and base-r1 (95% CI {near.low:.2f}–{near.high:.2f}, within ±5%). ",
        "Inconclusive: 3 repeats cannot separate wide-r1 from base-r1 "
        f"(1.02× as fast, 95% CI {wide.low:.2f}–{wide.high:.2f}). "
        f"Detecting a difference of 5% takes about {wide.repeats} runs of each. ",
        f"fast-r1 is 1.29× as fast as base-r1 (95% CI {fast.low:.2f}–{fast.high:.2f}). ",
        f"slow-r1 is 0.50× as fast as base-r1 (95% CI {slow.low:.2f}–{slow.high:.2f}). ",
        "Inconclusive: one run of once-r1 cannot separate once-r1 from base-r1 (2.00× as fast here).",
    ):
        assert sentence in made.verdict
    record = json.loads(made.to_json())
    assert f"**{record['verdict']}**" in text.splitlines()
    assert record["comparisons"][0].keys() >= {"ratio", "low", "high", "verdict"} and record["confidence"] == 0.95


def test_what_the_repeats_cannot_tell_is_inconclusive(tmp_path: Path) -> None:
    verdict = report([*runs(tmp_path, "a", 1, 96.6, 84.7), *runs(tmp_path, "b", 2, 70.0, 58.0)]).verdict
    words = (
        r"Inconclusive: 2 repeats cannot separate b-r1 from a-r1 \(0\.70× as fast, 95% CI 0\.\d+–1\.\d+\)\. "
        r"Detecting a difference of 5% takes about 88 runs of each\."
    )
    assert re.fullmatch(words, verdict), verdict


def test_an_unknown_or_zero_figure_breaks_no_comparison(tmp_path: Path) -> None:
    made = report(
        [
            *runs(tmp_path, "a", 1, 40, float("nan"), None, energy_j=0.0),
            *runs(tmp_path, "b", 2, 44, 44.2, 44.1, energy_j=5.0),
            *runs(tmp_path, "c", 3, None, None, energy_j=0.0),
        ]
    )
    assert verdicts(made, "samples_per_second") == {"b-r1": "no spread"}
    assert verdicts(made, "energy_j") == {"b-r1": "different", "c-r1": "equal"}
    (energy,) = [item for item in made.comparisons if (item.variant, item.figure) == ("b-r1", "energy_j")]
    assert (energy.ratio, energy.low, energy.high) == (None, None, None)
    assert row(markdown(made), "Compared with `a-r1`", "b-r1")["energy"] == "different"


def test_losses_that_differ_only_by_rounding_are_equal(tmp_path: Path) -> None:
    made = report([make(tmp_path, "a"), make(tmp_path, "b", "lora.r=4", train_loss=2.50001, peak_memory_gib=8.01)])
    assert verdicts(made, "train_loss") == {"b": "equal"}
    assert verdicts(made, "peak_memory_gib") == {"b": "no spread"}


def test_losses_have_no_interval_because_repeats_share_the_seed(tmp_path: Path) -> None:
    """Two runs that agree to the bit would give an interval of zero width, and any other loss would lie outside it."""
    folders = [
        make(tmp_path, f"{name}{turn}", f"lora.r={r}", train_loss=loss, samples_per_second=40.0 + turn)
        for name, r, loss in (("a", 1, 2.50), ("b", 2, 2.51))
        for turn in (1, 2)
    ]
    made = report(folders)
    assert verdicts(made, "train_loss") == {"b1": "no spread"} and verdicts(made, "eval_loss_after") == {"b1": "equal"}
    text = markdown(made)
    assert row(text, "Compared with `a1`", "b1")["mean train loss"] == "(1.004×)"
    assert "a loss, which the shared seed makes the same in all repeats" in text


def test_no_verdict_on_speed_if_losses_declared_equal_diverge(tmp_path: Path) -> None:
    folders = [*runs(tmp_path, "a", 1, 40, 40.1, 40.2), *runs(tmp_path, "b", 2, 80, 80.1, 80.2, train_loss=2.55)]
    undeclared = report(folders)  # does not require losses to be equal
    assert verdicts(undeclared, "samples_per_second") == {"b-r1": "different"}
    made = report(folders, equal=["samples", "loss"])
    assert {verdicts(made, figure)["b-r1"] for figure in ("samples_per_second", "train_time_s")} == {"withheld"}
    assert verdicts(made, "peak_memory_gib") == {"b-r1": "equal"}
    words = (
        "No verdict on the speed of b-r1 compared with a-r1: the losses were declared equal but differ by more than "
        "1.00% (mean train loss 2.5500 vs 2.5000, 2.00% apart)"
    )
    assert made.verdict == f"{words}."
    text = markdown(made)
    assert f"**{words}.**" in text and "as fast" not in text
    assert row(text, "Compared with `a-r1`", "b-r1")["samples/s"] == "withheld"
    assert row(text, "What was equal", "loss") == {"what": "loss", "declared": "yes", "equal": "no"}
    assert all(item.ratio is None for item in made.comparisons if item.verdict == "withheld")
    wider = report(folders, equal=["samples", "loss"], loss_tolerance=0.03)
    assert verdicts(wider, "samples_per_second") == {"b-r1": "different"} and equal(wider)["loss"]
    assert "within 3.00% of the first" in markdown(wider)


def test_an_experiment_sets_the_tolerance_of_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipes" / "experiments" / "mine.yaml"
    path.parent.mkdir(parents=True)
    text = "base: tiny\nvariants: {a: {lora.r: 1}, b: {lora.r: 2}}\nrepeats: 2\nequal: [samples, loss]\n"
    for turn in ("", "-r2"):
        make(tmp_path / "runs", f"mine-a{turn}", "lora.r=1")
        make(tmp_path / "runs", f"mine-b{turn}", "lora.r=2", train_loss=2.55)
    answers = {}
    for tolerance in ("", "loss_tolerance: 0.03\n", "loss_tolerance: 0\n"):
        path.write_text(text + tolerance)
        code = main(["report", "experiment=mine", "--json"])
        shown = capsys.readouterr()
        answers[tolerance] = json.loads(shown.out)["verdict"] if code == 0 else shown.err
    assert answers[""].startswith("No verdict on the speed of b compared with a: ")
    assert answers["loss_tolerance: 0.03\n"].startswith("b is as fast as a")
    assert "loss_tolerance: expected" in answers["loss_tolerance: 0\n"]


@pytest.mark.parametrize("loss", [float("nan"), None])
def test_a_loss_that_one_variant_lacks_is_not_equal(loss: float | None, tmp_path: Path) -> None:
    made = report([make(tmp_path, "a"), make(tmp_path, "b", "lora.r=4", train_loss=loss)], equal=["loss"])
    assert verdicts(made, "samples_per_second") == {"b": "withheld"}
    assert "only one of them has a mean train loss" in made.verdict


def duel(parent: Path, one: float | None, two: float | None, count: int = 2000) -> Report:
    """Two models with different tokenizers, three runs each, with these accuracies over `count` reviews."""
    folders = []
    for name, speed, tokens, loss, accuracy in (("a", 40, 8000, 2.5, one), ("b", 50, 7000, 1.5, two)):
        figure = {"title": "accuracy", "count": count, "form": ".3f", "base": None, "difference": None, "verdict": None}
        figure["adapter"] = dataclasses.asdict(Estimate.proportion(accuracy, count)) if accuracy else None
        folders += [
            make(
                parent,
                f"{name}{turn}",
                f"model.name={name}",
                samples_per_second=speed + turn / 10,
                tokens=tokens,
                train_loss=loss,
                evaluation={"imdb": {"figures": {"accuracy": figure}}},
            )
            for turn in (1, 2, 3)
        ]
    return report(folders, equal=["samples"])


def test_models_with_different_tokenizers_are_compared_by_time_and_task(tmp_path: Path) -> None:
    """As the experiment `duel` declares: only the samples are equal."""
    made = duel(tmp_path / "known", 0.90, 0.95)
    assert verdicts(made, "samples_per_second") == {"b1": "different"} == verdicts(made, "imdb_accuracy")
    for figure in ("train_loss", "eval_loss_after", "perplexity_after", "tokens_per_second"):
        assert verdicts(made, figure) == {"b1": "not compared"}
    # Wilson's intervals of 0.90 and 0.95 of 2,000, and Newcombe's of their difference, by hand: 0.0338 to 0.0664.
    accuracy = "IMDB accuracy 0.900 → 0.950 (95% CI of the difference +0.034 to +0.066, over the items): different"
    assert made.verdict == (
        "b1 is 1.25× as fast as a1 (95% CI 1.24–1.26). The tokenizers differ, so losses are not compared. "
        f"On the task: {accuracy}."
    )
    text = markdown(made)
    assert row(text, "Compared with `a1`", "b1")["IMDB accuracy"] == "1.056×"
    assert f"- `b1`: {accuracy}." in text
    assert "mean train loss is not compared: it is measured per token, and the tokenizers differ" in text


def test_repeats_that_agree_say_nothing_about_other_items(tmp_path: Path) -> None:
    made = duel(tmp_path, 13 / 24, 16 / 24, count=24)
    assert verdicts(made, "imdb_accuracy") == {"b1": "inconclusive"}


def test_the_answer_says_when_no_run_measured_the_task(tmp_path: Path) -> None:
    assert duel(tmp_path, None, None).verdict.endswith(
        "). The tokenizers differ, so losses are not compared. No run measured how well they solve the task."
    )
