"""Academic benchmarks by lm-evaluation-harness, base against adapter: what was gained, what was forgotten, and what is chance.

The model is handed to lm-eval as it is loaded, the adapter on it through PEFT. Every process takes its share of the documents.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from distft import upstream_api
from distft.config.evaluation import Evaluation, LmEval
from distft.config.validation import nearest
from distft.distributed.world import World
from distft.errors import DataError
from distft.evaluation.metrics import Estimate, apart_in_pairs, compared
from distft.evaluation.target import SideName, Target

Results = Mapping[str, Any]


def run(target: Target, settings: Evaluation, folder: Path) -> dict[str, Any]:
    """lm-eval's tasks for both sides, with its own result files in `folder`/<side>/. All ranks enter.

    What was answered already is found in its caches of answers, one a side, rank and adapter.

    `look` says beforehand whether lm-eval has the tasks.
    """
    section = settings.lm_eval
    found: dict[SideName, Results] = {side: _evaluate(target, side, settings, folder) for side in target.sides}
    result: dict[str, Any] = {}
    if target.world.is_main:
        result = {
            "figures": figures(found), "tasks": section.tasks, "limit": section.limit, "seed": settings.seed,
            "results": {side: results["results"] for side, results in found.items()},
            "versions": found["base"]["versions"], "num_fewshot": found["base"]["n-shot"],
        }  # fmt: skip
    shared = [result]
    if target.world.world_size > 1:
        distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def _manager(section: LmEval) -> Any:
    return _index(None if section.include_path is None else str(Path(section.include_path).expanduser()))


@functools.cache
def _index(include_path: str | None) -> Any:
    """lm-eval's tasks by their names: it reads thousands of files for it."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def look(section: LmEval) -> None:
    """Load the tasks once, so that what is missing is said before the model works.

    Raises:
        DataError: lm-eval does not know a task, or its documents cannot be had.
    """
    manager = _manager(section)
    unknown = [name for name in section.tasks if name not in manager.all_tasks]
    if unknown:
        near = "; ".join(hint for name in unknown if (hint := nearest(name, manager.all_tasks)))
        raise DataError(
            f"lm-eval knows no task {', '.join(unknown)}{f' ({near})' if near else ''}; `lm-eval ls tasks` lists them, and evaluation.lm_eval.include_path=FOLDER adds yours"
        )
    try:
        manager.load(section.tasks)
    except (
        Exception
    ) as error:  # datasets, the hub client and YAML raise many kinds; all mean that the task cannot be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"a task of {', '.join(section.tasks)} cannot be loaded: {reason}\n"
            "  its documents come from the hub: distft fetch, with the same words, on a machine with a connection, or give task files with "
            "local documents (evaluation.lm_eval.include_path)"
        ) from error


def _evaluate(target: Target, side: SideName, settings: Evaluation, folder: Path) -> Results:
    """lm-eval's results of one side on rank 0, {} on the others."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    section, seed = settings.lm_eval, settings.seed
    place = folder / side
    place.mkdir(parents=True, exist_ok=True)
    tracker = EvaluationTracker(output_path=str(place))
    with target.side(side) as model:
        results = simple_evaluate(
            model=_lm(model, target.tokenizer, target.world, section), tasks=list(section.tasks), num_fewshot=section.num_fewshot,
            limit=section.limit, task_manager=_manager(section), log_samples=True, evaluation_tracker=tracker,
            use_cache=str(folder / "answers" / f"{side}-{target.identity[side]}-{section.max_length or 'all'}"),
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    if results is None:
        return {}
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    return {**results, "samples": samples}


def _lm(model: Any, tokenizer: Any, world: World, section: LmEval) -> Any:
    """lm-eval's view of a loaded model, as one of the processes of `world`: by itself lm-eval takes such a model for one process."""
    from lm_eval.models.huggingface import HFLM

    class Shared(HFLM):  # type: ignore[misc]
        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            if world.world_size == 1:
                return tensor
            parts: list[Any] = [None] * world.world_size
            distributed.all_gather_object(parts, tensor.cpu())
            return torch.stack(parts)

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            if world.world_size == 1:
                return [obj]
            parts: list[Any] = [None] * world.world_size
            distributed.all_gather_object(parts, obj)
            return parts if world.rank == dst else None

        def barrier(self) -> None:
            if world.world_size > 1:
                distributed.barrier()

    lm = Shared(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=section.batch_size,
        max_length=section.max_length,
        backend="causal",
    )
    upstream_api.set_lm_eval_rank(lm, world.rank, world.world_size)
    return lm


def figures(found: Mapping[SideName, Results]) -> dict[str, Any]:
    """Every metric of every task and group, both sides, and their difference over pairs of the same document where the metric is a mean
    over documents (Newcombe's interval where each is right or wrong, else Student's); else as that of two independent figures. Those of a group's parts are marked as `detail`, which reports leave out."""
    base, adapter = found["base"], found.get("adapter")
    made: dict[str, Any] = {}
    parts = {leaf for below in base.get("group_subtasks", {}).values() for leaf in below}
    for task, values in base["results"].items():
        for key in values:
            name, _, chosen = key.partition(",")
            if not chosen or name.endswith("_stderr") or not isinstance(values[key], int | float):
                continue
            sides = [_estimate(results, task, name, chosen) for results in (base, adapter) if results]
            pairs = None if adapter is None else _difference(base, adapter, task, name, chosen, sides[0], sides[1])
            title = f"{task}: {name}" + ("" if chosen == "none" else f" ({chosen})")
            higher = base["higher_is_better"].get(task, {}).get(name, True)
            made[f"{task}/{name}" + ("" if chosen == "none" else f"/{chosen}")] = compared(
                sides[0], sides[1] if len(sides) > 1 else None, pairs, title=title, better="lower" if higher is False else "higher",
                count=_count(base, task),
            ) | ({"detail": True} if task in parts else {})  # fmt: skip
    return made


def _estimate(results: Results, task: str, name: str, chosen: str) -> Estimate:
    """lm-eval's figure; its interval from lm-eval's standard error, or Wilson's where the figure is the share of right documents."""
    figures = results["results"][task]
    value, error = float(figures[f"{name},{chosen}"]), figures.get(f"{name}_stderr,{chosen}")
    documents = [*(_values(results, task, name, chosen) or {}).values()]
    if documents and set(documents) <= {0.0, 1.0} and abs(value - float(np.mean(documents))) < 1e-9:
        return Estimate.proportion(value, len(documents))
    return Estimate.normal(value, error) if isinstance(error, int | float) else Estimate(value, math.nan, math.nan)


def _leaves(results: Results, task: str) -> list[str]:
    """The tasks of a group, those of its groups as well; of a task, itself."""
    below: Sequence[str] = results.get("group_subtasks", {}).get(task, [])
    return [leaf for name in below for leaf in _leaves(results, name)] if below else [task]


def _count(results: Results, task: str) -> int:
    return sum(
        int(results["n-samples"][leaf]["effective"]) for leaf in _leaves(results, task) if leaf in results["n-samples"]
    )


def _values(results: Results, task: str, name: str, chosen: str) -> dict[tuple[str, Any], float] | None:
    """The metric of each document; None where it is no number."""
    found: dict[tuple[str, Any], float] = {}
    for leaf in _leaves(results, task):
        for sample in results["samples"].get(leaf, []):
            if sample["filter"] != chosen:
                continue
            value = sample.get(name)
            if not isinstance(value, int | float | np.floating | np.integer):
                return None
            found[leaf, sample["doc_id"]] = float(value)
    return found or None


def _difference(
    base: Results, adapter: Results, task: str, name: str, chosen: str, one: Estimate, other: Estimate
) -> Estimate:
    values, others = _values(base, task, name, chosen), _values(adapter, task, name, chosen)
    if values is not None and others is not None and values.keys() == others.keys() and len(values) > 1:
        differences = np.array([others[document] - values[document] for document in values])
        means = float(np.mean([*values.values()])), float(np.mean([*others.values()]))
        if np.allclose(means, (one.value, other.value), rtol=0, atol=1e-6):
            if set(values.values()) | set(others.values()) <= {0.0, 1.0}:
                sides = (np.array([found[document] for document in values]) for found in (values, others))
                return apart_in_pairs(*sides)
            return Estimate.student(differences)
    widths = [(side.high - side.low) / 2 for side in (one, other)]
    value, width = other.value - one.value, math.hypot(*widths)
    return Estimate(value, value - width, value + width)
