"""What `distft evaluate` was asked to do: a run folder, or a model and perhaps an adapter, and settings."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distft.config.recipe import Recipe, load_recipe
from distft.config.schema import Run
from distft.config.validation import COMMAND_LINE
from distft.data.checks import data_faults
from distft.data.files import exists, path_of
from distft.data.named_templates import words_of_run
from distft.errors import Fault, LaunchError, ModelError, RunFolderError
from distft.evaluation import preflight
from distft.evaluation.texts import with_texts
from distft.runs.folder import RunFolder

Check = Callable[[Recipe], list[Fault]]
_OTHER_DATA = ("data=", "data.name=", "data.path=", "data.files=", "data.sources=")
_AS_TEXTS = ["objective=sft", "preference=null", "data.format=null"]
_RUNS = Run.model_fields["dir"].default
"""The folder of run folders; no organisation on the hub is meant by its name."""


@dataclass(frozen=True)
class Request:
    """What to evaluate, and where the results go."""

    recipe: Recipe
    folder: RunFolder
    """Takes the results."""
    result: Path | None
    """The folder of the adapter, or of the whole model if all parameters were trained; None to evaluate a base
    alone."""
    run: RunFolder | None = None
    """The run that trained it; None if that is not known."""

    @classmethod
    def of(cls, words: Sequence[str], *, preflight_checks: bool = True) -> Request:
        """Parse `RUN key.path=value …`, or `model=PATH adapter=PATH key.path=value …`.

        With `preflight_checks`, also check everything that the tasks will read or contact, short of loading a model.

        Raises:
            LaunchError: neither a run nor a model is named, or both are.
            RunFolderError: the run has no result, or the folder is not a run folder.
            RecipeError: the recipe or its overrides have faults, or the model or a task lacks something.
        """
        runs = [word for word in words if "=" not in word]
        given = {key: text for key, _, text in (word.partition("=") for word in words) if key in ("model", "adapter")}
        rest = [word for word in words if "=" in word and word.partition("=")[0] not in given]
        if len(runs) + ("model" in given) != 1 or (runs and given):
            raise LaunchError(
                "say what to evaluate: a run folder (runs/NAME), or model=NAME_OR_FOLDER, optionally adapter=FOLDER"
            )
        checks = (preflight.base_faults, preflight.faults) if preflight_checks else ()
        if runs:
            return cls._of_run(Path(runs[0]), rest, (_perplexity_needs_texts, *checks))
        return cls._of_model(given["model"], given.get("adapter"), rest, (_perplexity_needs_data, *checks), checks)

    @classmethod
    def to_talk_to(cls, name: str, words: Sequence[str]) -> Request:
        """What `name` is: a run folder, the folder of an adapter or of a model, or a model on the hub.

        Raises:
            RunFolderError: it is a folder, and none of these.
            RecipeError: the overrides in `words` have faults.
        """
        path = path_of(name)
        if RunFolder(path).recipe.is_file():
            return cls._of_run(path, words, ())
        if (path / "adapter_config.json").is_file():
            run = _run_around(path)
            base = _base_of(path) if run is None else load_recipe(words_of_run(run.recipe, path)).model.name
            return cls._of_model(base, name, words)
        if exists(path) and not (path / "config.json").is_file():
            raise RunFolderError(
                f"{name} is neither a run folder (recipe.yaml is missing) nor the folder of an adapter or a model "
                "(adapter_config.json or config.json)"
            )
        is_run = path.parts[:1] == (_RUNS,) or (path.parent != Path() and exists(path.parent))
        if not exists(path) and is_run:
            raise RunFolderError(_not_a_run(path))
        return cls._of_model(name, None, words)

    @classmethod
    def _of_run(cls, path: Path, words: Sequence[str], checks: Sequence[Check]) -> Request:
        folder = RunFolder(path)
        if not folder.recipe.is_file():
            raise RunFolderError(_not_a_run(path))
        result = next((place for place in (folder.adapter, folder.model) if place.is_dir()), None)
        if result is None:
            raise RunFolderError(f"{path} has neither adapter/ nor model/: {_unfinished(folder)}")
        own = words_of_run(folder.recipe, result)
        if load_recipe(own).prefers and any(word.startswith(_OTHER_DATA) for word in words):
            own += _AS_TEXTS
        return cls(_load([*own, *words], checks), folder, result, folder)

    @classmethod
    def _of_model(
        cls,
        model: str,
        adapter: str | None,
        words: Sequence[str],
        checks_alone: Sequence[Check] = (),
        checks: Sequence[Check] = (),
    ) -> Request:
        """With the recipe of the adapter's run if it lies in one; otherwise the model unquantised, in bf16.

        `checks_alone` are for a model without a run. The results of a checkpoint get a folder of their own, next to
        which those of the run stay as they are.
        """
        result = None if adapter is None else Path(adapter).expanduser()
        if result is not None and not (result / "adapter_config.json").is_file():
            raise RunFolderError(f"{adapter} is not an adapter folder (adapter_config.json is missing)")
        named = f"model.name={json.dumps(model)}"
        run = _run_around(Path(model).expanduser() if result is None else result)
        if result is not None and run is not None:
            recipe = _load([*words_of_run(run.recipe, result), named, *words], checks)
            is_checkpoint = result.resolve().parent != run.path.resolve()
            folder = RunFolder(run.path.with_name(f"evaluate-{run.name}-{result.name}")) if is_checkpoint else run
            return cls(recipe, folder, result, run)
        plain = [
            "recipe=tiny",
            named,
            "model.dtype=bfloat16",
            "quantization=null",
            "training.max_length=1024",
            "tracking.report_to=[]",
        ]
        recipe = _load([*plain, *words], checks_alone)
        name = "-".join(["evaluate", *(Path(part).name for part in (model, adapter) if part)])
        return cls(recipe, RunFolder(Path(recipe.run.dir).expanduser() / name), result, run)


def _run_around(result: Path) -> RunFolder | None:
    """The run whose result or checkpoint `result` is; None if it lies in no run."""
    parents = [*result.resolve().parents][:2] if result.is_dir() else []
    return next((RunFolder(parent) for parent in parents if RunFolder(parent).recipe.is_file()), None)


def _base_of(adapter: Path) -> str:
    """The base that an adapter's settings name; its weights are not read."""
    try:
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8-sig"))
        base = settings.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"the adapter in {adapter} has no usable adapter_config.json: {error}") from error
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"the adapter in {adapter} does not name its base; use distft evaluate model=BASE adapter={adapter}"
        )
    return base


def _not_a_run(path: Path) -> str:
    if path.is_dir():
        return f"{path} is not a run folder (recipe.yaml is missing)"
    siblings = {recipe.parent.name: str(recipe.parent) for recipe in sorted(path.parent.glob("*/recipe.yaml"))}
    if close := difflib.get_close_matches(path.name, siblings, n=1):
        hint = f"did you mean {siblings[close[0]]}?"
    else:
        hint = f"run folders there: {', '.join(siblings.values())}" if siblings else "distft train creates one"
    return f"run folder {path} does not exist ({hint})"


def _unfinished(folder: RunFolder) -> str:
    """Why a run has no result yet, and how to get one."""
    if folder.is_held():
        return "the run has not finished; wait for it"
    started = folder.read_environment()
    command = shlex.join(["distft", "train", *(started.get("command") or ["", f"recipe={folder.recipe}"])[1:]])
    where = started.get("working_folder")
    place = "" if where in (None, str(Path.cwd())) else f" in {where}"
    return f"the run has not finished; resume it with {command}{place}"


def _perplexity_needs_data(recipe: Recipe) -> list[Fault]:
    """A model alone comes without data, and those of the recipe `tiny` are not what the user means."""
    if "perplexity" not in recipe.evaluation.tasks or recipe.source.of("data.name") == COMMAND_LINE:
        return []
    remedy = "data.name=FILE data.format.text=COLUMN, or a data set's name"
    return [Fault(COMMAND_LINE, "data.name", "is required: which text should perplexity be measured on?", remedy)]


def _perplexity_needs_texts(recipe: Recipe) -> list[Fault]:
    """Pairs of answers alone say nothing about what else the model knows."""
    if "perplexity" not in recipe.evaluation.tasks or not recipe.prefers:
        return []
    problem = "has pairs of answers, and perplexity is measured on texts"
    remedy = "name some: data.name=FILE data.format.text=COLUMN, or a data set's name; or choose evaluation.tasks"
    return [Fault(recipe.source.of("data.name"), "data.name", problem, remedy)]


def _load(words: Sequence[str], checks: Sequence[Check]) -> Recipe:
    """Load the recipe, with texts to measure on; perplexity is the task if it names none."""

    def with_task(recipe: Recipe) -> Recipe:
        recipe = with_texts(recipe)
        if recipe.evaluation.tasks:
            return recipe
        section = recipe.evaluation.model_copy(update={"tasks": ["perplexity"]})
        return recipe.model_copy(update={"evaluation": section})

    def faults(recipe: Recipe) -> list[Fault]:
        # Misspelt tasks are dropped before this point; perplexity is not what the user meant then.
        misspelt = not recipe.evaluation.tasks and recipe.source.of("evaluation.tasks") == COMMAND_LINE
        looked_at = with_texts(recipe) if misspelt else with_task(recipe)
        return [fault for check in checks for fault in check(looked_at)]

    return with_task(load_recipe(words, checks=(data_faults, faults)))
