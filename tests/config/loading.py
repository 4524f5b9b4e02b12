"""Load recipes with every check of the command line, and look at their values and faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.config.recipe import Recipe, load_recipe
from distft.data.checks import data_faults
from distft.distributed.strategies import strategy_faults
from distft.errors import Fault, RecipeError
from distft.paths import packaged

RECIPES = packaged("recipes")
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(*arguments: str, folder: Path | None = None) -> Recipe:
    return load_recipe(arguments, checks=(strategy_faults, data_faults), folder=folder)


def faults(*arguments: str, folder: Path | None = None) -> dict[str, Fault]:
    """The faults by key; a test that looks for one sees the others as well."""
    with pytest.raises(RecipeError) as caught:
        load(*arguments, folder=folder)
    found = caught.value.faults
    assert len({fault.key for fault in found}) == len(found), f"one key has two faults: {caught.value}"
    return {fault.key: fault for fault in found}


def value(recipe: Recipe, key: str) -> Any:
    found: Any = recipe.model_dump()
    for part in key.split("."):
        found = found[part]
    return found


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
