"""Carry out an evaluation: run its tasks and write what they found to `evaluation.json`, `summary.json` and W&B."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock, Timeout

from distft.config.evaluation import OF_TASK, TaskName
from distft.config.files import leaves
from distft.config.recipe import Recipe
from distft.console import say
from distft.distributed.collectives import broadcast, together
from distft.distributed.supervisor import OUTCOME
from distft.distributed.world import World
from distft.errors import LaunchError, RunFolderError
from distft.evaluation import summary
from distft.evaluation.engines.openai import without_secrets
from distft.evaluation.request import Request
from distft.evaluation.sets import asked, key_of_set
from distft.evaluation.target import Target, Trained
from distft.evaluation.tasks import load_task
from distft.evaluation.texts import with_texts
from distft.files import to_json, write_atomically
from distft.hardware import describe, visible_devices
from distft.runs.card import write_card
from distft.runs.folder import RunFolder
from distft.runs.wandb import closing_wandb, log_evaluation
from distft.text import shorten

_DAY_S = 24 * 3600
_LISTED = 3
"""Settings that a replaced result names at most."""


def evaluate(words: Sequence[str]) -> dict[str, Any]:
    """Evaluate what `words` ask for, as one of the processes started for it. All ranks call this.

    Work that a killed evaluation finished is reused, item by item.

    Returns:
        The content of `evaluation.json`.

    Raises:
        DistftError: something is missing or does not fit; the message says what.
    """
    # `distft evaluate` has made the preflight checks before it started this process.
    request = Request.of(words, preflight_checks=OUTCOME not in os.environ)
    # At the end of its share a rank may wait long for the others.
    world = replace(World.from_environment(os.environ), timeout_s=_DAY_S)
    devices = visible_devices()
    if devices and world.local_world_size > devices:
        raise LaunchError(f"{world.local_world_size} processes on this machine, but it has {devices} visible GPUs")
    world.export(os.environ)
    lock = _lock(request.folder, world)
    with closing_wandb():
        target = Target.load(request.recipe, request.result, world, Trained.by(request.run))
        record = _known(request.folder, target.identity) if world.is_main else {}
        for task in request.recipe.evaluation.tasks:
            if world.is_main:
                say(f"{task}: {' and '.join(target.sides)} of {request.recipe.model.name}")
            trained = None if target.trained is None else target.trained.recipe
            key = broadcast(set_of(task, request.recipe, trained, record), world)
            result = _run_task(task, key, request, target)
            if world.is_main:
                _record(key, result, record, request.folder)
        if world.is_main:
            log_evaluation(request.recipe, request.folder, _flat(record))
            say(f"results: {request.folder.results}")
    together(world, lambda: None)
    lock.release()
    return record


def _lock(folder: RunFolder, world: World) -> FileLock:
    """The lock on the folder's evaluation, held by rank 0.

    Raises:
        RunFolderError: another process holds it.
    """
    lock = FileLock(folder.evaluation / ".lock")

    def acquire() -> None:
        if world.is_main:
            folder.evaluation.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RunFolderError(f"another process is evaluating {folder.path}; wait for it") from None

    together(world, acquire)
    return lock


def set_of(task: TaskName, recipe: Recipe, trained: Recipe | None, results: Mapping[str, Any]) -> str:
    """The key of the task's results on the recipe's data (see `distft.evaluation.sets`)."""
    found = load_task(task)
    own = None if trained is None else found.own_data(with_texts(trained))
    return key_of_set(task, found.data(recipe), own, recipe.evaluation.name, results)


def _run_task(task: TaskName, key: str, request: Request, target: Target) -> dict[str, Any]:
    """The task's result with what it depends on; `key` is that of its set."""
    data = load_task(task).data(request.recipe)
    began = time.monotonic()
    result = load_task(task).run(target, request.recipe.evaluation, request.folder.evaluation / key)
    return result | {
        "settings": _settings(request.recipe, task),
        "seconds": round(time.monotonic() - began, 3),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "world_size": target.world.world_size,
        "weights": target.identity,
        "data": None if data is None else asdict(data),
        "asked": asked(task, request.recipe),
        "adapter": None if request.result is None else str(request.result),
    }


def _record(task: str, result: dict[str, Any], record: dict[str, Any], folder: RunFolder) -> None:
    """Add a result to `record`, write it, and print it."""
    if (line := replacement(record.get(task), result)) is not None:
        say(f"{task}: {line} ({folder.results})")
    record[task] = result
    write_atomically(folder.results, to_json(record) + "\n")
    if folder.summary.is_file():
        kept = {name: {part: found[part] for part in summary.PARTS if part in found} for name, found in record.items()}
        folder.write_summary(folder.read_summary() | {"evaluation": kept})
        for trained in filter(Path.is_dir, (folder.adapter, folder.model)):
            write_card(folder, trained)
    about = filter(None, [summary.template_line(task, result), summary.overlap_line(task, result)])
    for line in [*about, *summary.figure_lines(task, result), *summary.detail_lines(task, result)]:
        say(line)
    for line in summary.warnings(task, result, str(folder.evaluation / task)):
        say(f"warning: {line}")


def _settings(recipe: Recipe, task: TaskName) -> dict[str, Any]:
    """What the result depends on besides the weights."""
    settings = recipe.evaluation.model_dump()
    if recipe.evaluation.judge.endpoint is not None:
        settings["judge"]["endpoint"] = str(without_secrets(httpx.URL(recipe.evaluation.judge.endpoint)))
    judged = ("generation", "judge") if load_task(task).asks_judge(recipe.evaluation) else ()
    if task != "generation":
        settings["generation"] = {key: value for key, value in settings["generation"].items() if key not in OF_TASK}
    own = {key: settings[key] for key in (task, *judged, "seed", "max_samples") if key in settings}
    return own | {
        "model": recipe.model.name,
        "dtype": recipe.model.dtype,
        "bits": recipe.bits,
        "packages": describe()["packages"],
    }


def _known(folder: RunFolder, weights: Mapping[Any, str]) -> dict[str, Any]:
    """Earlier results for these weights. Those for other weights are set aside, with a message."""
    if not folder.results.is_file():
        return {}
    found = json.loads(folder.results.read_text(encoding="utf-8-sig"))
    kept = {task: result for task, result in found.items() if result["weights"] == weights}
    if others := sorted(found.keys() - kept.keys()):
        aside = folder.results.with_name("evaluation-old.json")
        write_atomically(aside, to_json({task: found[task] for task in others}) + "\n")
        say(f"{', '.join(others)}: {folder.results} has results for other weights, which are now in {aside.name}")
    return kept


def replacement(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """How a task's result differs from the earlier one that it replaces; None if neither settings nor items differ."""
    if before is None:
        return None
    old, new = (dict(leaves(result["settings"])) for result in (before, now))
    changed = [
        f"{key} {_as_json(old.get(key))} → {_as_json(new.get(key))}"
        for key in old | new
        if old.get(key) != new.get(key) and not key.startswith("packages.")
    ]
    was, now_on = (_data_of(result) for result in (before, now))
    if not changed and None not in (was, now_on) and was != now_on:  # a setting that differs says why, if there is one
        changed = [f"data {was} → {now_on}"]
    counts = [_item_count(result) for result in (before, now)]
    if not changed and counts[0] == counts[1]:
        return None
    how = f", with {shorten(changed, _LISTED)}" if changed else ""
    return f"replaces an earlier result on {counts[0]:,} items by one on {counts[1]:,}{how}"


def _data_of(result: Mapping[str, Any]) -> str | None:
    """The digest of the items, with the place of their data."""
    digest = result.get("items_digest")
    return None if digest is None else f"{(result.get('data') or {}).get('place')} ({digest})"


def _item_count(result: Mapping[str, Any]) -> int:
    """The items of a task's first figure, summed over benchmarks if there are several."""
    counts: dict[str, int] = {}
    for _, name, figure in summary.figures({"": result}):
        counts.setdefault(name.rpartition("/")[0] if "/" in name else "", figure["count"] or 0)
    return sum(counts.values())


def _as_json(value: Any) -> str:
    return json.dumps(value, default=str)


def _flat(record: Mapping[str, Any]) -> dict[str, float]:
    """Every figure as `evaluation/<task>/<name>/<side>`, and the bounds of its interval with `_low` and `_high`."""
    found = {}
    for task, result in record.items():
        for name, figure in result["figures"].items():
            for side in ("base", "adapter", "difference"):
                for bound, value in (figure[side] or {}).items():
                    key = f"evaluation/{task}/{name}/{side}"
                    found[key if bound == "value" else f"{key}_{bound}"] = value
    return found
