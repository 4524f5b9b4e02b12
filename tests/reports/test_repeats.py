"""Repeats with seeds of their own, and the steps and the time to reach a loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from distft.reports.markdown import markdown
from distft.reports.report import Report, report_on_runs
from distft.reports.results import read_run
from distft.runs.folder import RunFolder

from .conftest import make, row, verdicts

SHUFFLED = [(2, 4.0, 3.0), (4, 8.0, 2.5), (6, 12.0, 2.2)]
FAST = [(2, 4.1, 2.4), (4, 8.1, 2.3), (6, 12.1, 2.0)]


def run(
    parent: Path, name: str, seed: int, curve: list[tuple[int, float | None, float | None]], *words: str, **facts: Any
) -> RunFolder:
    """A run with the evaluations `curve`: step, seconds, and loss. Its splits follow from the seed."""
    own = {"data_digest": f"data of {seed}", "held_out_digest": f"held out of {seed}", "weights_digest": "w"}
    folder = make(parent, f"{name}-{seed}", f"run.seed={seed}", *words, **(own | facts))
    folder.append_metrics(
        *(
            {"step": step, "eval_loss": loss} | ({} if seconds is None else {"time_s": seconds})
            for step, seconds, loss in curve
        )
    )
    return folder


def reported(folders: list[RunFolder], **options: Any) -> Report:
    return report_on_runs([read_run(folder) for folder in folders], equal=["global_batch", "base_weights"], **options)


def two_variants(tmp_path: Path, *, seeds: int = 3) -> list[RunFolder]:
    found = []
    for seed in range(1, seeds + 1):
        shift = seed / 10
        later = [(step, seconds + shift, loss) for step, seconds, loss in SHUFFLED]
        found.append(run(tmp_path, "shuffled", seed, later, train_loss=2.5 + shift / 10))
        later = [(step, seconds + shift, loss) for step, seconds, loss in FAST]
        found.append(run(tmp_path, "length", seed, later, "data.order=length", train_loss=3.5 + shift / 10))
    return found


def test_runs_with_different_seeds_are_repeats_whose_losses_have_a_spread(tmp_path: Path) -> None:
    folders = two_variants(tmp_path)
    made = reported(folders, seeds=True)
    assert [len(variant.runs) for variant in made.variants] == [3, 3]
    assert verdicts(made, "train_loss") == {"length-1": "different"}
    assert verdicts(made, "samples_per_second") == {"length-1": "equal"}, "speeds are compared"
    assert "data.order" in made.differences and "run.seed" not in made.differences
    assert "Repeats have seeds of their own" in markdown(made)
    alone = reported(folders)
    assert [len(variant.runs) for variant in alone.variants] == [1] * 6


def test_other_data_under_the_same_seed_is_another_variant(tmp_path: Path) -> None:
    folders = two_variants(tmp_path, seeds=2)
    folders.append(run(tmp_path / "more", "shuffled", 3, SHUFFLED))
    folders.append(run(tmp_path / "more", "length", 3, FAST, "data.order=length", data_digest="changed"))
    made = reported(folders, seeds=True)
    assert len(made.variants) > 2


def test_the_target_is_the_worst_last_loss_and_every_run_reaches_it(tmp_path: Path) -> None:
    made = reported(two_variants(tmp_path), seeds=True, target_loss="worst")
    assert made.target_loss == 2.2
    found = {run.name: (run.figures["steps_to_loss"], run.figures["time_to_loss_s"]) for run in made.runs}
    assert found["shuffled-1"] == (6, 12.1)
    assert found["length-3"] == (6, pytest.approx(12.4))
    text = markdown(made)
    assert row(text, "Variants", "shuffled-1")["time to loss, s"] == "12.2 (12.1–12.3)"
    assert "to the first evaluation with a loss of at most 2.2000 nats" in text


def test_a_declared_target_is_reached_at_its_first_evaluation_or_never(tmp_path: Path) -> None:
    folders = two_variants(tmp_path)
    made = reported(folders, seeds=True, target_loss=2.4)
    found = {run.name: run.figures["steps_to_loss"] for run in made.runs}
    assert (found["shuffled-1"], found["length-1"]) == (6, 2)
    assert verdicts(made, "time_to_loss_s") == {"length-1": "different"}
    never = reported(folders, seeds=True, target_loss=2.1)
    assert {run.figures["time_to_loss_s"] for run in never.runs if "shuffled" in run.name} == {math.inf}
    assert row(markdown(never), "Variants", "shuffled-1")["time to loss, s"] == "infinite"
    assert verdicts(never, "time_to_loss_s") == {"length-1": "not compared"}


def test_what_is_not_known_is_no_number(tmp_path: Path) -> None:
    """Runs without evaluations, of older versions, that diverged, and that have not ended."""
    folders = [
        run(tmp_path, "none", 1, []),
        run(tmp_path, "old", 1, [(2, None, 2.0)]),
        run(tmp_path, "nan", 1, [(2, 1.0, 3.0), (4, 2.0, None)]),
        run(tmp_path, "early", 1, [(2, 1.0, 3.0)], status="failed", cause="x"),
    ]
    made = reported(folders, target_loss=2.5)
    found = {run.name: (run.figures["steps_to_loss"], run.figures["time_to_loss_s"]) for run in made.runs}
    assert found == {
        "none-1": (None, None),
        "old-1": (2, None),
        "nan-1": (math.inf, math.inf),
        "early-1": (None, None),
    }
    assert reported(folders, target_loss="worst").target_loss == 2.0
    plain = reported(folders)
    assert plain.target_loss is None
    assert "to loss" not in markdown(plain)
