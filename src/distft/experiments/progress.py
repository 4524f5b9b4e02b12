"""A live table of an experiment's runs: how far each has come, its loss and speed, and the time it still needs.

It only reads what the runs write into their folders, so watching does not affect them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from distft.experiments.expand import ExperimentRun
from distft.reports.results import outcome
from distft.reports.tables import written
from distft.runs.folder import RunFolder

UNKNOWN = "–"
_MARGIN = 8
"""Lines of the terminal without a run: the header, the rules, the caption, and the row that counts hidden runs."""
_NARROW = 80
"""Terminals with fewer columns get a table without a frame, to leave room for names."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come; None for what is unknown.

    `steps` is its total number of steps, `left_s` the seconds until the last one at the present pace.
    """

    name: str
    status: str = "waiting"
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    samples_per_second: float | None = None
    left_s: float | None = None

    @classmethod
    def of(cls, run: ExperimentRun, folder: RunFolder | None) -> Progress:
        """Read the run's folder; without one the run is `waiting`."""
        if folder is None:
            return cls(run.name)
        summary, records = folder.read_summary(), folder.read_metrics()
        status = outcome(str(summary["status"]), summary.get("cause"))
        logged = {key: value for record in records for key, value in record.items() if value is not None}
        loss = next((record["loss"] for record in reversed(records) if "loss" in record), None)
        if loss is None and "loss" in logged:  # the last one is null, which is how JSON has NaN
            logged["loss"] = math.nan
        step, steps = logged.get("step"), summary.get("steps") or _steps(run, logged)
        left = _left(records, step, steps) if status == "running" else None
        speed = summary.get("samples_per_second")
        if speed is None:
            speed = logged.get("samples_per_second")
        return cls(run.name, status, step, steps, logged.get("loss"), speed, left)

    def cells(self) -> list[str]:
        """The run's row of the table."""
        step = UNKNOWN if self.step is None else str(self.step) + ("" if self.steps is None else f"/{self.steps}")
        loss = UNKNOWN if self.loss is None else written(self.loss, ".4f")
        speed = UNKNOWN if self.samples_per_second is None else f"{self.samples_per_second:,.1f}"
        left = UNKNOWN if self.left_s is None else str(timedelta(seconds=round(self.left_s)))
        return [self.name, self.status, step, loss, speed, left]


def _steps(run: ExperimentRun, logged: Mapping[str, Any]) -> int | None:
    """The total number of steps: from the recipe, or from the share of an epoch that the steps so far make up."""
    training = run.recipe.training
    asked = training.get("max_steps", -1)
    if asked > 0:
        return int(asked)
    epochs, epoch, step = training.get("num_train_epochs", 3.0), logged.get("epoch"), logged.get("step")
    return round(step * epochs / epoch) if epoch and step else None


def _left(records: Sequence[Mapping[str, Any]], step: int | None, steps: int | None) -> float | None:
    """Seconds until the last step, at the pace since the first record, which includes the warm-up."""
    timed = [record for record in records if record.get("time_s") is not None and record["step"] > 0]
    if step is None or steps is None or not timed:
        return None
    begun, newest = timed[0], timed[-1]
    if newest["step"] == begun["step"]:
        return float(newest["time_s"] / newest["step"] * (steps - step))
    return float((newest["time_s"] - begun["time_s"]) / (newest["step"] - begun["step"]) * (steps - step))


class Watched:
    """The live table. `look` reads one run's folder again; the others are shown as last seen."""

    def __init__(
        self, runs: Sequence[ExperimentRun], folders: Mapping[str, RunFolder | None], logs: Path, live: Live
    ) -> None:
        self._seen = {run.name: Progress.of(run, folders[run.name]) for run in runs}
        self._logs, self._live, self._began = logs, live, time.monotonic()
        self._at = runs[0].name
        self._draw()

    def look(self, run: ExperimentRun, folder: RunFolder | None, status: str | None = None) -> None:
        """Read the folder of `run` and redraw the table. `status` replaces the folder's."""
        seen = Progress.of(run, folder)
        self._seen[run.name] = seen if status is None else replace(seen, status=status)
        self._at = run.name
        self._draw()

    def _draw(self) -> None:
        narrow = self._live.console.width < _NARROW
        table = Table(caption=self._caption(), caption_justify="left", box=None if narrow else box.HEAVY_HEAD)
        for number, head in enumerate(("run", "status", "step", "loss", "samples/s", "left")):
            table.add_column(
                head,
                justify="left" if number < 2 else "right",
                overflow="fold" if number == 0 else "ellipsis",
                no_wrap=number > 0,
            )
        rows = [*self._seen.values()]
        room = max(1, self._live.console.height - _MARGIN)
        at = list(self._seen).index(self._at)
        first = max(0, min(at - room // 2, len(rows) - room))
        shown = rows[first : first + room]
        for progress in shown:
            table.add_row(*progress.cells(), style="bold" if progress.status in ("running", "starting") else None)
        if len(shown) < len(rows):
            table.add_row(f"… and {len(rows) - len(shown)} more")
        self._live.update(table, refresh=True)

    def _caption(self) -> str:
        ended = sum(progress.status not in ("waiting", "starting", "running") for progress in self._seen.values())
        passed = timedelta(seconds=round(time.monotonic() - self._began))
        return f"{ended} of {len(self._seen)} runs have ended after {passed}; their output goes to {self._logs}"


@contextmanager
def watched(
    runs: Sequence[ExperimentRun], folders: Mapping[str, RunFolder | None], logs: Path
) -> Iterator[Watched | None]:
    """Show the table of `runs` on stdout for the duration of a block; None if stdout is not a capable terminal.

    Output on stderr appears above the table.
    """
    console = Console(file=sys.stdout)
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        yield None
        return
    with Live(console=console, auto_refresh=False, redirect_stderr=sys.stderr.isatty()) as live:
        yield Watched(runs, folders, logs, live)
