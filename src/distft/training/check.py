"""What can be known about a run before its weights are loaded: `distft check`, and the first thing that a run does.

There are three phases. `load_recipe` finds what is wrong with the values themselves. `check_files` looks at files and
folders, and takes milliseconds. `check_settings` builds what the recipe describes, without weights, and needs torch.

Each check is a function in the package that it concerns, and returns all the faults that it finds. This module calls
them and adds what the user wants to know before a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from distft.config.recipe import Recipe
from distft.data.checks import data_file_faults, split_faults
from distft.distributed.collectives import together
from distft.distributed.world import World
from distft.errors import Fault, RecipeError, UserError
from distft.runs.checks import folder_faults
from distft.text import count

if TYPE_CHECKING:
    from distft.data.prepare import Splits

T = TypeVar("T")


@dataclass(frozen=True)
class Findings:
    """What checks have found: `faults`, and lines for the user.

    `checked` names what is right, `skipped` what could not be checked and why, `run` what the run will be.
    """

    faults: tuple[Fault, ...] = ()
    checked: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    run: tuple[str, ...] = ()

    def __add__(self, other: Findings) -> Findings:
        return Findings(
            self.faults + other.faults,
            self.checked + other.checked,
            self.skipped + other.skipped,
            self.run + other.run,
        )

    def require(self) -> None:
        """Raises RecipeError with all faults, if there are any."""
        if self.faults:
            raise RecipeError(list(dict.fromkeys(self.faults)))

    def lines(self) -> list[str]:
        """One line per finding, for a recipe without faults."""
        groups = (("ok", self.checked), ("not checked", self.skipped), ("run", self.run))
        return [f"{name:<12} {line}" for name, lines in groups for line in lines]


def check_files(recipe: Recipe, working_folder: Path) -> Findings:
    """Look at the files and folders that the recipe names. Imports no torch."""
    missing = data_file_faults(recipe)
    folder = folder_faults(recipe, working_folder)
    checked = [*([] if missing else ["data files"]), *([] if folder else ["run folder"])]
    return Findings(faults=(*missing, *folder), checked=tuple(checked))


def check_settings(recipe: Recipe, processes: int) -> Findings:
    """Build what the recipe describes, without weights and data, as one of `processes` processes will build it."""
    found = _check_division(recipe, processes)
    _, faults = attempt(recipe, "model.name", lambda: _load_tokenizer(recipe))
    return found + Findings(faults=tuple(faults), checked=() if faults else ("tokenizer",))


def check_data(recipe: Recipe, processes: int) -> Findings:
    """Read and tokenize the data, which is cached for the run, and plan its batches."""
    splits, faults = attempt(recipe, "data", lambda: _prepare_data(recipe))
    if splits is None or (faults := split_faults(recipe, splits)):
        return Findings(faults=tuple(faults))
    return Findings(checked=("data: every row",), run=tuple(splits.report.lines()))


def check_together(recipe: Recipe, world: World, working_folder: Path) -> None:
    """Check a run in its processes, before they load anything. Rank 0 looks; all ranks enter, and all raise.

    Raises:
        RecipeError: all faults at once.
    """

    def look() -> None:
        if world.is_main:
            (check_files(recipe, working_folder) + check_settings(recipe, world.world_size)).require()

    together(world, look)


def attempt(recipe: Recipe, key: str, work: Callable[[], T]) -> tuple[T | None, list[Fault]]:
    """The result of `work`; or None and the faults of the UserError that it raised, at `key` unless it names others."""
    try:
        return work(), []
    except RecipeError as error:
        return None, list(error.faults)
    except UserError as error:
        return None, [Fault(recipe.source.of(key), key, str(error))]


def _check_division(recipe: Recipe, processes: int) -> Findings:
    _, faults = attempt(recipe, "batching.micro_batch", lambda: recipe.check_division(processes))
    checked = () if faults else (f"batches: divide over {count(processes, 'process')}",)
    return Findings(faults=tuple(faults), checked=checked)


def _load_tokenizer(recipe: Recipe) -> Any:
    from distft.models.loading import load_tokenizer

    return load_tokenizer(recipe)


def _prepare_data(recipe: Recipe) -> Splits:
    from distft.data.prepare import prepare_data

    return prepare_data(recipe, _load_tokenizer(recipe))
