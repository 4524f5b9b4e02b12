"""`distft compare`: the runs of an experiment on this machine, one after the other, and the report on them.

Every run is a `distft train` of its own, so that one that fails leaves the others alone. Repeats take turns (the order is the
experiment's), so that a machine that grows slower meets all variants alike.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from distft.config.files import leaves
from distft.config.recipe import Recipe
from distft.console import say
from distft.errors import ExperimentError, Fault, Interrupted, MissingExtraError, RunFolderError
from distft.experiments.expand import Experiment, ExperimentRun
from distft.experiments.progress import Watched, watched
from distft.files import write_atomically
from distft.hardware import visible_devices
from distft.reports.comparability import differences
from distft.reports.html import histories, page
from distft.reports.markdown import markdown
from distft.reports.report import Report, report_on_runs
from distft.reports.results import DAMAGED, NOT_THERE, Run, outcome, read_run
from distft.reports.wandb import log_report
from distft.runs.folder import RunFolder
from distft.text import shorten

_EVERY_S = 0.5
"""How often the table of the runs is drawn anew."""
_MAKES_NO_DIFFERENCE = ("evaluation.", "slurm.", "run.max_restarts", "run.hang_")
"""What a finished run may say otherwise than its experiment does now, besides names and trackers: it is as fast and has learned the same."""
_MEASURED = ("evaluation.before_and_after", "evaluation.max_samples")
"""What training itself measures by, so that losses and perplexities of runs that say something else are not of the same rows."""
_NAMED = 3
"""Runs that a message names."""
_ENDED = "distft compare: this run ended without a folder, with exit code "
"""What its log says last of a run that failed so early; without it nobody knows whether the run has ended."""


@dataclass(frozen=True)
class Comparison:
    """An experiment on this machine. `processes` is for every run whose strategy is not `single`; None for one a GPU, or two on a
    machine without any."""

    experiment: Experiment
    processes: int | None = None

    def run(self, *, resume: bool, watch: bool = False) -> Report:
        """Make the runs, or with `resume` those without a result, and write the report beside them. What a run printed stands in
        `<experiment>-logs/`. With `watch` a table in the terminal follows them.

        Raises:
            RunFolderError: runs of this experiment are there, and `resume` is off; or they were made with another recipe.
            ExperimentError: a model or data is missing, so that no variant could run.
            RecipeError: a global batch does not divide over the processes, or an evaluation lacks something.
            Interrupted: a signal came; the runs that are left can be made with `resume`.
        """
        there = [run.name for run in self.experiment.runs if folder_of(run) is not None]
        if there and not resume:
            raise RunFolderError(
                f"{len(there)} of {len(self.experiment.runs)} runs of {self.experiment.name} are there already ({', '.join(there[:3])}"
                f"{', …' if len(there) > 3 else ''}); --resume makes those that have not finished, run.dir=FOLDER starts apart"
            )
        for run in self.experiment.runs:
            run.recipe.check_division(self.processes_of(run.recipe))
        self._check_recipes()
        for run in self.experiment.runs:
            _set_damaged_aside(run)
        self._check_needs()
        self._check_evaluations()
        folders = {run.name: folder_of(run) for run in self.experiment.runs}
        logs = log_of(self.experiment, self.experiment.runs[0]).parent
        try:
            with watched(self.experiment.runs, folders, logs) if watch else contextlib.nullcontext() as table:
                for number, run in enumerate(self.experiment.runs, 1):
                    place = f"{number}/{len(self.experiment.runs)} {run.name}"
                    if (result := self._result(run)) is None:
                        self._make(run, place, table)
                    else:
                        say(
                            f"{place}: had {'finished' if result == 'finished' else 'run out of memory, which is its result'}"
                        )
                    self._evaluate(run, place)
        except Interrupted:
            if any(folder_of(run) is not None for run in self.experiment.runs):
                self.write()
            raise
        made = self.write()
        track(self.experiment, made)
        return made

    def processes_of(self, recipe: Recipe) -> int:
        """How many processes a run of `recipe` has here."""
        if recipe.strategy == "single":
            return 1
        return self.processes or visible_devices() or min(2, os.cpu_count() or 1)

    def write(self) -> Report:
        """The report on the runs that are there, as Markdown, as JSON and as a page."""
        made = report_on(self.experiment)
        write_atomically(self.parent / f"{self.experiment.name}.md", markdown(made))
        write_atomically(self.parent / f"{self.experiment.name}.json", made.to_json())
        try:
            write_atomically(self.parent / f"{self.experiment.name}.html", page(made.title, histories(made), made))
        except MissingExtraError as error:
            say(f"no page with charts: {error}")
        return made

    @property
    def files(self) -> list[Path]:
        """What `write` has written."""
        files = [self.parent / f"{self.experiment.name}.{kind}" for kind in ("md", "json", "html")]
        return [file for file in files if file.is_file()]

    @property
    def parent(self) -> Path:
        """Where the report goes: the folder of the first run's folder."""
        return _parent(self.experiment.runs[0])

    @property
    def complete(self) -> bool:
        """Whether every run has a result."""
        return all(self._result(run) is not None for run in self.experiment.runs)

    def _check_recipes(self) -> None:
        """Raises RunFolderError where runs that are there would pass for those of a recipe that they were not made with."""
        made = {run.name: _read(run) for run in self.experiment.runs if self._stays(run)}
        if told := _changed(self.experiment, made):
            raise RunFolderError(
                f"{told}\nrun.dir=FOLDER starts apart; else take the old values, or remove those folders to make these runs anew"
            )

    def _stays(self, run: ExperimentRun) -> bool:
        """Whether `run` is not made from its beginning: it has a result, or a checkpoint to go on from."""
        folder = folder_of(run)
        if folder is None or _read(run).status == DAMAGED:
            return False
        return self._result(run) is not None or any(folder.checkpoints.glob("*"))

    def _check_needs(self) -> None:
        """Raises ExperimentError with all that is missing of models and data where every variant lacks something: each run would find it out
        for itself. Where only some do, theirs are failed runs of the report. What the hub may have is left to the runs, unless it is offline."""
        if any(self._result(run) for run in self.experiment.runs):
            return
        from huggingface_hub import constants

        from distft.hub import missing  # imports transformers and datasets, for which `distft report` need not wait

        lacking: dict[str, list[str]] = {}
        for recipe in (run.recipe for run in self.experiment.runs):
            model = recipe.model
            read = f"{[model.name, model.tokenizer, model.revision]} {recipe.data.model_dump_json()}"
            if read not in lacking:
                lacking[read] = missing(recipe, hub=constants.HF_HUB_OFFLINE)
        if all(lacking.values()):
            lines = dict.fromkeys(line for lines in lacking.values() for line in lines)
            raise ExperimentError([Fault(self.experiment.name, "", line) for line in lines])

    def _check_evaluations(self) -> None:
        """Raises ExperimentError with all that the evaluations lack which are still to be made."""
        different: dict[str, Recipe] = {}
        for run in self.experiment.runs:
            if self._tasks_left(run):
                recipe = run.recipe
                parts = (recipe.evaluation, recipe.data)
                different.setdefault(f"{recipe.run.seed} {[part.model_dump_json() for part in parts]}", recipe)
        if not different:
            return
        from distft.evaluation import (
            preflight as ready,  # imports peft and lm-eval, for which `distft report` need not wait
        )

        faults = dict.fromkeys(fault for recipe in different.values() for fault in ready.faults(recipe))
        if faults:
            raise ExperimentError([*faults])

    def _tasks_left(self, run: ExperimentRun) -> list[str]:
        """The tasks of a run's evaluation, where not all of them have a result."""
        folder, tasks = folder_of(run), run.recipe.evaluation.tasks
        found = {} if folder is None else folder.read_summary().get("evaluation") or {}
        return [] if all(task in found for task in tasks) else [*tasks]

    def _result(self, run: ExperimentRun) -> str | None:
        """`finished`, `out of memory`, or None where it has to be made. Going out of memory is a result where the recipe allows no restart:
        started again, the run would take a smaller micro-batch and be another."""
        folder = folder_of(run)
        if folder is None:
            return None
        summary = folder.read_summary()
        ended = outcome(str(summary["status"]), summary.get("cause"))
        fixed = ended == "out of memory" and run.recipe.run.max_restarts == 0
        return ended if ended == "finished" or fixed else None

    def _make(self, run: ExperimentRun, place: str, table: Watched | None) -> None:
        log = log_of(self.experiment, run)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "distft.cli", "train", "--nproc", str(self.processes_of(run.recipe)), *run.arguments,
        ]  # fmt: skip
        if table is None:
            say(f"{place}: starts; what it prints goes to {log}")
        began = time.monotonic()
        with log.open("w", encoding="utf-8") as output:
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            with _passed_on(child) as signums:
                code = child.wait() if table is None else _follow(child, run, table)
        folder = folder_of(run)
        if table is not None:
            table.look(run, folder, "failed" if folder is None else None)
        summary: dict[str, Any] = {} if folder is None else folder.read_summary()
        if summary.get("status") == "finished":
            rate = summary.get("samples_per_second")
            shown = "" if rate is None else f", {rate:,.1f} samples/s"
            say(f"{place}: finished in {time.monotonic() - began:.0f} s{shown}")
        else:
            cause = summary.get("cause") or _last_line(log)
            how = outcome(str(summary.get("status", "failed")), cause)
            say(f"{place}: {how} (exit code {code}): {' '.join(str(cause).split())}")
        if folder is None and not signums:
            with log.open("a", encoding="utf-8") as output:
                output.write(f"\n{_ENDED}{code}\n")
        if signums:
            raise Interrupted(
                signal.Signals(signums[0]).name,
                f"in {run.name}; the same command with --resume makes the runs that are left",
            )

    def _evaluate(self, run: ExperimentRun, place: str) -> None:
        """What the run's recipe says, where it has finished and has not been evaluated yet."""
        folder, tasks = folder_of(run), self._tasks_left(run)
        if folder is None or not tasks or self._result(run) != "finished":
            return
        log = self.parent / f"{self.experiment.name}-logs" / f"{run.name}.evaluation.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        changes = [word for word in run.arguments if word.startswith("evaluation.")]
        command = [
            sys.executable, "-m", "distft.cli", "evaluate", "--nproc", str(self.processes or visible_devices() or 1),
            str(folder.path), *changes,
        ]  # fmt: skip
        say(f"{place}: evaluates {', '.join(tasks)}; what it prints goes to {log}")
        began = time.monotonic()
        with log.open("w", encoding="utf-8") as output:
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            with _passed_on(child) as signums:
                code = child.wait()
        if code == 0:
            say(f"{place}: evaluated in {time.monotonic() - began:.0f} s")
        elif not signums:
            say(f"{place}: not evaluated (exit code {code}): {_last_line(log)}")
        if signums:
            raise Interrupted(
                signal.Signals(signums[0]).name,
                f"in the evaluation of {run.name}; the same command with --resume goes on",
            )


def _follow(child: subprocess.Popen[Any], run: ExperimentRun, table: Watched) -> int:
    """The exit code of `child`; until it ends the table shows how far `run` is."""
    before = folder_of(run)
    began = time.time()
    while True:
        folder = folder_of(run)
        # What an earlier start has left says nothing of this one until it is written to.
        fresh = folder is not None and (folder != before or folder.summary.stat().st_mtime >= began)
        table.look(run, folder, None if fresh else "starting")
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(_EVERY_S)


def report_on(experiment: Experiment) -> Report:
    """The report on the runs of `experiment`: those that are there, those that failed before they had a folder, and those that are damaged.
    Where some were made with another recipe than the experiment means now, a line says so.

    Raises:
        RunFolderError: there is none.
    """
    runs = {
        run.name: replace(
            _without_folder(experiment, run) if folder_of(run) is None else _read(run), variant=run.variant
        )
        for run in experiment.runs
    }
    if told := _changed(experiment, runs):
        say(f"warning: {told}")
    return report_on_runs(
        [*runs.values()], title=f"Experiment {experiment.name}", equal=experiment.equal, loss_tolerance=experiment.loss_tolerance,
    )  # fmt: skip


def _read(run: ExperimentRun) -> Run:
    """The run as its folder says, which is there; `damaged` where that cannot be read."""
    folder = folder_of(run)
    assert folder is not None
    try:
        return read_run(folder)
    except RunFolderError as error:
        return Run.unread(folder.path, DAMAGED, str(error), run.recipe.model_dump())


def _without_folder(experiment: Experiment, run: ExperimentRun) -> Run:
    """One that has failed before it had a folder, where its log says so, else one that is not there."""
    log = log_of(experiment, run)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    status = "failed" if lines and lines[-1].startswith(_ENDED) else NOT_THERE
    cause = _last_line(log) if lines else None
    path = _parent(run) / run.name
    return Run.unread(path, status, cause, run.recipe.model_dump())


def _changed(experiment: Experiment, made: Mapping[str, Run]) -> str:
    """In words, which of the runs that are there were made with another recipe than `experiment` means by their names now, and in what it
    differs; empty where none was."""
    found: dict[str, list[str]] = {}
    for run in experiment.runs:
        there = made.get(run.name)
        if there is None or not there.recorded:
            continue
        now = dict(leaves(run.recipe.model_dump()))
        for key, values in differences({"then": [there.asked], "now": [now]}).items():
            if key.startswith(_MEASURED) or not key.startswith(_MAKES_NO_DIFFERENCE):
                found.setdefault(f"{key}: {values['then']!r} then, {values['now']!r} now", []).append(there.name)
    if not found:
        return ""
    count = len({name for names in found.values() for name in names})
    lines = [f"  {line} ({shorten(names, _NAMED)})" for line, names in found.items()]
    head = f"{count} of {len(experiment.runs)} runs of {experiment.name} were made with another recipe than their names mean now:"
    more = [f"  and {len(lines) - 2 * _NAMED} more"] if len(lines) > 2 * _NAMED else []
    return "\n".join([head, *lines[: 2 * _NAMED], *more])


def _set_damaged_aside(run: ExperimentRun) -> None:
    """Where the folder of `run` cannot be read, give it another name, so that the run is made anew and nothing is lost."""
    while (folder := folder_of(run)) is not None and (found := _read(run)).status == DAMAGED:
        names = (f"{folder.name}.damaged{'' if number == 1 else f'-{number}'}" for number in itertools.count(1))
        aside = next(path for name in names if not (path := folder.path.with_name(name)).exists())
        folder.path.rename(aside)
        say(f"{run.name} is made anew, and its folder now lies in {aside}: {found.cause}")


def log_of(experiment: Experiment, run: ExperimentRun) -> Path:
    """Where `distft compare` puts what a run prints."""
    return _parent(experiment.runs[0]) / f"{experiment.name}-logs" / f"{run.name}.log"


def track(experiment: Experiment, made: Report) -> None:
    """Log the report to W&B, where the runs report there."""
    run = next((run for run in experiment.runs if "wandb" in run.recipe.tracking.report_to), None)
    if run is not None:
        log_report(made, experiment.name, run.recipe.tracking, _parent(run))


def folder_of(run: ExperimentRun) -> RunFolder | None:
    """The newest folder of a run; None as well where it was stopped before it wrote its first record."""
    return next((folder for folder in RunFolder.named(_parent(run), run.name) if folder.summary.is_file()), None)


def _parent(run: ExperimentRun) -> Path:
    return Path(run.recipe.run.dir).expanduser()


def _last_line(log: Path) -> str:
    """What distft said last, or else the last line that there is."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith(_ENDED)]
    said = [line.removeprefix("distft: ") for line in lines if line.startswith("distft: ")]
    return (said or lines or ["it printed nothing"])[-1]


@contextlib.contextmanager
def _passed_on(child: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """The signals that came meanwhile, each passed on to `child`, which knows how to stop."""
    came: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signum)

    previous = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield came
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
