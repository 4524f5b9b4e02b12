"""`distft.submit`: a SLURM job from a recipe or an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.api.recipe import checks, load_experiment, recipe_words
from distft.config.overrides import override_words
from distft.console import say
from distft.errors import LaunchError, RecipeError

if TYPE_CHECKING:
    from distft.launch.submit import Submission


def submit(
    recipe: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    experiment: str | Path | None = None,
    dry_run: bool = False,
) -> str:
    """Submit `recipe` as a SLURM job that survives preemption, or `experiment` as an array of jobs.

    Args:
        recipe: the name or the path of a recipe.
        overrides: values that replace the recipe's, such as `{"slurm.nodes": 2}`.
        experiment: the name or the path of an experiment instead of a recipe.
        dry_run: submit nothing, and print what is missing as warnings.

    Returns:
        The sbatch script if `dry_run`, otherwise lines that name the submitted jobs.

    Raises:
        RecipeError: every fault of the recipe at once.
        LaunchError: something that the job needs is missing, or SLURM refused it.
    """
    if (recipe is None) == (experiment is None):
        raise LaunchError("give a recipe or an experiment to submit")
    if recipe is not None:
        words = recipe_words(recipe, overrides)
    else:
        words = [f"experiment={experiment}", *override_words(overrides or {})]
    submission = submission_of(words)
    if not dry_run:
        return "\n".join(submission.submit())
    warn(submission)
    submission.check()
    return submission.script


def warn(submission: Submission) -> None:
    """Print what would keep the job from running, or may not be intended."""
    for line in submission.warnings():
        say(f"warning: {line}")


def submission_of(words: list[str]) -> Submission:
    """The submission that the command line's `words` ask for, with the faults of a recipe from which a script can be
    made nevertheless.

    Raises:
        RecipeError: there is no such recipe or experiment, or it has faults that leave no script.
        LaunchError: the words name neither, or the runs of an experiment ask for different resources.
    """
    from distft.config.recipe import read_recipe
    from distft.launch.submit import Submission

    if any(word.startswith("experiment=") for word in words):
        return Submission.of_experiment(load_experiment(words), words)
    if not any(word.startswith("recipe=") for word in words):
        raise LaunchError("nothing to submit: give recipe=NAME or experiment=NAME")
    recipe, faults = read_recipe(words, checks=checks())
    if recipe is None:
        raise RecipeError(faults)
    return Submission.of_recipe(recipe, words, faults)
