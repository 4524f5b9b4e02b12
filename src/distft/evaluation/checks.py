"""The files and packages that an evaluation needs, seen without reading any of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from distft.config.recipe import Recipe
from distft.errors import Fault, MissingExtraError, RecipeError


def check(recipe: Recipe) -> None:
    """Look at what the tasks of `recipe.evaluation` need.

    Raises:
        RecipeError: a file that a task needs is not given or not there, or a package is not installed; all of them at once.
    """
    if found := faults(recipe):
        raise RecipeError(found)


def faults(recipe: Recipe) -> list[Fault]:
    """What the tasks of `recipe.evaluation` lack of files, each under its own key, and of packages, under the task's section."""
    settings, found = recipe.evaluation, []

    def need_file(key: str, path: str | None, what: str) -> None:
        where = recipe.source.of(f"evaluation.{key}")
        if path is None:
            found.append(
                Fault(where, f"evaluation.{key}", f"is required for this task: {what}", f"evaluation.{key}=FILE")
            )
        elif not Path(path).expanduser().exists():
            found.append(Fault(where, f"evaluation.{key}", f"there is no file or folder {path}"))

    if "mt_bench" in settings.tasks:
        need_file("mt_bench.questions", settings.mt_bench.questions, "a file of questions in MT-Bench's format")
    if "alpaca" in settings.tasks:
        need_file("alpaca.path", settings.alpaca.path, "instructions and outputs in AlpacaEval's format")
    if "imdb" in settings.tasks and settings.imdb.path is not None:
        need_file("imdb.path", settings.imdb.path, "reviews with classes")
    if "lm_eval" in settings.tasks and settings.lm_eval.include_path is not None:
        need_file("lm_eval.include_path", settings.lm_eval.include_path, "a folder of task files")
    for task, module, package in (("imdb", "sklearn", "scikit-learn"), ("lm_eval", "lm_eval", "lm-eval")):
        if task in settings.tasks and importlib.util.find_spec(module) is None:
            missing = MissingExtraError(f"the task {task}'s figures", package, "eval")
            found.append(Fault(recipe.source.of("evaluation.tasks"), f"evaluation.{task}", str(missing)))
    return found
