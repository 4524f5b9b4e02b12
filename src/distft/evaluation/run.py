"""From a run folder, or a model and an adapter, to what its tasks found: in `evaluation/`, `evaluation.json`, `summary.json` and W&B."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock, Timeout

from distft.config.evaluation import TaskName
from distft.config.recipe import Recipe, load_recipe
from distft.config.validation import COMMAND_LINE
from distft.console import say
from distft.data.formats import data_faults
from distft.distributed.collectives import together
from distft.distributed.supervisor import OUTCOME
from distft.distributed.world import World
from distft.errors import Fault, LaunchError, RunFolderError
from distft.evaluation import preflight as ready
from distft.evaluation import summary as details
from distft.evaluation.columns import figures, shown
from distft.evaluation.engines.openai import without_secrets
from distft.evaluation.target import Target
from distft.files import to_json, write_atomically
from distft.hardware import describe, visible_devices
from distft.reports.results import leaves
from distft.runs.folder import RunFolder
from distft.runs.wandb import closing_wandb, log_evaluation

_DAY_S = 24 * 3600
_NAMED = 3
"""So many settings that differ are named."""
Check = Callable[[Recipe], list[Fault]]


@dataclass(frozen=True)
class Request:
    """What `distft evaluate` was asked for. `folder` takes the results; `result` holds the adapter or the model that was trained, None
    for a base alone."""

    recipe: Recipe
    folder: RunFolder
    result: Path | None

    @classmethod
    def of(cls, words: Sequence[str], *, look: bool = True) -> Request:
        """From `RUN key.path=value …`, or `model=PATH adapter=PATH key.path=value …`. With `look` all is looked at that a task will
        read or ask, short of loading a model.

        Raises:
            LaunchError: neither a run nor a model is named, or both are.
            RunFolderError: the run has no result, or the folder is none.
            RecipeError: the recipe and its overrides have faults, or the model or a task lacks something.
        """
        runs = [word for word in words if "=" not in word]
        given = {key: text for key, _, text in (word.partition("=") for word in words) if key in ("model", "adapter")}
        rest = [word for word in words if "=" in word and word.partition("=")[0] not in given]
        if len(runs) + ("model" in given) != 1 or (runs and given):
            raise LaunchError(
                "say what to evaluate: a run folder (runs/NAME), or model=NAME_OR_FOLDER and perhaps adapter=FOLDER"
            )
        checks = (ready.faults_of_base, ready.faults) if look else ()
        if runs:
            return cls._of_run(Path(runs[0]), rest, checks)
        return cls._of_model(given["model"], given.get("adapter"), rest, checks)

    @classmethod
    def _of_run(cls, path: Path, words: Sequence[str], checks: Sequence[Check]) -> Request:
        folder = RunFolder(path)
        if not folder.recipe.is_file():
            raise RunFolderError(_no_run(path))
        result = next((place for place in (folder.adapter, folder.model) if place.is_dir()), None)
        if result is None:
            raise RunFolderError(f"{path} holds neither adapter/ nor model/: {_unfinished(folder)}")
        return cls(_recipe([f"recipe={_as_path(folder.recipe)}", *words], checks), folder, result)

    @classmethod
    def _of_model(cls, model: str, adapter: str | None, words: Sequence[str], checks: Sequence[Check]) -> Request:
        """The recipe is that of the run that the adapter lies in; else the model as it comes, in bf16."""
        result = None if adapter is None else Path(adapter).expanduser()
        if result is not None and not (result / "adapter_config.json").is_file():
            raise RunFolderError(f"{adapter} holds no adapter (adapter_config.json is missing)")
        named = f"model.name={json.dumps(model)}"
        if result is not None and RunFolder(result.parent).recipe.is_file():
            folder = RunFolder(result.parent)
            return cls(_recipe([f"recipe={_as_path(folder.recipe)}", named, *words], checks), folder, result)
        plain = ["recipe=tiny", named, "model.dtype=bfloat16", "quantization=null", "training.max_length=1024",
                 "tracking.report_to=[]"]  # fmt: skip
        name = "-".join(["evaluate", *(Path(part).name for part in (model, adapter) if part)])
        recipe = _recipe([*plain, *words], (_text_is_named, *checks))
        return cls(recipe, RunFolder(Path(recipe.run.dir).expanduser() / name), result)


def _as_path(file: Path) -> str:
    return str(file if file.is_absolute() else Path.cwd() / file)


def _no_run(path: Path) -> str:
    """What is said of a folder that is none of a run."""
    if path.is_dir():
        return f"{path} is no run folder (recipe.yaml is missing)"
    beside = {folder.parent.name: str(folder.parent) for folder in sorted(path.parent.glob("*/recipe.yaml"))}
    close = difflib.get_close_matches(path.name, beside, n=1)
    there = f"there are: {', '.join(beside.values())}" if beside else "distft train makes one"
    hint = f"did you mean {beside[close[0]]}?" if close else there
    return f"{path} is no run folder: there is no such folder ({hint})"


def _unfinished(folder: RunFolder) -> str:
    """Why a run has no result yet, and what brings it one."""
    if folder.is_held():
        return "the run has not finished; wait for it"
    started = folder.read_environment()
    command = shlex.join(["distft", "train", *(started.get("command") or ["", f"recipe={folder.recipe}"])[1:]])
    where = started.get("working_folder")
    place = f", started in {where}," if where not in (None, str(Path.cwd())) else ""
    return f"the run has not finished; {command}{place} goes on with it"


def _text_is_named(recipe: Recipe) -> list[Fault]:
    """A bare model comes without data, and those of the recipe `tiny` are none that anybody asked for."""
    if "perplexity" not in recipe.evaluation.tasks or recipe.source.of("data.name") == COMMAND_LINE:
        return []
    return [Fault(COMMAND_LINE, "data.name", "is required: of which text is the perplexity",
                  "data.name=FILE data.format.text=COLUMN, or a data set's name")]  # fmt: skip


def _recipe(words: Sequence[str], checks: Sequence[Check]) -> Recipe:
    def with_task(recipe: Recipe) -> Recipe:
        if recipe.evaluation.tasks:
            return recipe
        section = recipe.evaluation.model_copy(update={"tasks": ["perplexity"]})
        return recipe.model_copy(update={"evaluation": section})

    def found(recipe: Recipe) -> list[Fault]:
        # Tasks that are misspelt are none here, and perplexity is not what was meant.
        misspelt = not recipe.evaluation.tasks and recipe.source.of("evaluation.tasks") == COMMAND_LINE
        return [fault for check in checks for fault in check(recipe if misspelt else with_task(recipe))]

    return with_task(load_recipe(words, checks=(data_faults, found)))


def evaluate(words: Sequence[str]) -> dict[str, Any]:
    """Do what `words` ask for, as one of the processes that were started; returns what `evaluation.json` holds. All ranks enter.

    What an evaluation that was killed had finished is found again, item by item.

    Raises:
        DistftError: something is missing or does not fit; the message says what.
    """
    # What `distft evaluate` has looked at before it started this process is there.
    request = Request.of(words, look=OUTCOME not in os.environ)
    # A rank may wait long for the others at the end of its share.
    world = replace(World.from_environment(os.environ), timeout_s=_DAY_S)
    devices = visible_devices()
    if devices and world.local_world_size > devices:
        raise LaunchError(f"{world.local_world_size} processes on this machine, but it has {devices} visible GPUs")
    world.export(os.environ)
    folder, settings = request.folder, request.recipe.evaluation
    lock = FileLock(folder.evaluation / ".lock")

    def claim() -> None:
        if world.is_main:
            folder.evaluation.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RunFolderError(f"another process is evaluating {folder.path}; wait for it") from None

    together(world, claim)
    with closing_wandb():
        target = Target.load(request.recipe, request.result, world)
        record = _known(folder, target.identity) if world.is_main else {}
        for task in settings.tasks:
            if world.is_main:
                say(f"{task}: {' and '.join(target.sides)} of {request.recipe.model.name}")
            began = time.monotonic()
            result = _task(task).run(target, settings, folder.evaluation / task)
            if world.is_main:
                result |= {
                    "settings": _settings(request.recipe, task), "seconds": round(time.monotonic() - began, 3),
                    "time": datetime.now(UTC).isoformat(timespec="seconds"), "world_size": world.world_size,
                    "weights": target.identity, "adapter": None if request.result is None else str(request.result),
                }  # fmt: skip
                if (line := replaced(record.get(task), result)) is not None:
                    say(f"{task}: {line} ({folder.results})")
                record[task] = result
                _write(folder, record)
                for line in [*lines(task, result), *details.lines(task, result)]:
                    say(line)
                for line in details.warnings(task, result, str(folder.evaluation / task)):
                    say(f"warning: {line}")
        if world.is_main:
            log_evaluation(request.recipe, folder, _flat(record))
            say(f"results: {folder.results}")
    together(world, lambda: None)
    lock.release()
    return record


def _task(name: TaskName) -> Any:
    """The module of a task; it comes when it is asked for, for lm-eval takes seconds to import."""
    return importlib.import_module(f"distft.evaluation.tasks.{name}")


def _settings(recipe: Recipe, task: TaskName) -> dict[str, Any]:
    """What the result depends on besides the weights."""
    settings = recipe.evaluation.model_dump()
    if recipe.evaluation.judge.endpoint is not None:
        settings["judge"]["endpoint"] = str(without_secrets(httpx.URL(recipe.evaluation.judge.endpoint)))
    judged = ("generation", "judge") if task in ("mt_bench", "alpaca") else ()
    own = {key: settings[key] for key in (task, *judged, "seed", "max_samples") if key in settings}
    return own | {
        "model": recipe.model.name,
        "dtype": recipe.model.dtype,
        "bits": recipe.bits,
        "packages": describe()["packages"],
    }


def _known(folder: RunFolder, weights: Mapping[Any, str]) -> dict[str, Any]:
    """What tasks have found here before with these weights; a task that runs again replaces its own."""
    if not folder.results.is_file():
        return {}
    found = json.loads(folder.results.read_text(encoding="utf-8"))
    kept = {task: result for task, result in found.items() if result["weights"] == weights}
    if others := found.keys() - kept.keys():
        say(
            f"{', '.join(sorted(others))}: what {folder.results} has is of other weights, and is left out of it from now on"
        )
    return kept


def replaced(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """In words that a task's result takes the place of one of other settings; None where it does not."""
    if before is None:
        return None
    settings = [dict(leaves(result["settings"])) for result in (before, now)]
    differing = [
        f"{key} {_as_yaml(settings[0].get(key))} → {_as_yaml(settings[1].get(key))}"
        for key in settings[0] | settings[1]
        if settings[0].get(key) != settings[1].get(key) and not key.startswith("packages.")
    ]
    counts = [_items(result) for result in (before, now)]
    if not differing and counts[0] == counts[1]:
        return None
    how = f", with {', '.join(differing[:_NAMED])}{' and more' if len(differing) > _NAMED else ''}" if differing else ""
    return f"replaces an earlier result on {counts[0]:,} items by one on {counts[1]:,}{how}"


def _items(result: Mapping[str, Any]) -> int:
    """Of how many items a task's result is: those of its first figure, over all benchmarks where there are several."""
    counts: dict[str, int] = {}
    for _, name, figure in figures({"": result}):
        counts.setdefault(name.rpartition("/")[0] if "/" in name else "", figure["count"] or 0)
    return sum(counts.values())


def _as_yaml(value: Any) -> str:
    return json.dumps(value, default=str)


def _write(folder: RunFolder, record: Mapping[str, Any]) -> None:
    write_atomically(folder.results, to_json(record) + "\n")
    if folder.summary.is_file():
        found = {
            task: {part: result[part] for part in details.PARTS if part in result} for task, result in record.items()
        }
        folder.write_summary(folder.read_summary() | {"evaluation": found})


def _flat(record: Mapping[str, Any]) -> dict[str, float]:
    """Every figure under `evaluation/<task>/<name>/<side>`, and its bounds."""
    found = {}
    for task, result in record.items():
        for name, figure in result["figures"].items():
            for side in ("base", "adapter", "difference"):
                for bound, value in (figure[side] or {}).items():
                    key = f"evaluation/{task}/{name}/{side}"
                    found[key if bound == "value" else f"{key}_{bound}"] = value
    return found


def lines(task: str, result: Mapping[str, Any]) -> list[str]:
    """What a user wants to read of a task's result."""
    found = []
    for _, _, figure in figures({task: result}):
        sides = [
            f"{side} {shown(figure[side], figure['form'])}"
            for side in ("base", "adapter", "difference")
            if figure[side]
        ]
        verdict = f" ({figure['verdict']})" if figure["verdict"] else ""
        found.append(f"{task}: {figure['title']}: {', '.join(sides)}{verdict}")
    return found
