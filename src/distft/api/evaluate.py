"""`distft.evaluate`: measure what a fine-tune changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.api.run import Run
from distft.api.train import check_processes, raise_failure
from distft.config.overrides import override_words
from distft.config.recipe import load_recipe
from distft.console import quiet_libraries

if TYPE_CHECKING:
    from distft.evaluation.request import Request
    from distft.launch.local import Ended


def evaluate(
    run: Run | str | Path | None = None,
    tasks: Sequence[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Evaluate a run, or a model with or without an adapter, on `tasks` and return the result of each task.

    The base and the adapter are measured on the same items. Results are also kept in the run folder, those on different
    data next to each other, and an evaluation that was interrupted continues where it stopped.

    Args:
        run: a run or its folder; or give `model`.
        tasks: names of tasks, as listed by `distft evaluate --help`. Default: those of the recipe.
        overrides: values that replace the recipe's, such as `{"evaluation.max_samples": 100}`.
        model: a model's name on the hub or its folder, if there is no run.
        adapter: the folder of an adapter for `model`.
        processes: how many processes share the work. Default: one per GPU, or one without a GPU.

    Raises:
        UserError: a mistake in the arguments, or something that a task needs is missing.
        Interrupted: a signal stopped the evaluation.
        DistftError: the evaluation failed.
    """
    quiet_libraries()
    named = {"model": model, "adapter": adapter}
    words = [] if run is None else [str(run.path if isinstance(run, Run) else run)]
    words += [f"{key}={value}" for key, value in named.items() if value is not None]
    words += override_words({} if tasks is None else {"evaluation.tasks": list(tasks)})
    words += override_words(overrides or {})
    request, ended = run_evaluation(words, processes)
    raise_failure(ended)
    found = json.loads(request.folder.results.read_text(encoding="utf-8-sig"))
    from distft.evaluation.run import set_of

    trained = None if request.run is None else load_recipe([f"recipe={request.run.recipe.absolute()}"])
    return {task: found[set_of(task, request.recipe, trained, found)] for task in request.recipe.evaluation.tasks}


def run_evaluation(words: Sequence[str], processes: int | None) -> tuple[Request, Ended]:
    """Evaluate what `words` ask for in processes of its own, and return the request and how they ended.

    Raises:
        UserError: a mistake that is found before a process is started.
    """
    from distft.evaluation.request import Request
    from distft.hardware import visible_devices
    from distft.launch.command import EVALUATION
    from distft.launch.local import run
    from distft.launch.node import Node

    request = Request.of(words)
    if processes is None:
        processes = max(visible_devices(), 1)
    check_processes(processes)
    return request, run(words, processes, request.recipe.run.max_restarts, Node(), EVALUATION)
