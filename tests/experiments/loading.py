"""Experiments that the tests write into a folder and load from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.data.checks import data_faults
from distft.distributed.strategies import strategy_faults
from distft.errors import ExperimentError, Fault
from distft.experiments.expand import Experiment, load_experiment

CHECKS = (strategy_faults, data_faults)


def write(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / "recipes" / "experiments" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, *overrides: str, name: str = "mine") -> Experiment:
    return load_experiment([f"experiment={name}", *overrides], checks=CHECKS, folder=folder)


def faults(folder: Path, text: str, *overrides: str) -> list[Fault]:
    """The faults of an experiment with this text, all said of its file unless of the command line."""
    path = write(folder, text)
    with pytest.raises(ExperimentError) as caught:
        load(folder, *overrides)
    assert {fault.where for fault in caught.value.faults} <= {str(path), "command line"}
    return list(caught.value.faults)


def value(recipe: Any, key: str) -> Any:
    found = recipe.model_dump()
    for part in key.split("."):
        found = found[part]
    return found
