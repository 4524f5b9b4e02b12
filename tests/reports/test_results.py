"""Reading a run folder: its figures, how it ended, and what it says when a file is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock

from distft.errors import RunFolderError
from distft.reports.markdown import markdown
from distft.reports.report import report

from .conftest import SUMMARY, equal, make, row


def test_a_run_that_no_process_writes_to_was_killed(tmp_path: Path) -> None:
    folder = make(tmp_path, "a", status="running")
    with FileLock(folder.lock):
        (run,) = report([folder]).runs
        assert (run.status, run.cause) == ("running", None)
    (run,) = report([folder]).runs
    assert run.status == "killed" and "resume from the last checkpoint" in str(run.cause)


def test_the_figures_of_a_run_come_from_its_folder(tmp_path: Path) -> None:
    made = report([make(tmp_path, "a", mfu=0.5, energy_j=1234.5, restarts=2, measured_steps=9)])
    (run,) = made.runs
    assert {key: value for key, value in run.figures.items() if value is not None} == {
        "steps": 10,
        "measured_steps": 9,
        "samples": 160,
        "tokens": 8000,
        "train_loss": 2.5,
        "final_loss": 2.25,
        "eval_loss_before": 4.0,
        "eval_loss_after": 2.0,
        "perplexity_before": 54.6,
        "perplexity_after": 7.39,
        "train_time_s": 4.0,
        "samples_per_second": 40.0,
        "tokens_per_second": 2000.0,
        "mfu": 0.5,
        "peak_memory_gib": 8.0,
        "energy_j": 1234.5,
        "restarts": 2,
    }
    assert {key for key, value in run.figures.items() if value is None} == {
        "imdb_accuracy",
        "reward_accuracy",
        "scoring_time_s",
        "reference_time_s",
        "steps_to_loss",
        "time_to_loss_s",
        "imdb_f1",
        "mt_bench_score",
        "alpaca_win_rate",
        "alpaca_preferred_rate",
        "hfu",
        "joules_per_sample",
        "joules_per_step",
        "energy_idle_share",
        "step_time_s",
        "data_wait_s",
        "evaluation_time_s",
        "saving_time_s",
        "host_rss_gib",
    }
    shown = row(markdown(made), "Runs", "a")
    assert (shown["strategy"], shown["processes"], shown["last train loss"], shown["MFU"]) == (
        "ddp",
        "2",
        "2.2500",
        "0.500",
    )
    assert json.loads(made.to_json())["runs"][0]["figures"] == run.figures
    assert set(equal(made).values()) == {None}
    assert made.comparisons == ()


def test_an_unfinished_run_is_listed_with_its_cause_and_what_is_known(tmp_path: Path) -> None:
    unfinished = dict.fromkeys(SUMMARY) | {"strategy": "ddp", "world_size": 2}
    failed = make(tmp_path, "bad", **{**unfinished, "status": "failed", "cause": "OutOfMemory: 3 | 4 GiB\nless"})
    started = make(tmp_path, "new", "lora.r=1", **{**unfinished, "status": "running"})
    started.metrics.unlink()
    with failed.metrics.open("a") as file:
        file.write('{"step": 11, "lo')  # torn by a kill
    made = report([failed, started, make(tmp_path, "good", "lora.r=2")])
    text = markdown(made)
    assert "3 runs of 3 variants, 1 finished, 1 out of memory." in text
    assert made.verdict == (
        "Nothing to compare: fewer than two variants have a finished run with a measured speed. "
        "bad has no finished run (out of memory). new has no finished run (running)."
    )
    assert "- `bad`: out of memory: 3 | 4 GiB less\n- `new`: running\n" in text
    assert row(text, "Runs", "new")["status"] == "running"
    assert "| out of memory: 3 \\| 4 GiB less |" in text
    outcomes = {run["name"]: (run["outcome"], run["cause"]) for run in json.loads(made.to_json())["runs"]}
    assert outcomes["bad"] == ("out of memory", "OutOfMemory: 3 | 4 GiB\nless")
    assert (outcomes["new"], outcomes["good"]) == (("running", None), ("finished", None))
    assert row(text.replace("\\|", "//"), "Runs", "bad")["samples"] == "160"
    assert row(text, "Runs", "new")["samples"] == "–"
    assert row(text.replace("\\|", "//"), "Runs", "bad")["samples/s"] == "–"
    assert made.comparisons == ()
    assert "as run.samples" not in made.differences


@pytest.mark.parametrize("name", ["recipe.yaml", "summary.json", "environment.json", "metrics.jsonl"])
def test_a_damaged_folder_is_named(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, "a")
    (folder.path / name).write_text("{\n{\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match=name.replace(".", r"\.")):
        report([folder])
