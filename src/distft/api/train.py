"""`distft.train`: one call from a recipe to a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.api.recipe import recipe_words
from distft.api.run import Run
from distft.console import quiet_libraries
from distft.errors import DistftError, Interrupted, LaunchError

if TYPE_CHECKING:
    from distft.config.recipe import Recipe
    from distft.launch.local import Ended


def train(
    recipe: str | Path = "tiny", overrides: Mapping[str, Any] | None = None, *, processes: int | None = None
) -> Run:
    """Train `recipe` on this machine and return the finished run. Blocks until training has ended.

    A single process trains in the calling process; several are started with accelerate's launcher, and what they print
    appears where this process prints. Ctrl-C (in a notebook: interrupt) saves a checkpoint and raises Interrupted; the
    same call then goes on from it.

    Args:
        recipe: a name (looked up in `./recipes`, then among the shipped recipes) or the path of a YAML file.
        overrides: values that replace the recipe's, with dotted keys or as nested mappings:
            `{"training.max_steps": 20, "lora": {"r": 8}}`.
        processes: how many processes to train with. Default: one per GPU, or one without a GPU.

    Raises:
        UserError: a mistake in the recipe, the data, the model or the machine; found before any weights are loaded,
            where possible.
        Interrupted: a signal or `run.max_time` stopped the run.
        DistftError: the run failed.
    """
    from distft.api.check import load_to_run

    quiet_libraries()
    words = recipe_words(recipe, overrides)
    loaded = load_to_run(words)
    processes = processes_for(loaded, processes)
    if processes == 1:
        from distft.api.in_process import train_here

        return Run(train_here(words, loaded.run.max_restarts))
    from distft.launch.local import run
    from distft.launch.node import Node

    ended = run(words, processes, loaded.run.max_restarts, Node())
    raise_failure(ended)
    assert ended.folder is not None
    return Run(ended.folder)


def processes_for(recipe: Recipe, wanted: int | None, nodes: int = 1) -> int:
    """How many processes to start on this machine, `wanted` if given.

    Raises:
        LaunchError: there are not enough GPUs for them.
        RecipeError: the global batch does not divide over them.
    """
    from distft.hardware import visible_devices

    devices = visible_devices()
    processes = wanted
    if processes is None:
        processes = 1 if recipe.strategy == "single" else max(devices, 1)
    check_processes(processes)
    if devices and processes > devices:
        raise LaunchError(f"{processes} processes need {processes} GPUs, and this machine has {devices}")
    recipe.check_division(processes * nodes)
    return processes


def check_processes(processes: int) -> None:
    """Raises LaunchError unless `processes` is at least 1."""
    if processes < 1:
        raise LaunchError(f"the number of processes must be at least 1, got {processes}")


def raise_failure(ended: Ended) -> None:
    """Raise the error of a run whose processes failed, with the message that they printed.

    Raises:
        DistftError: of the class that the processes met.
    """
    if ended.code == 0:
        return
    if ended.error is not None:
        raise ended.error
    if ended.code == Interrupted.exit_code:
        raise Interrupted("a signal")
    raise DistftError(f"the processes ended with exit code {ended.code} and gave no reason; see their output")
