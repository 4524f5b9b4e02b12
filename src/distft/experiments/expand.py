"""Experiments: from a YAML file to its runs, each as the arguments of `distft train`.

load_experiment(["experiment=tiny", "training.max_steps=5"])
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distft.config.adapter import absolute
from distft.config.files import folder_name
from distft.config.recipe import Recipe, load_recipe
from distft.config.validation import COMMAND_LINE
from distft.config.yaml import first_comment
from distft.errors import ExperimentError, Fault, RecipeError
from distft.experiments.budget import budget_faults, budget_settings
from distft.experiments.faults import Checks, faults_of_base, of_command_line, placed
from distft.experiments.schema import Equal, ExperimentFile, find_experiment, read_experiment
from distft.experiments.variants import Setting, Variant, run_arguments, variants_of
from distft.reports.comparability import BY_DEFAULT, LOSS_TOLERANCE

REPEATS = 5
"""Repeats of each recipe if recipes are compared without an experiment's file.

With the noise of short runs on an H200 (2.2% from run to run), 5 repeats find a 5% difference in speed four times out
of five; 3 repeats do if the noise is at most 1.3%. `tests/test_stats.py` checks this."""


@dataclass(frozen=True)
class ExperimentRun:
    """One run: `arguments` for `distft train`, and the `recipe` they resolve to. `repeat` counts from 1."""

    name: str
    variant: str
    repeat: int
    arguments: tuple[str, ...]
    recipe: Recipe = field(repr=False, compare=False)

    @property
    def folder(self) -> Path:
        """Where `distft train` will put it."""
        return Path(absolute(self.recipe.run.dir)) / self.name


@dataclass(frozen=True)
class Experiment:
    """The runs of an experiment in the order in which to make them, and what must be equal in them."""

    name: str
    runs: tuple[ExperimentRun, ...]
    equal: tuple[Equal, ...]
    description: str
    path: Path
    loss_tolerance: float = LOSS_TOLERANCE
    seeds: bool = False
    target_loss: float | Literal["worst"] | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.variant for run in self.runs))


def load_experiment(
    arguments: Sequence[str], *, checks: Checks = (), folder: Path | None = None, repeats: int | None = None
) -> Experiment:
    """Load the experiment that `arguments` ask for: `experiment=NAME key.path=value …`, or several recipes.

    Recipes (`ddp_qlora fsdp_bf16 key.path=value …`) become variants of an experiment with REPEATS repeats, in which
    everything in BY_DEFAULT must be equal.

    Args:
        arguments: `experiment=` is a name (looked up in `folder`/recipes/experiments, then among the shipped ones) or a
            path. Overrides apply to every run, after what the file says.
        checks: as in `load_recipe`.
        folder: default: the working folder.
        repeats: replaces the file's value.

    Raises:
        ExperimentError: all faults at once, those of the file and those of the recipes of its runs.
    """
    folder, checks = folder or Path.cwd(), tuple(checks)
    recipes = [argument for argument in arguments if "=" not in argument]
    wanted, given, faults = _read_arguments([argument for argument in arguments if "=" in argument])
    if recipes and wanted:
        problem = f"cannot be combined with recipes ({', '.join(recipes)})"
        raise ExperimentError([Fault(COMMAND_LINE, "experiment", problem, "give one or the other")])
    if recipes:
        path, content = _of_recipes(recipes, folder)
    else:
        path = find_experiment(wanted, folder)
        content = read_experiment(path, faults)
    number = repeats or len(content.seeds) or content.repeats
    faults += _seed_faults(content, number, given, path)
    variants = variants_of(content, path, folder, faults)
    faults += budget_faults(content.budget, path)
    found = {(fault.where, fault.key, fault.problem): fault for fault in faults}
    runs: list[ExperimentRun] = []
    for repeat, variant in itertools.product(range(1, number + 1), variants):
        name = f"{folder_name(path.stem)}-{variant.name}" + (f"-r{repeat}" if repeat > 1 else "")
        missed: list[Fault] = []
        budget = budget_settings(content.budget, variant, given, path, folder, missed)
        seed = [Setting("run.seed", each, "seeds") for each in content.seeds[repeat - 1 : repeat]]
        made = {run.variant: run for run in runs if run.repeat == repeat}
        settings, own = _on_adapters((*variant.settings, *budget, *seed), given, variants, made, path, missed)
        words = run_arguments(variant, settings, own, name, path.stem)
        planned = {run.folder: run.recipe for run in made.values()}
        try:
            recipe = load_recipe(words, checks=checks, folder=folder, planned=planned)
            runs.append(ExperimentRun(name, variant.name, repeat, words, recipe))
        except RecipeError as error:
            known = faults_of_base(variant, given, checks, folder)
            missed += [fault if fault in known else placed(fault, variant, given, path) for fault in error.faults]
        for fault in missed:  # one that several points of a grid share is reported for the first
            found.setdefault((fault.where, fault.key, fault.problem.removesuffix(variant.suffix)), fault)
    faults = [*found.values()] or _clashes([run.name for run in runs], path)
    if faults:
        raise ExperimentError([of_command_line(fault, path) for fault in faults] if recipes else faults)
    description = "recipes as they are" if recipes else first_comment(path.read_text(encoding="utf-8"))
    return Experiment(
        folder_name(path.stem),
        tuple(runs),
        tuple(content.equal),
        description,
        path,
        content.loss_tolerance,
        bool(content.seeds),
        content.target_loss,
    )


def _on_adapters(
    settings: Sequence[Setting],
    given: Mapping[str, str],
    variants: Sequence[Variant],
    made: Mapping[str, ExperimentRun],
    path: Path,
    faults: list[Fault],
) -> tuple[list[Setting], Mapping[str, str]]:
    """The settings of a run and the overrides for it, in which `adapter: VARIANT` is the folder of the run of that
    variant in the same repeat, among those `made` before."""
    names, found, own = [variant.name for variant in variants], [], given
    for setting in settings:
        if setting.key == "adapter" and setting.value in made:
            own = {key: word for key, word in given.items() if key != "adapter"}
            start = made[setting.value]
            setting = replace(setting, value=str(Path(start.recipe.run.dir) / start.name))
        elif setting.key == "adapter" and setting.value in names:
            hint = f"list {setting.value} before it"
            faults.append(Fault(str(path), setting.place, f"{setting.value} has no run before this one", hint))
        found.append(setting)
    return found, own


def _seed_faults(content: ExperimentFile, number: int, given: Mapping[str, str], path: Path) -> list[Fault]:
    """What is wrong with the seeds of `number` repeats."""
    if not content.seeds:
        return []
    found = []
    if "repeats" in content.model_fields_set:
        found.append(Fault(str(path), "seeds", "and repeats both say how often each variant runs", "remove repeats"))
    if twice := sorted({seed for seed in content.seeds if content.seeds.count(seed) > 1}):
        found.append(Fault(str(path), "seeds", f"has {twice[0]} twice, which would be the same run"))
    if number > len(content.seeds):
        problem = f"{number} repeats need as many seeds, and the experiment has {len(content.seeds)}"
        found.append(Fault(COMMAND_LINE, "--repeats", problem, f"add seeds in {path.name}"))
    if "run.seed" in given:
        hint = "copy the experiment's file into recipes/experiments to change its seeds"
        found.append(Fault(COMMAND_LINE, "run.seed", "cannot be set here: each repeat has a seed of its own", hint))
    return found


def _read_arguments(arguments: Sequence[str]) -> tuple[str, dict[str, str], list[Fault]]:
    """The experiment's name, the overrides for every run by their keys, and the faults among them."""
    given: dict[str, str] = {}
    for argument in arguments:
        key = argument.partition("=")[0]
        given.pop(key, None)
        given[key] = argument
    refused = {
        "recipe": "an experiment names its recipes itself; copy its file into recipes/experiments to change them",
        "run.name": "each run is named after the experiment and its variant; run.dir=FOLDER keeps sets of runs apart",
    }
    hints = {"budget": "training.max_steps=N sets a budget for all runs", "repeats": "use --repeats N"}
    for key in [key for key in given if key.partition(".")[0] in ExperimentFile.model_fields]:
        edit = "copy the experiment's file into recipes/experiments to change it"
        refused[key] = hints.get(key.partition(".")[0], edit)
    faults = [Fault(COMMAND_LINE, key, "cannot be set here", refused[key]) for key in refused if given.pop(key, None)]
    return given.pop("experiment", "").partition("=")[2], given, faults


def _of_recipes(recipes: Sequence[str], folder: Path) -> tuple[Path, ExperimentFile]:
    """The name and the content of an experiment's file that would compare `recipes`."""
    names = [Path(recipe).stem for recipe in recipes]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        hint = "give each recipe once; --repeats sets how often each runs"
        raise ExperimentError([Fault(COMMAND_LINE, name, "is named twice", hint) for name in doubled])
    variants: dict[str, dict[str, Any] | None] = {
        name: {"recipe": recipe} for name, recipe in zip(names, recipes, strict=True)
    }
    return folder / "-".join(names), ExperimentFile(variants=variants, repeats=REPEATS, equal=list(BY_DEFAULT))


def _clashes(names: Sequence[str], path: Path) -> list[Fault]:
    """Run names that occur twice, or that another run gets if its name is taken: `tiny-a-2` is the next `tiny-a`."""
    known, faults = set(names), []
    for name in known:
        stem, _, number = name.rpartition("-")
        if names.count(name) > 1 or (number.isdigit() and stem in known):
            other = "another variant's" if names.count(name) > 1 else f"the next run of {stem}"
            problem = f"the run {name} would be mistaken for {other}"
            faults.append(Fault(str(path), "", problem, "rename its variant"))
    return sorted(faults, key=str)
