"""Academic benchmarks by lm-evaluation-harness: what the fine-tune gained, what it forgot, and what is chance.

lm-eval gets the loaded model, with the adapter on it through PEFT. Every process scores its share of the documents.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import distributed

from distft import hub, upstream_api
from distft.config.evaluation import Evaluation, LmEval
from distft.config.recipe import Recipe
from distft.config.validation import nearest
from distft.connection import cache_only
from distft.distributed.collectives import broadcast, gather
from distft.distributed.world import World
from distft.errors import DataError
from distft.evaluation.metrics import figure_of
from distft.evaluation.overlap import overlap
from distft.evaluation.sets import DataOf
from distft.evaluation.target import SideName, Target
from distft.evaluation.tasks import InputFile, Task
from distft.stats import Estimate, paired_share_difference
from distft.text import first_line

Results = Mapping[str, Any]
"""What lm-eval's `simple_evaluate` returns."""


class LmEvalTask(Task):
    """lm-eval's own figures for both sides, with its result files in `folder`/<side>/.

    Answers are cached by lm-eval, one database per side, adapter and rank.
    """

    files = (InputFile("lm_eval.include_path", "a folder of task files", required=False),)
    packages: ClassVar = {"lm_eval": "lm-eval"}

    def data(self, recipe: Recipe) -> DataOf | None:
        section = recipe.evaluation.lm_eval
        return DataOf.listed(section.tasks, f"{section.tasks} {section.include_path}") if section.tasks else None

    def own_data(self, trained: Recipe) -> DataOf | None:
        return None if trained.evaluation.lm_eval == type(trained.evaluation.lm_eval)() else self.data(trained)

    def reads(self, recipe: Recipe) -> Mapping[str, Callable[[], object]]:
        return {"evaluation.lm_eval.tasks": lambda: load_benchmarks(recipe.evaluation.lm_eval)}

    def fetch(self, recipe: Recipe) -> list[str]:
        section = recipe.evaluation.lm_eval
        load_benchmarks(section)
        return [f"the documents of lm-eval's {', '.join(section.tasks)}: in the cache of datasets"]

    def not_fetched(self, recipe: Recipe) -> list[str]:
        with cache_only():
            try:
                load_benchmarks(recipe.evaluation.lm_eval)
            except DataError as error:
                return [f"{first_line(error)}; {hub.remedy(recipe)}"]
        return []

    def run(self, target: Target, settings: Evaluation, folder: Path) -> dict[str, Any]:
        found: dict[SideName, Results] = {side: _evaluate(target, side, settings, folder) for side in target.sides}
        result: dict[str, Any] = {}
        seen = overlap(target, documents(found["base"].get("samples", {})))
        if target.world.is_main:
            result = {
                "figures": figures(found),
                "tasks": settings.lm_eval.tasks,
                "overlap": seen,
                "limit": settings.lm_eval.limit,
                "seed": settings.seed,
                "results": {side: results["results"] for side, results in found.items()},
                "versions": found["base"]["versions"],
                "num_fewshot": found["base"]["n-shot"],
                "template": {"name": "plain", "why": "the documents of lm-eval as they are"},
            }
        return broadcast(result, target.world)


TASK = LmEvalTask()


def load_benchmarks(section: LmEval) -> None:
    """Load the benchmarks once, so that anything missing is found before a model is loaded.

    Raises:
        DataError: lm-eval does not know a benchmark, or its documents cannot be loaded.
    """
    manager = _manager(section)
    unknown = [name for name in section.tasks if name not in manager.all_tasks]
    if unknown:
        hints = "; ".join(hint for name in unknown if (hint := nearest(name, manager.all_tasks)))
        raise DataError(
            f"lm-eval does not know {', '.join(unknown)}{f' ({hints})' if hints else ''}; `lm-eval ls tasks` lists its "
            "tasks, and evaluation.lm_eval.include_path=FOLDER adds yours"
        )
    try:
        manager.load(section.tasks)
    except Exception as error:  # datasets, the hub's client and YAML raise many kinds; all mean the same here
        reason = first_line(error)
        raise DataError(
            f"a task of {', '.join(section.tasks)} cannot be loaded: {reason}\n"
            "  its documents come from the hub: run distft fetch with the same arguments on a machine with a "
            "connection, or give task files with local documents (evaluation.lm_eval.include_path)"
        ) from error


def documents(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The longest text of each document in lm-eval's samples: its question or passage, not its choices."""
    unique = {(task, sample["doc_id"]): sample["doc"] for task, found in samples.items() for sample in found}
    texts = ([value for value in doc.values() if isinstance(value, str)] for doc in unique.values())
    return [max(found, key=len, default="") for found in texts]


def _manager(section: LmEval) -> Any:
    """lm-eval's tasks; those in `include_path` alone if they are enough, which saves a process many seconds."""
    if section.include_path is None:
        return _index(None)
    folder = str(Path(section.include_path).expanduser())
    own = _index(folder, include_defaults=False)
    if set(own.all_subtasks).issuperset(section.tasks):
        return own
    # A group may name tasks from elsewhere: lm-eval fails, or takes the name for that of a new task.
    with contextlib.suppress(Exception):
        if set(own.all_tasks).issuperset(own.load(section.tasks)["tasks"]):
            return own
    return _index(folder)


@functools.cache
def _index(include_path: str | None, include_defaults: bool = True) -> Any:
    """lm-eval's index of its tasks; building it with the defaults reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def _evaluate(target: Target, side: SideName, settings: Evaluation, folder: Path) -> Results:
    """lm-eval's results of one side on rank 0, {} on the others."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    section, seed = settings.lm_eval, settings.seed
    output = folder / side
    output.mkdir(parents=True, exist_ok=True)
    tracker = EvaluationTracker(output_path=str(output))
    with target.side(side) as model:
        results = simple_evaluate(
            model=_language_model(model, target.tokenizer, target.world, section),
            tasks=list(section.tasks),
            num_fewshot=section.num_fewshot,
            limit=section.limit,
            task_manager=_manager(section),
            log_samples=True,
            evaluation_tracker=tracker,
            use_cache=str(folder / "answers" / f"{side}-{target.identity[side]}-{section.max_length or 'all'}"),
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    if results is None:
        return {}
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    return {**results, "samples": samples}


def _language_model(model: Any, tokenizer: Any, world: World, section: LmEval) -> Any:
    """lm-eval's wrapper of the model, as one process of `world`. lm-eval itself takes a loaded model for a single
    process."""
    from lm_eval.models.huggingface import HFLM

    class DistributedLM(HFLM):  # type: ignore[misc]
        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor if world.world_size == 1 else torch.stack(gather(tensor.cpu(), world))

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            parts = gather(obj, world)
            return parts if world.rank == dst else None

        def barrier(self) -> None:
            if world.world_size > 1:
                distributed.barrier()

    lm = DistributedLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=section.batch_size,
        max_length=section.max_length,
        backend="causal",
    )
    upstream_api.set_lm_eval_rank(lm, world.rank, world.world_size)
    return lm


def figures(found: Mapping[SideName, Results]) -> dict[str, Any]:
    """Every metric of every task and group, for both sides and their difference.

    If a metric is a mean over documents, the difference is taken over pairs of the same document: with Newcombe's
    interval if each document is right or wrong, Student's otherwise. Other metrics are compared as two independent
    estimates. The parts of a group are marked as `detail`, which reports leave out.
    """
    base, adapter = found["base"], found.get("adapter")
    made: dict[str, Any] = {}
    parts = {leaf for below in base.get("group_subtasks", {}).values() for leaf in below}
    for task, values in base["results"].items():
        for key in values:
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(values[key], int | float):
                continue
            metric = _Metric(task, name, filtered)
            one = metric.estimate(base)
            other = None if adapter is None else metric.estimate(adapter)
            difference = None
            if adapter is not None and other is not None:
                difference = metric.difference(base, adapter, one, other)
            higher = base["higher_is_better"].get(task, {}).get(name, True)
            figure = figure_of(
                one,
                other,
                difference,
                title=f"{task}: {name}" + ("" if filtered == "none" else f" ({filtered})"),
                better="lower" if higher is False else "higher",
                count=_count(base, task),
            )
            if task in parts:
                figure["detail"] = True
            made[f"{task}/{name}" + ("" if filtered == "none" else f"/{filtered}")] = figure
    return made


class _Metric:
    """A metric of a task or group, computed on the answers that passed one of lm-eval's filters."""

    def __init__(self, task: str, name: str, filtered: str) -> None:
        self.task, self.name, self.filtered = task, name, filtered

    def estimate(self, results: Results) -> Estimate:
        """lm-eval's value, with Wilson's interval if it is the share of right documents, else from lm-eval's standard
        error."""
        values = results["results"][self.task]
        value, error = float(values[f"{self.name},{self.filtered}"]), values.get(f"{self.name}_stderr,{self.filtered}")
        documents = [*(self.documents(results) or {}).values()]
        if documents and set(documents) <= {0.0, 1.0} and abs(value - float(np.mean(documents))) < 1e-9:
            return Estimate.proportion(value, len(documents))
        return Estimate.normal(value, error) if isinstance(error, int | float) else Estimate(value, math.nan, math.nan)

    def difference(self, base: Results, adapter: Results, one: Estimate, other: Estimate) -> Estimate:
        values, others = self.documents(base), self.documents(adapter)
        if values is not None and others is not None and values.keys() == others.keys() and len(values) > 1:
            before = np.array([values[document] for document in values])
            after = np.array([others[document] for document in values])
            if np.allclose((before.mean(), after.mean()), (one.value, other.value), rtol=0, atol=1e-6):
                if {*values.values(), *others.values()} <= {0.0, 1.0}:
                    return paired_share_difference(before, after)
                return Estimate.student(after - before)
        value = other.value - one.value
        width = math.hypot(*((side.high - side.low) / 2 for side in (one, other)))
        return Estimate(value, value - width, value + width)

    def documents(self, results: Results) -> dict[tuple[str, Any], float] | None:
        """The metric of each document; None if it is not a number."""
        found: dict[tuple[str, Any], float] = {}
        for leaf in _leaves(results, self.task):
            for sample in results["samples"].get(leaf, []):
                if sample["filter"] != self.filtered:
                    continue
                value = sample.get(self.name)
                if not isinstance(value, int | float | np.floating | np.integer):
                    return None
                found[leaf, sample["doc_id"]] = float(value)
        return found or None


def _leaves(results: Results, task: str) -> list[str]:
    """The tasks of a group and of its groups; a task itself."""
    below: Sequence[str] = results.get("group_subtasks", {}).get(task, [])
    return [leaf for name in below for leaf in _leaves(results, name)] if below else [task]


def _count(results: Results, task: str) -> int:
    counts = results["n-samples"]
    return sum(int(counts[leaf]["effective"]) for leaf in _leaves(results, task) if leaf in counts)
