"""The evaluation tasks, one per module, and how to add one.

A new task `x` takes two edits in the source:

1. `distft/config/evaluation.py`: add `x` to `TaskName` and, with its line for `distft evaluate --help`, to `TASKS`. If
   the task has settings, add a section class for them and a field `x` to `Evaluation`.
2. `distft/evaluation/tasks/x.py`: subclass `Task`, write its `run`, and bind an instance to `TASK`.

Then regenerate `recipes/recipe.schema.json` (`distft recipes schema > recipes/recipe.schema.json`), add a row to the
table of tasks in `docs/evaluation.md` (a test asks for it), and write a test.

Everything else follows from what the class declares: `distft evaluate` runs the task and records its result, preflight
finds missing files and packages, `distft fetch` downloads its data, and reports show its figures. Optionally,
`FIGURES` in `distft/runs/figures.py` gives a figure a column of its own in the comparison of runs, and `_PRESENTATION`
in `distft/evaluation/summary.py` chooses what the headline names.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from distft.evaluation.sets import DataOf

if TYPE_CHECKING:
    from distft.config.evaluation import Evaluation, TaskName
    from distft.config.recipe import Recipe
    from distft.evaluation.target import Target


@dataclass(frozen=True)
class InputFile:
    """A file that a task reads, named by the key under `evaluation` that holds its path."""

    key: str
    what: str
    required: bool = True


class Task(ABC):
    """One kind of evaluation, of a base and what was trained on it."""

    files: ClassVar[tuple[InputFile, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}
    """Modules that the task imports and that not every installation has, each with the package that contains it."""
    judged: ClassVar[bool] = False
    """Whether a judge rates the answers. If so, the judge is checked and fetched, and its settings are recorded."""

    def asks_judge(self, settings: Evaluation) -> bool:
        """Whether a judge rates the answers under these settings."""
        return self.judged

    @abstractmethod
    def run(self, target: Target, settings: Evaluation, folder: Path) -> dict[str, Any]:
        """Measure every side of `target`. All ranks call this, and all get the same result, which must be JSON.

        The result has `figures`: a mapping of names to figures, each from `distft.evaluation.metrics`. It may have the
        other parts that `distft.evaluation.summary` shows (`PARTS`), and anything else worth keeping in
        `evaluation.json`. Raw outputs go to `folder`, which belongs to the task, through `distft.evaluation.cache`, so
        that an interrupted evaluation resumes.

        Raises:
            DistftError: the task cannot be carried out.
        """

    def data(self, recipe: Recipe) -> DataOf | None:
        """What the task measures on, or None if the recipe does not say; results on other data are kept apart."""
        return DataOf.held_out(recipe)

    def own_data(self, trained: Recipe) -> DataOf | None:
        """What the recipe of the training names as the task's data; None if it names none."""
        return self.data(trained)

    def reads(self, recipe: Recipe) -> Mapping[str, Callable[[], object]]:
        """Functions that read the task's inputs, by the key of the recipe to blame if one raises a `UserError`.

        Preflight calls them before any model is loaded.
        """
        return {}

    def fetch(self, recipe: Recipe) -> list[str]:
        """Download what the task reads from the hub; return a line for each download.

        Raises:
            DataError: the download failed.
        """
        return []

    def not_fetched(self, recipe: Recipe) -> list[str]:
        """A line with the remedy for each input that is not in the cache. Uses no network."""
        return []


def load_task(name: TaskName) -> Task:
    """The task of that name. Its module is imported only now: some tasks import libraries that take seconds."""
    task: Task = importlib.import_module(f"distft.evaluation.tasks.{name}").TASK
    return task
