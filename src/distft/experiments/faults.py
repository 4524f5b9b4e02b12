"""Faults in the recipes of an experiment's runs, reported where the experiment can fix them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from distft.config.files import related
from distft.config.recipe import Recipe, load_recipe
from distft.config.validation import COMMAND_LINE
from distft.errors import Fault, RecipeError
from distft.experiments.variants import Variant

Checks = Iterable[Callable[[Recipe], list[Fault]]]


def faults_of_base(variant: Variant, given: Mapping[str, str], checks: Checks, folder: Path) -> frozenset[Fault]:
    """The faults that the variant's recipe has without the experiment."""
    try:
        load_recipe([f"recipe={variant.recipe.value}", *given.values()], checks=checks, folder=folder)
    except RecipeError as error:
        return frozenset(fault for fault in error.faults if fault.key != "recipe")
    return frozenset()


def of_command_line(fault: Fault, path: Path) -> Fault:
    """A fault of an experiment without a file, reported of the recipe that the command line names."""
    if fault.where != str(path):
        return fault
    return replace(fault, where=COMMAND_LINE, key=fault.key.removeprefix("variants.").removesuffix(".recipe"))


def placed(fault: Fault, variant: Variant, given: Mapping[str, str], path: Path) -> Fault:
    """A fault of a run's recipe, with the place in the experiment that causes it or could fix it."""
    key = fault.key
    if fault.where == COMMAND_LINE and any(related(key, name) for name in given):
        return fault
    places = {
        setting.key: setting.place for setting in (variant.recipe, *variant.settings) if related(key, setting.key)
    }
    if fault.where != COMMAND_LINE or not places:
        return Fault(str(path), f"{variant.place}.{key}", fault.problem + variant.suffix, fault.hint)
    setting = key if key in places else list(places)[-1]
    below = key.removeprefix(setting) if key.startswith(setting) else ""
    return Fault(str(path), places[setting] + below, fault.problem, fault.hint)
