"""`distft compare`: real runs of an experiment, one after the other, and their report."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from distft.experiment import load_experiment
from distft.run import RunFolder

EXPERIMENT = """
base: tiny
overrides:
  strategy: single
  evaluation.before_and_after: false
  training: {logging_steps: 1, eval_strategy: "no", save_strategy: "no"}
variants:
  four: {}
  full: {quantization: null}
  broken: {data.name: rows.jsonl, data.format.text: body, training.completion_only_loss: false}
budget: {steps: 3}
equal: [order, global_batch]
"""
COMPARE = [sys.executable, "-m", "distft.cli", "compare", "experiment=mine", "tracking.report_to=[]"]


def folder_with(where: Path) -> Path:
    path = where / "recipes" / "experiments" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(EXPERIMENT)
    return where


def call(where: Path, *more: str, limit_s: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMPARE, *more], cwd=where, capture_output=True, text=True, timeout=limit_s)


def test_one_that_fails_leaves_the_others_alone_and_is_made_up_for(tmp_path: Path) -> None:
    done = call(folder_with(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "1/3 mine-four: finished in" in done.stderr and "2/3 mine-full: finished in" in done.stderr
    assert "3/3 mine-broken: failed (exit code 2): there is no data file or folder rows.jsonl" in done.stderr
    report = json.loads((tmp_path / "runs" / "mine.json").read_text())
    assert [(run["name"], run["status"]) for run in report["runs"]] == [
        ("mine-four", "finished"),
        ("mine-full", "finished"),
    ]
    assert report["missing"].keys() == {"mine-broken"}
    assert report["missing"]["mine-broken"].startswith("there is no data file or folder rows.jsonl")
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| mine-broken ")]
    assert "not there: there is no data file or folder rows.jsonl" in row
    assert {each["what"]: each["equal"] for each in report["equality"] if each["declared"]} == {
        "order": True,
        "global_batch": True,
    }
    assert "| mine-four" in done.stdout and (tmp_path / "runs" / "mine.md").read_text() in done.stdout

    again = call(tmp_path)
    assert again.returncode == 2
    assert (
        "2 of 3 runs of mine are there already (mine-four, mine-full); --resume makes those that have not finished"
        in again.stderr
    )

    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"body": f"row {n} says {n * n}"}) + "\n" for n in range(200))
    )
    before = RunFolder(tmp_path / "runs" / "mine-four").summary.read_text()
    rest = call(tmp_path, "--resume", "--watch")
    assert rest.returncode == 0, rest.stderr
    assert "\x1b" not in rest.stdout + rest.stderr  # no terminal, no table: plain lines
    assert rest.stderr.count("had finished") == 2 and "3/3 mine-broken: finished in" in rest.stderr
    assert RunFolder(tmp_path / "runs" / "mine-four").summary.read_text() == before
    assert json.loads((tmp_path / "runs" / "mine.json").read_text())["missing"] == {}


def test_a_signal_stops_the_run_at_hand_and_resume_goes_on_with_it(tmp_path: Path) -> None:
    folder_with(tmp_path)
    # `broken` is left out by its own mistake; the others train long enough to be stopped in the middle.
    process = subprocess.Popen([*COMPARE, "training.logging_steps=1", "data.max_samples=null"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)  # fmt: skip
    run = RunFolder(tmp_path / "runs" / "mine-four")
    end = time.monotonic() + 120
    while not run.summary.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "the same command with --resume makes the runs that are left" in said
    assert "2/3" not in said and not (tmp_path / "runs" / "mine-full").exists()
    rest = call(tmp_path, "data.max_samples=null", "--resume")
    assert "2/3 mine-full: finished in" in rest.stderr, rest.stderr
    assert run.read_summary()["status"] == "finished"
    assert not list((tmp_path / "runs").glob("mine-four-*"))


def test_out_of_memory_is_a_result_where_no_restart_is_allowed(tmp_path: Path) -> None:
    """Started again, the run would halve its micro-batch and be another one."""
    path = folder_with(tmp_path) / "recipes" / "experiments" / "mine.yaml"
    path.write_text(
        "base: tiny\noverrides: {run.max_restarts: 0}\nvariants: {big: {}, none: {quantization: null}}\nbudget: {steps: 1}\n"
    )
    cause = "OutOfMemory: out of memory on rank 0 with a micro-batch of 4 samples: 3.00 GiB were asked for, 1.00 of the GPU's 8.00 GiB are free."
    for run in load_experiment(["experiment=mine", "tracking.report_to=[]"], folder=tmp_path).runs:
        folder = RunFolder.claim(tmp_path / "runs", run.name, exact=True)
        folder.recipe.write_text(run.recipe.to_yaml())
        folder.write_summary({"status": "failed", "cause": cause, "strategy": "ddp", "world_size": 2})
    done = call(tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("had run out of memory, which is its result") == 2
    assert "2 runs of 2 variants, 0 finished, 2 out of memory." in done.stdout
    assert not (tmp_path / "runs" / "mine-logs").exists()
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| mine-big ")]
    assert "| out of memory: on rank 0 with a micro-batch of 4 samples: 3.00… |" in row
    assert f"- `mine-big`: out of memory: {cause.removeprefix('OutOfMemory: out of memory ')}\n" in done.stdout
