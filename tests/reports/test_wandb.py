"""The report of an experiment in W&B: a run of its own in the experiment's group, read back from the offline file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distft.experiments.expand import load_experiment
from distft.files import to_json
from distft.runs.folder import RunFolder

from ..distributed.test_artefacts import wandb_records
from .conftest import SUMMARY

EXPERIMENT = """
base: tiny
variants:
  r16: {}
  r4: {lora.r: 4}
repeats: 2
"""


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """An experiment whose four runs are there."""
    path = tmp_path / "recipes" / "experiments" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(EXPERIMENT)
    for number, run in enumerate(load_experiment(["experiment=mine"], folder=tmp_path).runs):
        folder = RunFolder.claim(tmp_path / "runs", run.name, exact=True)
        folder.recipe.write_text(run.recipe.to_yaml())
        folder.environment.write_text(to_json({"python": "3.11.7", "gpus": []}))
        folder.append_metrics({"step": 10, "loss": 2.25, "samples": 160, "tokens": 8000})
        folder.write_summary({**SUMMARY, "samples_per_second": 40.0 + number})
    return tmp_path


def report(where: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    command = [sys.executable, "-m", "distft.cli", "report", "experiment=mine", *words]
    variables = {**known, "NETRC": str(where / "none"), **environment}
    return subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=200, env=variables)


def test_the_report_is_a_run_in_the_group_of_the_experiment(where: Path) -> None:
    done = report(where)
    assert done.returncode == 0, done.stderr
    assert "sync it with: wandb sync runs/wandb/offline-run-" in done.stderr
    (run,) = wandb_records(where / "runs" / "wandb", "run")
    found = [run[key] for key in ("run_group", "job_type", "display_name", "project")]
    assert found == ["mine", "report", "mine-report", "distft"]
    train = load_experiment(["experiment=mine"], folder=where).runs[0].recipe
    assert train.tracking.group == run["run_group"]
    updates = wandb_records(where / "runs" / "wandb", "summary")
    summary = {key: value for record in updates for key, value in record.get("update", {}).items()}
    made = where / "made.json"
    assert report(where, "--output", str(made), WANDB_MODE="disabled").returncode == 0
    stored = json.loads(made.read_text())
    assert summary["verdict"] == stored["verdict"]
    (folder,) = (where / "runs" / "wandb").glob("offline-run-*")
    table = json.loads((folder / "files" / summary["variants.path"]).read_text())
    shown = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["variant"] for row in shown] == [variant["name"] for variant in stored["variants"]]
    assert [row["samples/s"] for row in shown] == [
        variant["spreads"]["samples_per_second"]["median"] for variant in stored["variants"]
    ]
    assert [row["finished"] for row in shown] == [2, 2] and {"comparison.path", "where the time goes.path"} <= set(
        summary
    )


def test_only_runs_that_report_to_wandb_have_their_report_there(where: Path) -> None:
    done = report(where, "tracking.report_to=[]")
    assert done.returncode == 0 and "W&B" not in done.stderr
    assert not (where / "runs" / "wandb").exists()


def test_a_tracker_that_fails_costs_no_report(where: Path) -> None:
    (where / "wandb.py").write_text("raise ImportError('not here')")
    done = report(where, PYTHONPATH=os.pathsep.join([str(where), os.environ.get("PYTHONPATH", "")]))
    assert done.returncode == 0, done.stderr
    assert "warning: the report is not in W&B (ImportError: not here)" in done.stderr
    assert "## Variants" in done.stdout
