"""From what an experiment's file says to its variants: each a recipe and the values that it changes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distft.config.overrides import override_leaves, override_text
from distft.errors import Fault
from distft.experiments.schema import ExperimentFile


@dataclass(frozen=True)
class Setting:
    """A value that the file gives to a recipe's key, and its place in the file (`variants.fsdp.strategy`)."""

    key: str
    value: Any
    place: str


@dataclass(frozen=True)
class Variant:
    """A recipe and the values that change it.

    `place` is where the file would set more of them. `suffix` ends the messages about a point of a grid, whose place
    does not name it.
    """

    name: str
    recipe: Setting
    settings: tuple[Setting, ...]
    place: str
    suffix: str = ""


def variants_of(content: ExperimentFile, path: Path, folder: Path, faults: list[Fault]) -> list[Variant]:
    """The variants of an experiment, without those that have faults, which are added to `faults`."""
    where = str(path)
    if bool(content.variants) == bool(content.grid) and not faults:
        choice = "not both" if content.grid else "one of them"
        faults.append(Fault(where, "variants", f"give variants or grid, {choice}"))
    shared = tuple(_settings(content.overrides, "overrides"))
    base = None if content.base is None else Setting("recipe", _recipe(content.base, path, folder), "base")
    found = [*_named(content, path, folder, base, shared, faults), *_points(content, where, base, shared, faults)]
    if not found and base is not None:  # there are no runs, but faults of the base are reported all the same
        found.append(Variant("base", base, shared, "overrides"))
    refused, valid = _refused(content), []
    for variant in found:
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", variant.name):
            settings = tuple(setting for setting in variant.settings if setting.key not in refused)
            valid.append(replace(variant, settings=settings))
        else:
            rule = "start with a letter; then letters, digits, '.', '_' and '-'"
            faults.append(Fault(where, variant.place, f"{variant.name!r} cannot be part of a run's name", rule))
        faults += [
            Fault(where, setting.place, "cannot be set here", refused[setting.key])
            for setting in variant.settings
            if setting.key in refused
        ]
    return valid


def _named(
    content: ExperimentFile,
    path: Path,
    folder: Path,
    base: Setting | None,
    shared: tuple[Setting, ...],
    faults: list[Fault],
) -> Iterator[Variant]:
    for name, overrides in content.variants.items():
        place, changes = f"variants.{name}", dict(overrides or {})
        own = changes.pop("recipe", None)
        recipe = base if own is None else Setting("recipe", _recipe(str(own), path, folder), f"{place}.recipe")
        if recipe is None:
            faults.append(Fault(str(path), place, "names no recipe, and there is no base", "add base: RECIPE"))
        else:
            yield Variant(name, recipe, (*shared, *_settings(changes, place)), place)


def _points(
    content: ExperimentFile, where: str, base: Setting | None, shared: tuple[Setting, ...], faults: list[Fault]
) -> Iterator[Variant]:
    if not content.grid:
        return
    if base is None:
        faults.append(Fault(where, "base", "is required with a grid and not set", "the recipe to vary"))
    axes = [_axis(key, values, where, faults) for key, values in content.grid.items()]
    for point in itertools.product(*axes):
        if base is not None:
            name = "-".join(name for name, _ in point)
            chosen = tuple(setting for _, settings in point for setting in settings)
            yield Variant(name, base, (*shared, *chosen), "grid", f", with {name}")


def _recipe(wanted: str, path: Path, folder: Path) -> str:
    """A recipe as `distft train` finds it from `folder`; a path in the file is relative to the file."""
    if not ("/" in wanted or wanted.endswith((".yaml", ".yml"))):
        return wanted
    target = (path.parent / Path(wanted).expanduser()).resolve()
    return f"./{target.relative_to(folder.resolve())}" if target.is_relative_to(folder.resolve()) else str(target)


def _settings(tree: Mapping[str, Any], place: str) -> Iterator[Setting]:
    """The values of nested mappings one by one, so that they change a section and do not replace it."""
    for key, value in override_leaves(tree):
        yield Setting(key, value, f"{place}.{key}")


def _axis(key: str, values: Any, where: str, faults: list[Fault]) -> list[tuple[str, list[Setting]]]:
    """The points of one axis of a grid: the name of each, and what it sets."""
    place = f"grid.{key}"
    if isinstance(values, list) and values and not any(isinstance(value, dict) for value in values):
        return [(_value_name(key, value), [Setting(key, value, place)]) for value in values]
    if isinstance(values, dict) and values and all(isinstance(changes, dict) for changes in values.values()):
        return [(str(name), [*_settings(changes, f"{place}.{name}")]) for name, changes in values.items()]
    expected = "expected a list of values of that key, or a mapping of names to what they change"
    faults.append(Fault(where, place, expected))
    return []


def _value_name(key: str, value: Any) -> str:
    leaf = key.rpartition(".")[2]
    if value is None or isinstance(value, bool):
        return leaf if value else f"no-{leaf}"
    if isinstance(value, int | float):
        return f"{leaf}{value}"
    text = "_".join(map(str, value)) if isinstance(value, list) else str(value).rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)


def _refused(content: ExperimentFile) -> dict[str, str]:
    """Keys that the experiment sets by itself, so that its file must not, and why."""
    refused = {
        "recipe": "base names a recipe, or recipe in a variant",
        "run.name": "each run is named after the experiment and its variant",
        "tracking.group": "the runs are a group with the experiment's name",
    }
    if content.seeds:
        refused["run.seed"] = "seeds sets that of each repeat; remove one of them"
    if content.budget is not None:
        why = "budget sets how long every run trains; remove one of them"
        refused |= dict.fromkeys(("training.max_steps", "training.num_train_epochs", "run.train_time"), why)
    return refused


def run_arguments(
    variant: Variant, settings: Iterable[Setting], given: Mapping[str, str], name: str, group: str
) -> tuple[str, ...]:
    """The arguments of `distft train` for a run. The last value of a key wins; a section comes before its own keys."""
    words = {"recipe": f"recipe={variant.recipe.value}"}
    own = [(setting.key, f"{setting.key}={override_text(setting.value)}") for setting in settings]
    for key, word in (*own, ("tracking.group", f"tracking.group={override_text(group)}"), *given.items()):
        words.pop(key, None)
        words[key] = word
    tracked = words.pop("tracking.group")
    return (*words.values(), f"run.name={name}", tracked)
