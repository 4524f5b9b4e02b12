"""Experiments: from a YAML file to the runs that it means, each as the arguments of `distft train`.

load_experiment(["experiment=tiny", "training.max_steps=5"])
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from distft.config.files import related
from distft.config.recipe import Recipe, load_recipe
from distft.config.validation import COMMAND_LINE
from distft.config.yaml import first_comment, parse_yaml
from distft.errors import ExperimentError, Fault, RecipeError
from distft.experiments.schema import Budget, Equal, ExperimentFile, find_experiment, read_experiment
from distft.reports.comparability import BY_DEFAULT, LOSS_TOLERANCE

REPEATS = 5
"""Of each recipe, where recipes are compared without a file: so many find a difference of 5% in speed four times out of five with the noise
of short runs on an H200 (2.2% from run to run); three do where it is at most 1.3%. `tests/test_intervals.py` holds that."""
Checks = Iterable[Callable[[Recipe], list[Fault]]]


@dataclass(frozen=True)
class ExperimentRun:
    """One run: `arguments` is what `distft train` takes, `recipe` what they resolve to; `repeat` counts from 1."""

    name: str
    variant: str
    repeat: int
    arguments: tuple[str, ...]
    recipe: Recipe = field(repr=False, compare=False)


@dataclass(frozen=True)
class Experiment:
    """The runs of an experiment in the order in which they are to be made, and what must be equal in them."""

    name: str
    runs: tuple[ExperimentRun, ...]
    equal: tuple[Equal, ...]
    description: str
    path: Path
    loss_tolerance: float = LOSS_TOLERANCE

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.variant for run in self.runs))


@dataclass(frozen=True)
class _Setting:
    """A value that the file gives to a key of the recipe, and its place there (`variants.fsdp.strategy`)."""

    key: str
    value: Any
    place: str


@dataclass(frozen=True)
class _Variant:
    """`place` is where its file would set more; `told` goes behind what is wrong with it where that does not name it."""

    name: str
    recipe: _Setting
    settings: tuple[_Setting, ...]
    place: str
    told: str = ""


def load_experiment(
    arguments: Sequence[str], *, checks: Checks = (), folder: Path | None = None, repeats: int | None = None
) -> Experiment:
    """The experiment that `arguments` (`experiment=NAME key.path=value …`) ask for, or that recipes as they are make (`ddp_qlora
    fsdp_bf16 key.path=value …`): each a variant, REPEATS times, with what BY_DEFAULT names equal. `repeats` overrules the file.

    `experiment=` is a name (searched in `folder`/recipes/experiments, the working folder where it is None, then among the
    shipped ones) or a path. The other arguments apply to every run, after what the file says. `checks` as in `load_recipe`.

    Raises:
        ExperimentError: all faults at once, those of the file and those of the recipes that its runs resolve to.
    """
    folder, checks = folder or Path.cwd(), tuple(checks)
    recipes = [argument for argument in arguments if "=" not in argument]
    wanted, given, faults = _read_arguments([argument for argument in arguments if "=" in argument])
    if recipes and wanted:
        raise ExperimentError(
            [Fault(COMMAND_LINE, "experiment", f"beside recipes ({', '.join(recipes)})", "give one or the other")]
        )
    if recipes:
        path, content = _of_recipes(recipes, folder)
    else:
        path = find_experiment(wanted, folder)
        content = read_experiment(path, faults)
    content = content if repeats is None else content.model_copy(update={"repeats": repeats})
    variants = _variants(content, path, folder, faults)
    faults += _faults_of_budget(content.budget, path)
    found = {(fault.where, fault.key, fault.problem): fault for fault in faults}
    runs = []
    for repeat, variant in itertools.product(range(1, content.repeats + 1), variants):
        name = f"{path.stem}-{variant.name}" + (f"-r{repeat}" if repeat > 1 else "")
        missed: list[Fault] = []
        budget = _budget(content.budget, variant, given, path, folder, missed)
        words = _arguments(variant, (*variant.settings, *budget), given, name, path.stem)
        try:
            recipe = load_recipe(words, checks=checks, folder=folder)
            runs.append(ExperimentRun(name, variant.name, repeat, words, recipe))
        except RecipeError as error:
            known = _faults_of_base(variant, given, checks, folder)
            missed += [fault if fault in known else _placed(fault, variant, given, path) for fault in error.faults]
        for fault in missed:  # one that several points of a grid have is told of the first
            found.setdefault((fault.where, fault.key, fault.problem.removesuffix(variant.told)), fault)
    faults = [*found.values()] or _clashes([run.name for run in runs], path)
    if faults:
        raise ExperimentError([_of_command_line(fault, path) for fault in faults] if recipes else faults)
    description = "recipes as they are" if recipes else first_comment(path.read_text(encoding="utf-8"))
    return Experiment(path.stem, tuple(runs), tuple(content.equal), description, path, content.loss_tolerance)


# From the file and the command line to variants ------------------------------------------------------------------------


def _read_arguments(arguments: Sequence[str]) -> tuple[str, dict[str, str], list[Fault]]:
    """The experiment's name, the arguments for every run by their keys, and what is wrong with them."""
    given: dict[str, str] = {}
    for argument in arguments:
        key = argument.partition("=")[0]
        given.pop(key, None)
        given[key] = argument
    refused = {
        "recipe": "an experiment names its recipes itself; copy its file into recipes/experiments to change them",
        "run.name": "each run is named after the experiment and its variant; run.dir=FOLDER keeps runs apart",
    }
    of_file = {"budget": "training.max_steps=N is a budget of all runs as well", "repeats": "--repeats N"}
    for key in [key for key in given if key.partition(".")[0] in ExperimentFile.model_fields]:
        refused[key] = of_file.get(
            key.partition(".")[0], "copy the experiment's file into recipes/experiments to change it"
        )
    faults = [Fault(COMMAND_LINE, key, "is not set here", refused[key]) for key in refused if given.pop(key, None)]
    return given.pop("experiment", "").partition("=")[2], given, faults


def _of_recipes(recipes: Sequence[str], folder: Path) -> tuple[Path, ExperimentFile]:
    """What a file would say that names `recipes` alone, and what it would be called."""
    names = [Path(recipe).stem for recipe in recipes]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise ExperimentError([Fault(COMMAND_LINE, name, "is named twice", "give each recipe once; --repeats says how often each runs")
                               for name in sorted(doubled)])  # fmt: skip
    variants: dict[str, dict[str, Any] | None] = {
        name: {"recipe": recipe} for name, recipe in zip(names, recipes, strict=True)
    }
    return folder / "-".join(names), ExperimentFile(variants=variants, repeats=REPEATS, equal=list(BY_DEFAULT))


def _variants(content: ExperimentFile, path: Path, folder: Path, faults: list[Fault]) -> list[_Variant]:
    where = str(path)
    if bool(content.variants) == bool(content.grid) and not faults:
        faults.append(
            Fault(where, "variants", "give variants or grid, " + ("not both" if content.grid else "one of them"))
        )
    shared, found = [*_settings(content.overrides, "overrides")], []
    base = None if content.base is None else _Setting("recipe", _recipe(content.base, path, folder), "base")
    for name, overrides in content.variants.items():
        place, changes = f"variants.{name}", dict(overrides or {})
        own = changes.pop("recipe", None)
        recipe = base if own is None else _Setting("recipe", _recipe(str(own), path, folder), f"{place}.recipe")
        if recipe is None:
            faults.append(Fault(where, place, "names no recipe, and there is no base", "add base: RECIPE"))
        else:
            found.append(_Variant(name, recipe, (*shared, *_settings(changes, place)), place))
    if content.grid and base is None:
        faults.append(Fault(where, "base", "is required with a grid and not set", "the recipe that is varied"))
    for point in itertools.product(*(_axis(key, values, where, faults) for key, values in content.grid.items())):
        if content.grid and base is not None:
            name = "-".join(name for name, _ in point)
            chosen = tuple(setting for _, settings in point for setting in settings)
            found.append(_Variant(name, base, (*shared, *chosen), "grid", f", with {name}"))
    if not found and base is not None:  # there are no runs, and what is wrong with the base is told all the same
        found.append(_Variant("base", base, tuple(shared), "overrides"))
    refused, valid = _refused(content), []
    for variant in found:
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", variant.name):
            settings = tuple(setting for setting in variant.settings if setting.key not in refused)
            valid.append(replace(variant, settings=settings))
        else:
            faults.append(Fault(where, variant.place, f"{variant.name!r} cannot be part of a run's name",
                                "a letter first, then letters, digits, '.', '_' and '-'"))  # fmt: skip
        faults += [
            Fault(where, s.place, "is not set here", refused[s.key]) for s in variant.settings if s.key in refused
        ]
    return valid


def _recipe(wanted: str, path: Path, folder: Path) -> str:
    """A recipe as `distft train` finds it from `folder`: a path in a file is meant from there."""
    if not ("/" in wanted or wanted.endswith((".yaml", ".yml"))):
        return wanted
    target = (path.parent / Path(wanted).expanduser()).resolve()
    return f"./{target.relative_to(folder.resolve())}" if target.is_relative_to(folder.resolve()) else str(target)


def _settings(tree: Mapping[str, Any], place: str) -> Iterator[_Setting]:
    for key, value in tree.items():
        yield from _leaves(str(key), value, f"{place}.{key}")


def _leaves(key: str, value: Any, place: str) -> Iterator[_Setting]:
    """The values of nested mappings, so that they change a section and do not replace it."""
    if isinstance(value, dict) and value and all("." not in str(name) for name in value):  # `layers.0` is no path
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item, f"{place}.{name}")
    else:
        yield _Setting(key, value, place)


def _axis(key: str, values: Any, where: str, faults: list[Fault]) -> list[tuple[str, list[_Setting]]]:
    """The points of one axis of a grid: their names, and what each sets."""
    place = f"grid.{key}"
    if isinstance(values, list) and values and not any(isinstance(value, dict) for value in values):
        return [(_value_name(key, value), [_Setting(key, value, place)]) for value in values]
    if isinstance(values, dict) and values and all(isinstance(changes, dict) for changes in values.values()):
        return [(str(name), [*_settings(changes, f"{place}.{name}")]) for name, changes in values.items()]
    faults.append(
        Fault(where, place, "expected a list of values of that key, or a mapping of names to what they change")
    )
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
    """Keys that the experiment sets by itself, so that its file does not, and why."""
    refused = {
        "recipe": "base names a recipe, or recipe in a variant",
        "run.name": "each run is named after the experiment and its variant",
        "tracking.group": "the runs are a group of the experiment's name",
    }
    if content.budget is not None:
        refused |= dict.fromkeys(("training.max_steps", "training.num_train_epochs", "run.train_time"),
                                 "budget says how long every run trains; leave one of them out")  # fmt: skip
    return refused


def _clashes(names: Sequence[str], path: Path) -> list[Fault]:
    """Names of runs that are one, or that one name gets when it is in use: `tiny-a-2` of `tiny-a`."""
    known, faults = set(names), []
    for name in known:
        stem, _, number = name.rpartition("-")
        if names.count(name) > 1 or (number.isdigit() and stem in known):
            other = "another variant's" if names.count(name) > 1 else f"the next run of {stem}"
            faults.append(
                Fault(str(path), "", f"the run {name} would be taken for {other}", "give its variant another name")
            )
    return sorted(faults, key=str)


# From variants to the arguments of runs ---------------------------------------------------------------------------------


def _arguments(
    variant: _Variant, settings: Iterable[_Setting], given: Mapping[str, str], name: str, group: str
) -> tuple[str, ...]:
    """What `distft train` takes. The last of a key holds, and a section that is set anew comes before its keys."""
    words = {"recipe": f"recipe={variant.recipe.value}"}
    own = [(s.key, f"{s.key}={_text(s.value)}") for s in settings]
    for key, word in (*own, ("tracking.group", f"tracking.group={_text(group)}"), *given.items()):
        words.pop(key, None)
        words[key] = word
    tracked = words.pop("tracking.group")
    return (*words.values(), f"run.name={name}", tracked)


def _text(value: Any) -> str:
    """`value` as an override that is read back as the same."""
    try:
        if isinstance(value, str) and parse_yaml(value) == value:
            return value
    except ValueError:
        pass
    return json.dumps(value, ensure_ascii=False)  # JSON is YAML on one line


def _asked(budget: Budget | None) -> dict[str, Any]:
    return {} if budget is None else {key: value for key, value in budget.model_dump().items() if value is not None}


def _faults_of_budget(budget: Budget | None, path: Path) -> list[Fault]:
    asked = _asked(budget)
    if budget is None or len(asked) == 1:
        return []
    expected = f"expected one of {', '.join(Budget.model_fields)}, got {' and '.join(asked) or 'none'}"
    return [Fault(str(path), "budget", expected)]


def _budget(
    budget: Budget | None, variant: _Variant, given: Mapping[str, str], path: Path, folder: Path, faults: list[Fault]
) -> list[_Setting]:
    """The override that the budget means; a fault where none means exactly that."""
    asked = _asked(budget)
    if len(asked) != 1:
        return []
    ((kind, amount),) = asked.items()
    place = f"budget.{kind}"

    def refuse(problem: str, hint: str = "") -> list[_Setting]:
        faults.append(Fault(str(path), place, problem + variant.told, hint))
        return []

    if kind == "minutes":
        seconds = Fraction(str(amount)) * 60
        if seconds.denominator != 1:
            return refuse(f"{amount} minutes are no whole number of seconds")
        minutes, rest = divmod(int(seconds), 60)
        days, hours = divmod(minutes // 60, 24)
        clock = f"{hours:02}:{minutes % 60:02}:{rest:02}"
        return [_Setting("run.train_time", f"{days}-{clock}" if days else clock, place)]
    if kind in ("samples", "tokens"):
        try:
            words = _arguments(variant, variant.settings, given, path.stem, path.stem)
            batching = load_recipe(words, folder=folder).batching
        except RecipeError:
            return []  # what is wrong is found with the run itself
        size = batching.global_batch_size if kind == "samples" else batching.global_batch_tokens
        if size is None and kind == "samples":
            return refuse("a global batch counted in tokens holds no fixed number of samples", "give steps or tokens")
        if size is None:
            return refuse(
                "a global batch counted in samples holds no fixed number of tokens",
                "give steps or samples, or count the batch by batching.global_batch_tokens",
            )
        if kind == "tokens" and amount < size:
            return refuse(f"{amount} tokens are less than a global batch of {size}")
        if kind == "samples" and amount % size:
            below = amount // size * size
            near = f"{below} or {below + size}" if below else str(size)
            return refuse(f"{amount} samples are no whole number of global batches of {size}", near)
        amount //= size
    return [_Setting("training.max_steps", amount, place)]


# Faults of recipes, said of the experiment ------------------------------------------------------------------------------


def _faults_of_base(variant: _Variant, given: Mapping[str, str], checks: Checks, folder: Path) -> frozenset[Fault]:
    """The faults that the variant's recipe has without the experiment."""
    try:
        load_recipe([f"recipe={variant.recipe.value}", *given.values()], checks=checks, folder=folder)
    except RecipeError as error:
        return frozenset(fault for fault in error.faults if fault.key != "recipe")
    return frozenset()


def _of_command_line(fault: Fault, path: Path) -> Fault:
    """A fault of an experiment without a file, said of the recipe that the command line names."""
    if fault.where != str(path):
        return fault
    return replace(fault, where=COMMAND_LINE, key=fault.key.removeprefix("variants.").removesuffix(".recipe"))


def _placed(fault: Fault, variant: _Variant, given: Mapping[str, str], path: Path) -> Fault:
    """A fault of a run's recipe, with the place in the experiment that it comes from, or where that would mend it."""
    key = fault.key
    if fault.where == COMMAND_LINE and any(related(key, name) for name in given):
        return fault
    places = {s.key: s.place for s in (variant.recipe, *variant.settings) if related(key, s.key)}
    if fault.where != COMMAND_LINE or not places:
        return Fault(str(path), f"{variant.place}.{key}", fault.problem + variant.told, fault.hint)
    setting = key if key in places else list(places)[-1]
    below = key.removeprefix(setting) if key.startswith(setting) else ""
    return Fault(str(path), places[setting] + below, fault.problem, fault.hint)
