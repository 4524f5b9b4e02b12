"""A report as one HTML file that needs nothing beside it: no network, no script."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from distft.evaluation import summary as details
from distft.paths import packaged
from distft.reports.charts import charts
from distft.reports.evaluation_charts import evaluation_charts
from distft.reports.history import History
from distft.reports.markdown import (
    NOT_PROFILED,
    bound_lines,
    comparison_rows,
    count_of_runs,
    difference_lines,
    equal_losses,
    equality_rows,
    how_it_ended,
    log_lines,
    log_rows,
    range_lines,
    run_rows,
    time_rows,
    unequal_lines,
    unfinished_rows,
    unknown_lines,
    variant_rows,
)
from distft.reports.report import DAMAGED, Report
from distft.reports.results import FIGURES
from distft.runs.folder import RunFolder


@dataclass(frozen=True)
class Table:
    """Its cells are texts; those that were shortened stand in `whole` with the whole, which the page tells on hovering. A row becomes a block
    on a narrow screen, each cell with its head before it; on others words of a `tight` table break before it scrolls."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    whole: Mapping[str, str] = field(default_factory=dict)
    tight: bool = False


@dataclass(frozen=True)
class Section:
    """A heading with a table or with lines under it, and a list of `items`, folded where it is long; `part` of the section before it."""

    key: str
    title: str
    table: Table | None = None
    lines: Sequence[str] = ()
    items: Sequence[str] = ()
    warnings: Sequence[str] = ()
    part: bool = False


def histories(report: Report) -> list[History]:
    """Of all its runs but those that cannot be read.

    Raises:
        RunFolderError: a file of one is damaged.
    """
    variants = {run: variant.name for variant in report.variants for run in variant.runs}
    return [
        History.of_run(RunFolder(Path(run.path)), variants[run.name]) for run in report.runs if run.status != DAMAGED
    ]


def page(title: str, logged: Sequence[History], report: Report | None = None) -> str:
    """The page of a report, or of histories alone.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["pieces"] = _pieces
    template = environment.from_string(packaged("assets/report.html").read_text(encoding="utf-8"))
    # Where no run was on a GPU, the memory of the host's processes.
    figure = next(
        (f for f in FIGURES if f.key in ("peak_memory_gib", "host_rss_gib") and any(variant.spreads[f.key] for variant in report.variants)),
        None,
    ) if report else None  # fmt: skip
    speeds = {}
    for variant in report.variants if report and figure else ():
        memory, speed = variant.spreads[figure.key] if figure else None, variant.spreads["samples_per_second"]
        if memory and speed:
            speeds[variant.name] = (memory.median, speed.median)
    times = {variant.name: variant.time for variant in report.variants if variant.time} if report else {}
    return template.render(
        title=title, verdict=report.verdict if report else "", notes=_notes(report), sections=_sections(report) + _logs(logged),
        charts=[*charts(logged, speeds, times, *([figure.title] if figure else [])), *evaluation_charts(report.evaluations if report else {})],
    ) + "\n"  # fmt: skip


def _notes(report: Report | None) -> list[str]:
    if report is None:
        return []
    missing = [f"Not there: {', '.join(report.missing)}."] if report.missing else []
    return [count_of_runs(report), *missing]


def _sections(report: Report | None) -> list[Section]:
    if report is None:
        return []
    whole = {how_it_ended(run): " ".join(run.cause.split()) for run in report.runs if run.cause and not run.finished}
    found = [
        Section("variants", "Variants", Table(*variant_rows(report), whole), _plain(range_lines(report))),
        Section("time", "Where the time goes", Table(*time_rows(report)),
                [] if bound_lines(report) else [NOT_PROFILED], _plain(bound_lines(report))),
    ]  # fmt: skip
    if report.comparisons:
        head, rows, notes = comparison_rows(report)
        found.append(Section("against", f"Against {report.comparisons[0].against}", Table(head, rows), _plain(notes)))
    changed = _changed(report)
    found = [*changed, *found] if len(report.variants) == 1 else [*found, *changed]
    equal = Table(*equality_rows(report))
    found.append(Section("equal", "What was equal", equal, [equal_losses(report)], _plain(unequal_lines(report))))
    if differing := _plain(difference_lines(report)):
        found.append(Section("differs", "What differs", items=differing))
    found.append(Section("runs", "Runs", Table(*run_rows(report), whole), unknown_lines(report)))
    head, rows = unfinished_rows(report)
    if rows:
        found.append(Section("unfinished", "Not finished", Table(head, rows)))
    return found


def _logs(logged: Sequence[History]) -> list[Section]:
    logs = [history for history in logged if history.source]
    return [Section("logs", "Logs", Table(*log_rows(logs)), _plain(log_lines(logs)))] if logs else []


def _changed(report: Report) -> list[Section]:
    """What evaluations found: the figures, and a part for each table behind them."""
    evaluations = report.evaluations
    if not evaluations:
        return []
    # An interval stays on one line; it may stand below its figure.
    rows = [
        [cell.replace(", ", ",\u00a0") if "[" in cell else cell for cell in row] for row in details.rows(evaluations)
    ]
    table = Table(details.head(evaluations), rows, tight=True)
    told, title = _plain([details.NOTE]), "What the fine-tune changed"
    parts = [
        Section(f"evaluation-{number}", detail.title, Table(detail.head, detail.rows, tight=True), part=True)
        for number, detail in enumerate(details.tables(evaluations))
    ]
    return [Section("evaluation", title, table, told, warnings=report.warnings), *parts]


def _plain(lines: Sequence[str]) -> list[str]:
    return [line.replace("`", "") for line in lines]


def _pieces(cell: str) -> list[str]:
    """Of a cell, which may break before a range in brackets but not within it: every second piece is such a range."""
    return re.split(r"(\([^()]{1,24}\))", cell)
