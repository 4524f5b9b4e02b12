"""`distft.compare`: run recipes or an experiment here, and report on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distft.api.recipe import load_experiment
from distft.api.report import Report
from distft.config.overrides import override_words
from distft.console import quiet_libraries
from distft.errors import LaunchError


def compare(
    *recipes: str | Path,
    experiment: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    processes: int | None = None,
    repeats: int | None = None,
    resume: bool = False,
) -> Report:
    """Run every recipe, or every variant of an experiment, one run at a time, and report on the runs.

    Each run is a process of its own, so one that fails leaves the others alone. Repeats take turns. The report also
    goes to `runs/<experiment>.md`, `.json` and `.html`.

    Args:
        recipes: names or paths of the recipes to compare.
        experiment: the name or the path of an experiment instead.
        overrides: values that apply to every run.
        processes: processes for each run whose strategy is not `single`. Default: one per GPU, or 2 without a GPU.
        repeats: repeats of each variant. Default: what the experiment says, or 5.
        resume: run only what has no result yet.

    Raises:
        ExperimentError: every fault of the experiment and its recipes at once.
        RunFolderError: runs of this experiment exist and `resume` is off, or were made with other recipes.
        Interrupted: a signal came. With `resume` the same call makes the remaining runs.
    """
    quiet_libraries()
    from distft.experiments.compare import Comparison

    check_counts(processes, repeats)
    words = experiment_words(recipes, experiment, overrides)
    return Report(Comparison(load_experiment(words, repeats), processes).run(resume=resume))


def check_counts(processes: int | None, repeats: int | None) -> None:
    """Raises LaunchError unless both are None or at least 1."""
    for number, what in ((processes, "processes"), (repeats, "repeats")):
        if number is not None and number < 1:
            raise LaunchError(f"the number of {what} must be at least 1, got {number}")


def experiment_words(
    recipes: Sequence[str | Path], experiment: str | Path | None, overrides: Mapping[str, Any] | None
) -> list[str]:
    named = [] if experiment is None else [f"experiment={experiment}"]
    return [*map(str, recipes), *named, *override_words(overrides or {})]
