"""What several commands share: reading a recipe or an experiment from the words of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from distft.errors import LaunchError

if TYPE_CHECKING:
    from distft.config.recipe import Recipe
    from distft.errors import Fault
    from distft.experiments.expand import Experiment

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `add_subparsers()` returns, for which argparse has no public name."""
RECIPE = "recipe=NAME and any number of key.path=value overrides"


def checks() -> tuple[Callable[[Recipe], list[Fault]], ...]:
    """The checks that need more than the recipe itself: its strategy, its data and its SLURM section."""
    from distft.data.formats import data_faults
    from distft.distributed.strategies import strategy_faults
    from distft.launch.slurm import slurm_faults

    return strategy_faults, data_faults, slurm_faults


def load(words: Sequence[str]) -> Recipe:
    """The recipe that `words` ask for, fully checked.

    Raises:
        RecipeError: every fault at once.
    """
    from distft.config.recipe import load_recipe

    return load_recipe(words, checks=checks())


def load_experiment(words: Sequence[str], repeats: int | None = None) -> Experiment:
    """The experiment that `words` ask for, with every run's recipe fully checked.

    Raises:
        ExperimentError: every fault at once.
    """
    from distft.experiments.expand import load_experiment

    return load_experiment(words, checks=checks(), repeats=repeats)


def is_experiment(words: Sequence[str]) -> bool:
    return any(word.startswith("experiment=") for word in words)


def at_least_one(number: int | None, option: str) -> None:
    """Raises LaunchError for an `option` (`--nproc`, `--repeats`) below 1."""
    if number is not None and number < 1:
        raise LaunchError(f"{option} must be at least 1, got {number}")


def print_files(files: Mapping[str, Path]) -> None:
    """Print the name of each recipe or experiment with the first comment of its file."""
    from distft.config.yaml import first_comment

    for name, path in files.items():
        print(f"{name:<16} {first_comment(path.read_text(encoding='utf-8'))}".rstrip())
