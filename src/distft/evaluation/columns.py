"""What a report shows of evaluations: from the `evaluation` of summaries to columns and rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distft.runs.figures import FIGURES

TASKS = {
    "perplexity": "of the held-out split",
    "imdb": "classification of reviews: accuracy, precision, recall, F1",
    "lm_eval": "benchmarks of lm-evaluation-harness (MMLU, ARC and GSM8K where none is named)",
    "mt_bench": "two-turn questions, graded by a judge",
    "alpaca": "answers beside those of a reference, by a judge",
}
"""The names of the tasks and what each is, for who asks the command."""
NOTE = (
    "Base and adapter on the same items, with 95% intervals: Wilson's of shares, Student's of means, the bootstrap's of F1 and perplexity. "
    "`gain` and `loss`: the interval of the difference leaves 0 out; `no difference`: it does not, so that the difference may be chance "
    "and means nothing; `too few items`: fewer than 10 pairs, on which nothing is said either way."
)
_SIDES = ("base", "adapter", "difference")
_COLUMNS = {figure.key: figure.task for figure in FIGURES if figure.task is not None}
_UNKNOWN = "–"


def columns(evaluation: Mapping[str, Any] | None) -> dict[str, float | None]:
    """The figures of a run's adapter (of its base, where that is all) that stand beside its speed; None where unknown."""
    return {key: estimate(evaluation, key).get("value") for key in _COLUMNS}


def estimate(evaluation: Mapping[str, Any] | None, key: str) -> Mapping[str, float | None]:
    """`value`, `low` and `high` of the figure that stands in the column `key`; {} where it is unknown."""
    task, name = _COLUMNS[key]
    figure = ((evaluation or {}).get(task) or {}).get("figures", {}).get(name) or {}
    found: Mapping[str, float | None] = figure.get("adapter") or figure.get("base") or {}
    return found


def figures(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Task, name and figure of what was evaluated, without details: a benchmark may have dozens of parts."""
    for task, result in evaluation.items():
        for name, figure in result["figures"].items():
            if not figure.get("detail"):
                yield task, name, figure


def head(evaluations: Mapping[str, Any]) -> list[str]:
    """Of the table of figures; one run needs no column of names."""
    return [*(["run"] if len(evaluations) > 1 else []), "task", "figure", "items", *_SIDES, "verdict"]


def rows(evaluations: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The cells under `head`, for the evaluation of each run by its name."""
    return [
        [*([run] if len(evaluations) > 1 else []), task, str(figure["title"]),
         f"{figure['count']:,}" if figure["count"] is not None else _UNKNOWN,
         *(shown(figure[side], figure["form"]) for side in _SIDES), figure["verdict"] or _UNKNOWN]
        for run, evaluation in evaluations.items()
        for task, _, figure in figures(evaluation)
    ]  # fmt: skip


def shown(estimate: Mapping[str, float | None] | None, form: str) -> str:
    """A figure with the bounds of its interval."""
    value, low, high = ((estimate or {}).get(key) for key in ("value", "low", "high"))
    if value is None or value != value:
        return _UNKNOWN
    if low is None or high is None or low != low or high != high:
        return format(value, form)
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
