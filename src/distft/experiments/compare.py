"""`distft compare`: make the runs of an experiment on this machine, one at a time, and report on them.

Every run is a `distft train` of its own, so one that fails leaves the others alone. Repeats take turns, in the order of
the experiment, so drift of the machine affects every variant equally.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.config.recipe import Recipe
from distft.console import say
from distft.errors import ExperimentError, Fault, Interrupted, MissingExtraError, RunFolderError
from distft.experiments.expand import Experiment, ExperimentRun
from distft.experiments.processes import run_command
from distft.experiments.progress import Watched, watched
from distft.experiments.results import (
    changed_recipes,
    folder_of,
    is_kept,
    last_message,
    log_of,
    logs_of,
    note_end,
    parent_of,
    read,
    report_on,
    result_of,
    set_damaged_aside,
    tasks_left,
    track,
)
from distft.files import write_atomically
from distft.hardware import visible_devices
from distft.reports.html import histories, page
from distft.reports.markdown import markdown
from distft.reports.report import Report
from distft.reports.results import outcome

_REDRAW_S = 0.5
"""How often the live table is redrawn."""


@dataclass(frozen=True)
class Comparison:
    """An experiment on this machine.

    `processes` applies to every run whose strategy is not `single`. None: one per GPU, or two without a GPU.
    """

    experiment: Experiment
    processes: int | None = None

    def run(self, *, resume: bool, watch: bool = False) -> Report:
        """Make the runs, or with `resume` those without a result, and write the report.

        What the runs print goes to `<experiment>-logs/`. With `watch` a table in the terminal follows them.

        Raises:
            RunFolderError: runs of this experiment exist and `resume` is off, or they were made with another recipe.
            ExperimentError: a model or data is missing, so that no variant could run.
            RecipeError: a global batch does not divide over the processes, or an evaluation lacks something.
            Interrupted: a signal came; `resume` makes the remaining runs.
        """
        self._check(resume)
        runs = self.experiment.runs
        folders = {run.name: folder_of(run) for run in runs}
        try:
            with watched(runs, folders, logs_of(self.experiment)) if watch else contextlib.nullcontext() as table:
                for number, run in enumerate(runs, 1):
                    place = f"{number}/{len(runs)} {run.name}"
                    result = result_of(run)
                    if result is None:
                        self._train(run, place, table)
                    elif result == "finished":
                        say(f"{place}: had finished")
                    else:
                        say(f"{place}: had run out of memory, which is its result")
                    self._evaluate(run, place)
        except Interrupted:
            if any(folder_of(run) is not None for run in runs):
                self.write()
            raise
        report = self.write()
        track(self.experiment, report)
        return report

    def processes_of(self, recipe: Recipe) -> int:
        """How many processes a run of `recipe` gets here."""
        if recipe.strategy == "single":
            return 1
        return self.processes or visible_devices() or min(2, os.cpu_count() or 1)

    def write(self) -> Report:
        """Write the report on the existing runs as Markdown, JSON and a page, and return it."""
        report = report_on(self.experiment)
        write_atomically(self._file("md"), markdown(report))
        write_atomically(self._file("json"), report.to_json())
        try:
            write_atomically(self._file("html"), page(report.title, histories(report), report))
        except MissingExtraError as error:
            say(f"no page with charts: {error}")
        return report

    @property
    def files(self) -> list[Path]:
        """The files of the report that exist."""
        return [file for kind in ("md", "json", "html") if (file := self._file(kind)).is_file()]

    def _file(self, kind: str) -> Path:
        return parent_of(self.experiment.runs[0]) / f"{self.experiment.name}.{kind}"

    @property
    def complete(self) -> bool:
        """Whether every run has a result."""
        return all(result_of(run) is not None for run in self.experiment.runs)

    # Before the first run ---------------------------------------------------------------------------------------------

    def _check(self, resume: bool) -> None:
        """Find every mistake that would otherwise cost runs. Renames damaged folders."""
        runs = self.experiment.runs
        existing = [run.name for run in runs if folder_of(run) is not None]
        if existing and not resume:
            some = ", ".join(existing[:3]) + (", …" if len(existing) > 3 else "")
            raise RunFolderError(
                f"{len(existing)} of {len(runs)} runs of {self.experiment.name} exist already ({some}); --resume makes "
                "those that have not finished, run.dir=FOLDER starts a separate set"
            )
        for run in runs:
            run.recipe.check_division(self.processes_of(run.recipe))
        self._check_recipes()
        for run in runs:
            set_damaged_aside(run)
        self._check_needs()
        self._check_evaluations()

    def _check_recipes(self) -> None:
        """Raises RunFolderError if existing runs that would be kept were made with another recipe."""
        kept = {run.name: read(run) for run in self.experiment.runs if is_kept(run)}
        if changes := changed_recipes(self.experiment, kept):
            raise RunFolderError(
                f"{changes}\nrun.dir=FOLDER starts a separate set; otherwise restore the old values, or remove those "
                "folders to make their runs again"
            )

    def _check_needs(self) -> None:
        """Raises ExperimentError with every missing model and data set if no variant has all it needs.

        If only some variants lack something, theirs are failed runs of the report. What the hub may have is left to the
        runs, unless it is offline.
        """
        if any(result_of(run) for run in self.experiment.runs):
            return
        from huggingface_hub import constants

        from distft.hub import missing  # imports transformers and datasets, which `distft report` does not need

        lacking: dict[str, list[str]] = {}
        for recipe in (run.recipe for run in self.experiment.runs):
            model = recipe.model
            needs = f"{[model.name, model.tokenizer, model.revision]} {recipe.data.model_dump_json()}"
            if needs not in lacking:
                lacking[needs] = missing(recipe, hub=constants.HF_HUB_OFFLINE)
        if all(lacking.values()):
            lines = dict.fromkeys(line for lines in lacking.values() for line in lines)
            raise ExperimentError([Fault(self.experiment.name, "", line) for line in lines])

    def _check_evaluations(self) -> None:
        """Raises ExperimentError with everything that the remaining evaluations lack."""
        different: dict[str, Recipe] = {}
        for run in self.experiment.runs:
            if tasks_left(run):
                recipe = run.recipe
                parts = (recipe.evaluation, recipe.data)
                different.setdefault(f"{recipe.run.seed} {[part.model_dump_json() for part in parts]}", recipe)
        if not different:
            return
        from distft.evaluation import preflight  # imports PEFT and lm-eval, which `distft report` does not need

        faults = dict.fromkeys(fault for recipe in different.values() for fault in preflight.faults(recipe))
        if faults:
            raise ExperimentError([*faults])

    # The runs ---------------------------------------------------------------------------------------------------------

    def _train(self, run: ExperimentRun, place: str, table: Watched | None) -> None:
        log = log_of(self.experiment, run)
        words = ["train", "--nproc", str(self.processes_of(run.recipe)), *run.arguments]
        if table is None:
            say(f"{place}: starts; its output goes to {log}")
        began = time.monotonic()
        ended = run_command(words, log, None if table is None else lambda child: _follow(child, run, table))
        folder = folder_of(run)
        if table is not None:
            table.look(run, folder, "failed" if folder is None else None)
        summary: dict[str, Any] = {} if folder is None else folder.read_summary()
        if summary.get("status") == "finished":
            rate = summary.get("samples_per_second")
            shown = "" if rate is None else f", {rate:,.1f} samples/s"
            say(f"{place}: finished in {time.monotonic() - began:.0f} s{shown}")
        else:
            cause = summary.get("cause") or last_message(log)
            how = outcome(str(summary.get("status", "failed")), cause)
            say(f"{place}: {how} (exit code {ended.code}): {' '.join(str(cause).split())}")
        if ended.stopped_by is not None:
            raise Interrupted(
                ended.stopped_by, f"in {run.name}; the same command with --resume makes the remaining runs"
            )
        if folder is None:
            note_end(log, ended.code)

    def _evaluate(self, run: ExperimentRun, place: str) -> None:
        """Evaluate the run as its recipe says, if it has finished and has not been evaluated yet."""
        folder, tasks = folder_of(run), tasks_left(run)
        if folder is None or not tasks or result_of(run) != "finished":
            return
        log = logs_of(self.experiment) / f"{run.name}.evaluation.log"
        changes = [word for word in run.arguments if word.startswith("evaluation.")]
        say(f"{place}: evaluates {', '.join(tasks)}; its output goes to {log}")
        began = time.monotonic()
        processes = self.processes or visible_devices() or 1
        ended = run_command(["evaluate", "--nproc", str(processes), str(folder.path), *changes], log)
        if ended.code == 0:
            say(f"{place}: evaluated in {time.monotonic() - began:.0f} s")
        elif ended.stopped_by is None:
            say(f"{place}: not evaluated (exit code {ended.code}): {last_message(log)}")
        if ended.stopped_by is not None:
            how = f"in the evaluation of {run.name}; the same command with --resume continues"
            raise Interrupted(ended.stopped_by, how)


def _follow(child: subprocess.Popen[Any], run: ExperimentRun, table: Watched) -> int:
    """Wait for `child` while the table shows the progress of `run`. Returns the exit code."""
    before = folder_of(run)
    began = time.time()
    while True:
        folder = folder_of(run)
        # Until this start writes to it, the folder describes an earlier one.
        fresh = folder is not None and (folder != before or folder.summary.stat().st_mtime >= began)
        table.look(run, folder, None if fresh else "starting")
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(_REDRAW_S)
