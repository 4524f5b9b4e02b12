"""What the tasks of an evaluation read from the hub, for `distft fetch`: the judge, IMDB, and the documents of lm-eval's tasks."""

from __future__ import annotations

from distft import hub as training
from distft.config.recipe import Recipe
from distft.errors import DataError
from distft.evaluation.checks import check
from distft.evaluation.judge import as_recipe
from distft.evaluation.tasks import lm_eval
from distft.evaluation.tasks.reviews import source_of

_ROLE = " (the judge)"


def fetch(recipe: Recipe) -> list[str]:
    """Download what `distft evaluate` reads for the tasks that `recipe` names, and return lines that say what lies where.

    Raises:
        ModelError: the judge cannot be had.
        DataError: the data of a task cannot be had.
        RecipeError: a file that a task needs is not given or not there, or a package is not installed.
    """
    check(recipe)
    settings, lines = recipe.evaluation, []
    if _judged(recipe):
        lines += training.fetch_model(as_recipe(recipe, settings.judge), _ROLE)
    source = source_of(recipe)
    if "imdb" in settings.tasks and source is not None:
        lines.append(training.fetch_data(source))
    if "lm_eval" in settings.tasks:
        lm_eval.look(settings.lm_eval)
        lines.append(f"the documents of lm-eval's {', '.join(settings.lm_eval.tasks)}: in the cache of datasets")
    return lines


def missing(recipe: Recipe) -> list[str]:
    """What of that is not there with the hub offline, each in words with the remedy. Uses no network."""
    check(recipe)
    settings, found = recipe.evaluation, []
    if _judged(recipe):
        found += training.missing_model(as_recipe(recipe, settings.judge), _ROLE)
    source = source_of(recipe)
    if "imdb" in settings.tasks and source is not None:
        found += training.missing_data(recipe, source)
    if "lm_eval" in settings.tasks:
        with training.offline():
            try:
                lm_eval.look(settings.lm_eval)
            except DataError as error:
                found.append(f"{str(error).splitlines()[0]}; {training.remedy(recipe)}")
    return found


def _judged(recipe: Recipe) -> bool:
    """Whether a judge is loaded here."""
    return bool({"mt_bench", "alpaca"} & set(recipe.evaluation.tasks)) and recipe.evaluation.judge.endpoint is None
