"""`distft.load_recipe`, and turning a recipe with overrides into the words of the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.config.overrides import override_words

if TYPE_CHECKING:
    from distft.config.recipe import Recipe
    from distft.errors import Fault
    from distft.experiments.expand import Experiment


def load_recipe(recipe: str | Path = "tiny", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe with everything resolved, checked as `distft.train` checks it. Loads no weights.

    Args:
        recipe: a name (looked up in `./recipes`, then among the shipped recipes) or the path of a YAML file.
        overrides: values that replace the recipe's, with dotted keys or as nested mappings:
            `{"lora.r": 8, "training": {"max_steps": 50}}`.

    Raises:
        RecipeError: every fault at once.
    """
    return load(recipe_words(recipe, overrides))


def recipe_words(recipe: str | Path, overrides: Mapping[str, Any] | None) -> list[str]:
    return [f"recipe={recipe}", *override_words(overrides or {})]


def load(words: Sequence[str]) -> Recipe:
    """The recipe that the command line's `words` ask for, fully checked.

    Raises:
        RecipeError: every fault at once.
    """
    from distft.config.recipe import load_recipe

    return load_recipe(words, checks=checks())


def load_experiment(words: Sequence[str], repeats: int | None = None) -> Experiment:
    """The experiment that the command line's `words` ask for, with the recipe of every run fully checked.

    Raises:
        ExperimentError: every fault at once.
    """
    from distft.experiments.expand import load_experiment

    return load_experiment(words, checks=checks(), repeats=repeats)


def checks() -> tuple[Callable[[Recipe], list[Fault]], ...]:
    """The checks that need more than the recipe itself: its strategy, its data and its SLURM section."""
    from distft.data.checks import data_faults
    from distft.distributed.strategies import strategy_faults
    from distft.launch.slurm import slurm_faults

    return strategy_faults, data_faults, slurm_faults
