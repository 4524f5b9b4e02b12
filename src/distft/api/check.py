"""`distft.check`: everything that can be known about a run before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.api.recipe import checks, recipe_words
from distft.api.train import processes_for
from distft.console import quiet_libraries
from distft.errors import Fault, LaunchError, RecipeError

if TYPE_CHECKING:
    from distft.config.recipe import Recipe
    from distft.training.check import Findings


def check(
    recipe: str | Path = "tiny",
    overrides: Mapping[str, Any] | None = None,
    *,
    processes: int | None = None,
    deep: bool = False,
) -> Findings:
    """Check everything about a run of `recipe` that can be known before its weights are loaded.

    Args:
        recipe: a name (looked up in `./recipes`, then among the shipped recipes) or the path of a YAML file.
        overrides: values that replace the recipe's, such as `{"lora.r": 8}`.
        processes: how many processes the run will have. Default: one per GPU, or one without a GPU.
        deep: read and tokenize the data, too, and plan its batches.

    Returns:
        What was checked, what could not be, and what the run will be; `.lines()` is what `distft check` prints.

    Raises:
        RecipeError: every fault at once.
    """
    quiet_libraries()
    return check_words(recipe_words(recipe, overrides), processes=processes, deep=deep)


def check_words(words: Sequence[str], *, processes: int | None = None, deep: bool = False) -> Findings:
    """`check` for the words of a command line.

    Raises:
        RecipeError: every fault at once; if the values themselves have faults, those of the values and the files.
    """
    from distft.training.check import check_data, check_settings

    recipe, found = _load(words)
    count, faults = _processes(recipe, processes)
    found += check_settings(recipe, count, Path.cwd())
    if deep and not found.faults:
        found += check_data(recipe, count)
    return _without_faults(found, faults)


def load_to_run(words: Sequence[str]) -> Recipe:
    """The recipe that `words` ask for, before anything is started for it. Imports no torch.

    Raises:
        RecipeError: the recipe, its files or its folders have faults.
    """
    recipe, found = _load(words)
    found.require()
    return recipe


def _load(words: Sequence[str]) -> tuple[Recipe, Findings]:
    """The recipe that `words` ask for, and what its files and folders look like.

    Raises:
        RecipeError: the recipe has faults; the faults of its files are among them.
    """
    from distft.config.files import related
    from distft.config.recipe import read_recipe
    from distft.training.check import Findings, check_files

    recipe, faults = read_recipe(words, checks=checks())
    found = Findings() if recipe is None else check_files(recipe, Path.cwd())
    if recipe is None or faults:
        known = [fault.key for fault in faults]  # a default replaced these values
        more = [fault for fault in found.faults if not any(related(fault.key, key) for key in known)]
        raise RecipeError([*faults, *more])
    return recipe, found


def _processes(recipe: Recipe, wanted: int | None) -> tuple[int, list[Fault]]:
    """The number of processes to check for, and what is wrong with it. `check_settings` checks the division."""
    try:
        return processes_for(recipe, wanted), []
    except RecipeError:
        return max(wanted or 1, 1), []
    except LaunchError as error:
        return max(wanted or 1, 1), [Fault("command line", "--nproc", str(error))]


def _without_faults(found: Findings, faults: Sequence[Fault]) -> Findings:
    from distft.training.check import Findings

    (found + Findings(faults=tuple(faults))).require()
    return found
