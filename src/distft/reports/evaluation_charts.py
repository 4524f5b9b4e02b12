"""The charts of evaluations: base and adapter side by side, with their confidence intervals."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distft.evaluation import summary
from distft.evaluation.sets import split_key
from distft.reports.charts import CAPTIONED
from distft.reports.drawing import COLOURS, INK, LABEL, Chart, draw_svg
from distft.reports.tables import Cell, Column, Estimate, Table
from distft.text import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def evaluation_charts(evaluations: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """The charts of each task, given the evaluations of runs by their names: one for the figures of the same unit, and
    one for the categories of the task's items.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    grouped: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = {}
    for run, evaluation in evaluations.items():
        for task, name, figure in summary.figures(evaluation):
            if any((figure[side] or {}).get("value") is not None for side in ("base", "adapter")):
                # Perplexity and loss share no scale.
                own = name if split_key(task)[0] == "perplexity" else figure["form"]
                label = figure["title"] if len(evaluations) == 1 else f"{run}, {figure['title']}"
                grouped.setdefault((task, own), []).append((label, figure))
        for task, result in evaluation.items():
            for name, sides in (result.get("categories") or {}).items():
                label = name if len(evaluations) == 1 else f"{run}, {name}"
                known = {
                    side: sides.get(side)
                    for side in ("base", "adapter")
                    if (sides.get(side) or {}).get("value") is not None
                }
                whole = {"base": None, "adapter": None, "form": ".2f", "verdict": None, **known}
                grouped.setdefault((f"{task} by category", ""), []).extend([(label, whole)] if known else [])
    tasks = [task for task, _ in grouped]
    return [
        _side_by_side(
            re.sub("[ @.+]", "_", f"evaluation_{task}") + (f"_{number}" if tasks.count(task) > 1 else ""), task, figures
        )
        for number, ((task, _), figures) in enumerate(grouped.items())
        if figures
    ]


def _side_by_side(key: str, task: str, figures: Sequence[tuple[str, Mapping[str, Any]]]) -> Chart:
    sides = [side for side in ("base", "adapter") if any(figure[side] for _, figure in figures)]
    labels = [textwrap.fill(label, LABEL) for label, _ in figures]
    lines = sum(max(2, label.count("\n") + 1) for label in labels)

    def draw(axes: Axes) -> None:
        axes.set_axisbelow(True)
        whole = axes.get_figure(root=True)
        assert whole is not None
        whole.set_figheight(1.2 + 0.21 * lines)
        for number, side in enumerate(sides):
            known = [(row, figure[side]) for row, (_, figure) in enumerate(figures) if figure[side]]
            values = [estimate["value"] or 0.0 for _, estimate in known]
            bounds = [(_bound(estimate, "low"), _bound(estimate, "high")) for _, estimate in known]
            below = [max(value - low, 0.0) for value, (low, _) in zip(values, bounds, strict=True)]
            above = [max(high - value, 0.0) for value, (_, high) in zip(values, bounds, strict=True)]
            axes.barh(
                [row + 0.38 * (number - (len(sides) - 1) / 2) for row, _ in known],
                values,
                height=0.36,
                label=side,
                color=COLOURS[number],
                hatch=("", "//")[number],
                ecolor=INK,
                capsize=2,
                xerr=[below, above],
            )
        axes.set_yticks(range(len(figures)), labels)
        axes.invert_yaxis()

    columns = (Column("figure", "name"), *map(Column, sides))
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (label, *(_estimate(figure[side], figure["form"]) for side in sides)) for label, figure in figures
    )
    verdicts = [f"{label}: {figure['verdict']}" for label, figure in figures if figure["verdict"]]
    description = f"With 95% intervals. {shorten(verdicts, CAPTIONED, '; ')}." if verdicts else "With 95% intervals."
    return Chart(key, f"Evaluation: {task}", description, draw_svg(key, draw, sides), Table(columns, rows))


def _estimate(estimate: Mapping[str, Any] | None, form: str) -> Estimate | None:
    return None if estimate is None else Estimate(estimate["value"], estimate["low"], estimate["high"], form)


def _bound(estimate: Mapping[str, Any], which: str) -> float:
    """A bound of the interval, or the value itself if it has no interval."""
    bound = estimate[which]
    return float((estimate["value"] or 0.0) if bound is None or bound != bound else bound)
