"""What the runs of an experiment have left on this machine: folders, logs and results, and the report on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distft.config.files import leaves
from distft.config.recipe import Recipe
from distft.console import say
from distft.errors import RunFolderError
from distft.evaluation.sets import asked
from distft.experiments.expand import Experiment, ExperimentRun
from distft.reports.comparability import differences
from distft.reports.report import Report, report_on_runs
from distft.reports.results import DAMAGED, NOT_THERE, Run, outcome, read_run
from distft.reports.wandb import log_report
from distft.runs.folder import RunFolder
from distft.text import shorten

_FREE_TO_DIFFER = ("evaluation.", "slurm.", "run.max_restarts", "run.hang_")
"""Keys, besides names and trackers, in which a finished run may differ from what the experiment asks for now.

They change neither its speed nor what it learned."""
_MEASURED_WITH = ("evaluation.before_and_after", "evaluation.max_samples")
"""Exceptions to these: training itself measures losses with them, on the rows that they select."""
_RUNS_NAMED = 3
_LINES = 6
"""At most this many keys are listed in the message about runs of another recipe."""
_ENDED = "distft compare: this run ended without a folder, with exit code "
"""Last line in the log of a run that failed before it had a folder. Without it, the run may not have ended."""


def parent_of(run: ExperimentRun) -> Path:
    """The folder that holds the run's folder."""
    return Path(run.recipe.run.dir).expanduser()


def folder_of(run: ExperimentRun) -> RunFolder | None:
    """The newest folder of a run that has a summary; None if there is none."""
    return next((folder for folder in RunFolder.named(parent_of(run), run.name) if folder.summary.is_file()), None)


def logs_of(experiment: Experiment) -> Path:
    """The folder for what the runs of `experiment` print."""
    return parent_of(experiment.runs[0]) / f"{experiment.name}-logs"


def log_of(experiment: Experiment, run: ExperimentRun) -> Path:
    return logs_of(experiment) / f"{run.name}.log"


def last_message(log: Path) -> str:
    """The last message of distft in a log, with its indented lines; else the last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith(_ENDED)]
    starts = [number for number, line in enumerate(lines) if line.startswith("distft: ")]
    if not starts:
        return (lines or ["it printed nothing"])[-1]
    first, *rest = lines[starts[-1] :]
    more = itertools.takewhile(lambda line: line.startswith("  "), rest)
    return " ".join([first.removeprefix("distft: "), *map(str.strip, more)])


def note_end(log: Path, code: int) -> None:
    """Note in its log that a run without a folder has ended."""
    with log.open("a", encoding="utf-8") as output:
        output.write(f"\n{_ENDED}{code}\n")


def result_of(run: ExperimentRun) -> str | None:
    """`finished`, `out of memory`, or None if the run has to be made.

    Running out of memory is a result if the recipe allows no restart: a second start would take a smaller micro-batch
    and be another run.
    """
    folder = folder_of(run)
    if folder is None:
        return None
    summary = folder.read_summary()
    ended = outcome(str(summary["status"]), summary.get("cause"))
    final = ended == "out of memory" and run.recipe.run.max_restarts == 0
    return ended if ended == "finished" or final else None


def tasks_left(run: ExperimentRun) -> list[str]:
    """The evaluation tasks of a run, unless all of them have a result with the settings that they have now."""
    folder, tasks = folder_of(run), run.recipe.evaluation.tasks
    found = {} if folder is None else folder.read_summary().get("evaluation") or {}
    done = [task in found and found[task].get("asked") in (None, asked(task, run.recipe)) for task in tasks]
    return [] if all(done) else [*tasks]


def is_kept(run: ExperimentRun) -> bool:
    """Whether `run` does not start over: it has a result, or a checkpoint to continue from."""
    folder = folder_of(run)
    if folder is None or read(run).status == DAMAGED:
        return False
    return result_of(run) is not None or any(folder.checkpoints.glob("*"))


def read(run: ExperimentRun) -> Run:
    """An existing run as its folder describes it; `damaged` if the folder cannot be read."""
    folder = folder_of(run)
    assert folder is not None
    try:
        return read_run(folder)
    except RunFolderError as error:
        return Run.unread(folder.path, DAMAGED, str(error), run.recipe.model_dump())


def set_damaged_aside(run: ExperimentRun) -> None:
    """Rename the folder of `run` if it cannot be read, so that the run is made again and nothing is lost."""
    while (folder := folder_of(run)) is not None and (found := read(run)).status == DAMAGED:
        names = (f"{folder.name}.damaged{'' if number == 1 else f'-{number}'}" for number in itertools.count(1))
        aside = next(path for name in names if not (path := folder.path.with_name(name)).exists())
        folder.path.rename(aside)
        say(f"{run.name} runs again; its damaged folder is now {aside}: {found.cause}")


def report_on(experiment: Experiment) -> Report:
    """The report on the runs of `experiment`, including those that failed without a folder and those that are damaged.

    Warns about runs that were made with another recipe than the experiment specifies now.

    Raises:
        RunFolderError: there is no run.
    """
    runs = {
        run.name: replace(
            _without_folder(experiment, run) if folder_of(run) is None else read(run), variant=run.variant
        )
        for run in experiment.runs
    }
    if changes := changed_recipes(experiment, runs):
        say(f"warning: {changes}")
    return report_on_runs(
        [*runs.values()],
        title=f"Experiment {experiment.name}",
        equal=experiment.equal,
        loss_tolerance=experiment.loss_tolerance,
        seeds=experiment.seeds,
        target_loss=experiment.target_loss,
    )


def _without_folder(experiment: Experiment, run: ExperimentRun) -> Run:
    """A run without a folder: failed if its log says so, otherwise missing."""
    log = log_of(experiment, run)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    status = "failed" if lines and lines[-1].startswith(_ENDED) else NOT_THERE
    cause = last_message(log) if lines else None
    return Run.unread(parent_of(run) / run.name, status, cause, run.recipe.model_dump())


def changed_recipes(experiment: Experiment, made: Mapping[str, Run]) -> str:
    """Which runs were made with another recipe than `experiment` specifies now, and how it differs; else empty."""
    found: dict[str, list[str]] = {}
    for run in experiment.runs:
        there = made.get(run.name)
        if there is None or not there.recorded:
            continue
        then, now = (_without_inferred(run.recipe, each) for each in (there.asked, leaves(run.recipe.model_dump())))
        for key, values in differences({"then": [then], "now": [now]}).items():
            if key.startswith(_MEASURED_WITH) or not key.startswith(_FREE_TO_DIFFER):
                line = f"{key}: was {values['then']!r}, is now {values['now']!r}"
                found.setdefault(line, []).append(there.name)
    if not found:
        return ""
    number = len({name for names in found.values() for name in names})
    lines = [f"  {line} ({shorten(names, _RUNS_NAMED)})" for line, names in found.items()]
    more = [f"  and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
    head = f"{number} of {len(experiment.runs)} runs of {experiment.name} were made with another recipe than today's:"
    return "\n".join([head, *lines[:_LINES], *more])


def _without_inferred(recipe: Recipe, values: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The values of a recipe by their keys, without what a run infers and records of its data because `recipe` does not
    name it."""
    data, kept = recipe.data, dict(values)
    if data.format is None:
        inferred = ("data.format", "data.chat_template") if data.chat_template is None else ("data.format",)
        kept = {key: value for key, value in kept.items() if not key.startswith(inferred)}
    found = kept.get("data.sources")
    if data.sources is not None and isinstance(found, list) and len(found) == len(data.sources):
        kept["data.sources"] = [
            each if source.format is not None else {key: value for key, value in each.items() if key != "format"}
            for each, source in zip(found, data.sources, strict=True)
        ]
    return kept


def track(experiment: Experiment, report: Report) -> None:
    """Log the report to W&B if the runs report there."""
    run = next((run for run in experiment.runs if "wandb" in run.recipe.tracking.report_to), None)
    if run is not None:
        log_report(report, experiment.name, run.recipe.tracking, parent_of(run))
