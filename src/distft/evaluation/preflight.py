"""Find what is wrong with an evaluation before any model is loaded or any run is trained, all of it at once.

Files are read as the tasks will read them, the judge's folder or cache is inspected, and its server is contacted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets.utils.logging import disable_progress_bar
from huggingface_hub import constants

from distft.config.recipe import Recipe
from distft.data.checks import data_faults
from distft.errors import Fault, MissingExtraError, RecipeError, UserError
from distft.evaluation.engines.openai import unreachable
from distft.evaluation.judge import as_recipe, rubric_of
from distft.evaluation.tasks import InputFile, load_task
from distft.hub import missing_model


def check_inputs(recipe: Recipe) -> None:
    """Check that files and packages are there, without reading any.

    Raises:
        RecipeError: a file is not given or does not exist, or a package is not installed.
    """
    if found := missing_inputs(recipe):
        raise RecipeError(found)


def missing_inputs(recipe: Recipe) -> list[Fault]:
    """The files (under their own keys) and packages (under the task's section) that the recipe's tasks lack."""
    tasks = {name: load_task(name) for name in recipe.evaluation.tasks}
    found = [fault for task in tasks.values() for file in task.files for fault in _missing_file(recipe, file)]
    for name, task in tasks.items():
        for module, package in task.packages.items():
            if importlib.util.find_spec(module) is None:
                missing = MissingExtraError(f"the figures of task {name}", package, "eval")
                found.append(Fault(recipe.source.of("evaluation.tasks"), f"evaluation.{name}", str(missing)))
    return found


def faults(recipe: Recipe) -> list[Fault]:
    """What the recipe's tasks lack, apart from the base model and the recipe's own data; empty without tasks.

    Reads files and the hub's caches. Documents of benchmarks are downloaded here if the hub is reachable.
    """
    found = missing_inputs(recipe)
    if not recipe.evaluation.tasks:
        return found
    disable_progress_bar()
    known = {fault.key for fault in found}
    judged = False
    for name in recipe.evaluation.tasks:
        task = load_task(name)
        judged = judged or task.asks_judge(recipe.evaluation)
        for key, read in task.reads(recipe).items():
            if _is_evaluation(key) and not known & {key, f"evaluation.{name}"}:
                found.extend(_faults_of(recipe, key, read))
    if judged:
        found.extend(_judge_faults(recipe))
    return found


def base_faults(recipe: Recipe) -> list[Fault]:
    """What the base model lacks, and the recipe's own data if a task reads it. Training checks both by itself."""
    lines = missing_model(recipe, hub=_is_offline())
    found = [Fault(recipe.source.of("model.name"), "model.name", line) for line in lines]
    if not data_faults(recipe):
        disable_progress_bar()
        for name in recipe.evaluation.tasks:
            for key, read in load_task(name).reads(recipe).items():
                if not _is_evaluation(key):
                    found.extend(_faults_of(recipe, key, read))
    return found


def _missing_file(recipe: Recipe, file: InputFile) -> Iterator[Fault]:
    key = f"evaluation.{file.key}"
    path: Any = recipe
    for part in key.split("."):
        path = getattr(path, part)
    where = recipe.source.of(key)
    if path is None and file.required:
        yield Fault(where, key, f"is required for this task: {file.what}", f"{key}=FILE")
    elif path is not None and not Path(path).expanduser().exists():
        yield Fault(where, key, f"there is no file or folder {path}")


def _is_evaluation(key: str) -> bool:
    return key.startswith("evaluation.")


def _judge_faults(recipe: Recipe) -> Iterator[Fault]:
    judge = recipe.evaluation.judge
    yield from _faults_of(recipe, "evaluation.judge.rubric", lambda: rubric_of(judge))
    if judge.endpoint is not None:
        key, lines = "evaluation.judge.endpoint", unreachable(judge)
        hint = "start the server first, and give its base URL, http://HOST:PORT/v1"
    else:
        key = "evaluation.judge.model"
        lines = missing_model(as_recipe(recipe, judge), " (the judge)", hub=_is_offline())
        hint = "or give its folder, or evaluation.judge.endpoint=http://HOST:PORT/v1 of a server that serves it"
    yield from (Fault(recipe.source.of(key), key, line, hint) for line in lines)


def _faults_of(recipe: Recipe, key: str, read: Callable[[], object]) -> list[Fault]:
    """The `UserError` that `read` raises, as a fault of `key`."""
    try:
        read()
    except UserError as error:
        problem, _, remedy = str(error).partition("\n")
        return [Fault(recipe.source.of(key), key, problem, " ".join(remedy.split()))]
    return []


def _is_offline() -> bool:
    """Whether only the cache can be used. The hub's clients read the setting once, when they are imported."""
    return constants.HF_HUB_OFFLINE
