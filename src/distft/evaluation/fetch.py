"""`distft fetch` for evaluations: the judge, and what the tasks read from the hub."""

from __future__ import annotations

from distft import hub
from distft.config.recipe import Recipe
from distft.evaluation.judge import as_recipe
from distft.evaluation.preflight import check_inputs
from distft.evaluation.tasks import load_task

_ROLE = " (the judge)"


def fetch(recipe: Recipe) -> list[str]:
    """Download what `distft evaluate` reads for the recipe's tasks; return a line for each download.

    Raises:
        ModelError: the judge cannot be downloaded.
        DataError: the data of a task cannot be downloaded.
        RecipeError: a file is not given or does not exist, or a package is not installed.
    """
    check_inputs(recipe)
    lines = hub.fetch_model(as_recipe(recipe, recipe.evaluation.judge), _ROLE) if _has_local_judge(recipe) else []
    return lines + [line for name in recipe.evaluation.tasks for line in load_task(name).fetch(recipe)]


def missing(recipe: Recipe) -> list[str]:
    """What `fetch` would still have to download, each with the remedy. Uses no network."""
    check_inputs(recipe)
    lines = hub.missing_model(as_recipe(recipe, recipe.evaluation.judge), _ROLE) if _has_local_judge(recipe) else []
    return lines + [line for name in recipe.evaluation.tasks for line in load_task(name).not_fetched(recipe)]


def _has_local_judge(recipe: Recipe) -> bool:
    settings = recipe.evaluation
    return settings.judge.endpoint is None and any(load_task(name).asks_judge(settings) for name in settings.tasks)
