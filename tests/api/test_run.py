"""`distft.Run`: what it reads from a run folder, without any training."""

from __future__ import annotations

from pathlib import Path

import pytest

import distft
from distft.api.run import Metrics
from distft.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> distft.Run:
    folder = RunFolder(tmp_path / "tiny")
    folder.path.mkdir()
    figures = {
        "steps": 20,
        "train_loss": 2.125,
        "samples_per_second": 31.5,
        "eval_after": {"loss": 1.0, "perplexity": 2.7},
    }
    folder.write_summary({"status": "finished", "recipe": "<tiny>", **figures})
    folder.append_metrics({"step": 1, "loss": 3.0}, {"step": 1, "eval_loss": 2.5}, {"step": 2, "loss": 2.0})
    return distft.Run(folder.path)


def test_a_run_shows_how_it_ended_and_its_main_figures(run: distft.Run) -> None:
    assert repr(run) == f"Run({run.path}, finished, 20 steps, loss 2.1250, 31.5 samples/s)"
    shown = run._repr_html_()
    assert "<th>train_loss</th><td>2.125</td>" in shown and "<th>perplexity after</th><td>2.7</td>" in shown
    assert "&lt;tiny&gt;" in shown and "<tiny>" not in shown


def test_metrics_are_records_with_columns(run: distft.Run) -> None:
    assert run.metrics[-1] == {"step": 2, "loss": 2.0}
    assert run.metrics["loss"] == [3.0, 2.0] and run.metrics["eval_loss"] == [2.5]
    assert isinstance(run.metrics[:2], Metrics) and run.metrics[:2]["step"] == [1, 1]
    assert list(run.metrics.to_pandas().columns) == ["step", "loss", "eval_loss"]
    assert "<td>2.0</td>" in run.metrics._repr_html_()


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(distft.errors.RunFolderError, match=r"is not a run folder \(summary.json is missing\)"):
        distft.Run(tmp_path)


def test_a_run_without_a_result_cannot_be_loaded(run: distft.Run) -> None:
    with pytest.raises(distft.errors.RunFolderError, match="has neither adapter/ nor model/: the run is finished"):
        run.load()
    assert run.faults == [] and run.evaluation == {}
