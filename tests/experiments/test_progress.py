"""`distft compare --watch`: a table in a real pseudo-terminal of real runs, and what it reads from run folders."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live

from distft.experiments.expand import ExperimentRun, load_experiment
from distft.experiments.progress import Progress, Watched
from distft.runs.folder import RunFolder

EXPERIMENT = """
base: tiny
overrides:
  strategy: single
  quantization: null
  evaluation.before_and_after: false
  training: {logging_steps: 1, eval_strategy: "no", save_strategy: "no"}
variants:
  small: {lora.r: 4}
  broken: {data.name: rows.jsonl, data.format.text: body, training.completion_only_loss: false}
budget: {steps: 12}
"""

ESCAPES = r"\x1b\[[0-9;?]*[A-Za-z]"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "recipes" / "experiments" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_a_terminal(command: list[str], where: Path, rows: int, columns: int, limit_s: float) -> tuple[int, str]:
    """Exit code, and all that was written to a terminal of this size, colours and cursor movements included."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        command,
        cwd=where,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(theirs)
    written, end = b"", time.monotonic() + limit_s
    try:
        while time.monotonic() < end:
            if not select.select([ours], [], [], 1)[0]:
                continue
            try:
                part = os.read(ours, 65536)
            except OSError:  # how Linux says that nobody writes any more
                break
            if not part:
                break
            written += part
        return process.wait(timeout=max(1, end - time.monotonic())), written.decode("utf-8", errors="replace")
    finally:
        process.kill()
        os.close(ours)


@pytest.mark.slow
def test_the_table_follows_the_runs_in_a_terminal(tiny: Path, place: Path) -> None:
    command = [sys.executable, "-m", "distft.cli", "compare", "experiment=mine", "tracking.report_to=[]", "--watch"]
    code, written = in_a_terminal(command, place, 30, 120, 300)
    plain = re.sub(ESCAPES, "", written)
    assert code == 1, plain[-3000:]  # one of them is broken
    assert (
        "\x1b[1A" in written and "\x1b[?25l" in written and written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    )  # drawn over; the cursor is back
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in plain.splitlines() if line.startswith("│ mine-")
    ]
    small = [row for row in rows if row[0] == "mine-small"]
    assert list(dict.fromkeys(row[1] for row in small)) == [
        "waiting",
        "starting",
        "running",
        "finished",
    ]
    running = [row for row in small if row[1] == "running" and row[2] != "–"]
    steps = [int(row[2].removesuffix("/12")) for row in running]
    assert steps == sorted(steps) and len(set(steps)) > 1
    records = {record["step"]: record for record in RunFolder(place / "runs" / "mine-small").read_metrics()}
    for row, step in zip(running, steps, strict=True):
        assert row[3:5] == [f"{records[step]['loss']:.4f}", f"{records[step]['samples_per_second']:,.1f}"]
        assert re.fullmatch(r"\d:\d\d:\d\d", row[5])
    summary = RunFolder(place / "runs" / "mine-small").read_summary()
    assert small[-1] == [
        "mine-small",
        "finished",
        "12/12",
        f"{records[12]['loss']:.4f}",
        f"{summary['samples_per_second']:,.1f}",
        "–",
    ]
    assert rows[-1][:2] == ["mine-broken", "failed"]
    assert "2 of 2 runs have ended" in plain and "mine-logs" in plain
    assert (
        "distft: 1/2 mine-small: finished in" in plain
        and "distft: 2/2 mine-broken: failed (exit code 2): the recipe has a fault: command line: data.name: " in plain
    )
    assert "step/s" in (place / "runs" / "mine-logs" / "mine-small.log").read_text(), (
        "what a run prints is in its log, not in between"
    )
    assert "step/s" not in plain


# ---- what is read of a folder ----------------------------------------------------------------------------------------


def run_of(place: Path, *overrides: str) -> ExperimentRun:
    return load_experiment(["experiment=mine", *overrides], folder=place).runs[0]


def folder_with(place: Path, status: str, *records: dict[str, Any], **more: Any) -> RunFolder:
    folder = RunFolder(place / "runs" / "mine-small")
    folder.path.mkdir(parents=True)
    folder.summary.write_text(json.dumps({"status": status, "cause": None, **more}))
    folder.append_metrics(*records)
    return folder


def test_the_time_that_is_left_goes_by_the_steps_after_the_first(place: Path) -> None:
    records = [
        {"step": step, "loss": 3.0 - step, "time_s": 10.0 + 2 * step, "samples_per_second": 8.0} for step in (1, 2, 3)
    ]
    folder = folder_with(place, "running", {"step": 0, "test_loss": 4.0}, *records)
    assert Progress.of(run_of(place), folder) == Progress("mine-small", "running", 3, 12, 0.0, 8.0, 18.0)


def test_without_a_number_of_steps_it_goes_by_the_epochs(place: Path) -> None:
    path = place / "recipes" / "experiments" / "mine.yaml"
    path.write_text(EXPERIMENT.replace("budget: {steps: 12}", ""))
    folder = folder_with(place, "running", {"step": 10, "loss": 1.0, "time_s": 5.0, "epoch": 0.5})
    seen = Progress.of(run_of(place, "training.num_train_epochs=2"), folder)
    assert (seen.steps, seen.left_s) == (40, 15.0)


@pytest.mark.parametrize(
    ("status", "cause", "shown"),
    [
        ("failed", "OutOfMemory: out of memory on rank 0", "out of memory"),
        ("failed", "RuntimeError: no", "failed"),
        ("running", None, "running"),
    ],
)
def test_what_is_not_known_is_left_open(status: str, cause: str | None, shown: str, place: Path) -> None:
    seen = Progress.of(run_of(place), folder_with(place, status, cause=cause))
    assert seen.cells() == ["mine-small", shown, "–", "–", "–", "–"]
    assert Progress.of(run_of(place), None).status == "waiting"


def test_names_stay_whole_in_a_narrow_terminal(place: Path) -> None:
    runs = load_experiment(["experiment=mine"], folder=place).runs
    folder = RunFolder.claim(place, runs[0].name, exact=True)
    folder.append_metrics({"step": 1200, "loss": 2.25, "samples_per_second": 1234.5})
    folder.write_summary({"status": "finished", "steps": 1200})
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=24)
    with Live(console=console, auto_refresh=False) as live:
        Watched(runs, {runs[0].name: folder, runs[1].name: None}, place / "logs", live)
    assert isinstance(console.file, io.StringIO)
    lines = [" ".join(line.split()) for line in re.sub(ESCAPES, "", console.file.getvalue()).splitlines()]
    assert "mine-small finished 1200/1200 2.2500 1,234.5 –" in lines and "mine-broken waiting – – – –" in lines
