"""A report as one HTML file that needs nothing beside it: no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from distft.charts import charts, evaluation_charts
from distft.evaluation import columns
from distft.history import History
from distft.markdown import UNKNOWN, comparison_rows, equality_rows, run_rows, variant_rows
from distft.packaged import packaged
from distft.report import Report, verdict
from distft.run import RunFolder


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A heading with a table or with lines under it."""

    key: str
    title: str
    table: Table | None = None
    lines: Sequence[str] = ()


def histories(report: Report) -> list[History]:
    """Of all its runs.

    Raises:
        RunFolderError: a file of one is damaged.
    """
    variants = {run: variant.name for variant in report.variants for run in variant.runs}
    return [History.of_run(RunFolder(Path(run.path)), variants[run.name]) for run in report.runs]


def page(title: str, logged: Sequence[History], report: Report | None = None) -> str:
    """The page of a report, or of histories alone.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(packaged("assets/report.html").read_text(encoding="utf-8"))
    speeds = {}
    for variant in report.variants if report else ():
        memory, speed = variant.spreads["peak_memory_gib"], variant.spreads["samples_per_second"]
        if memory and speed:
            speeds[variant.name] = (memory.median, speed.median)
    return template.render(
        title=title, verdict=verdict(report) if report else "", notes=_notes(report), sections=_sections(report), charts=[*charts(logged, speeds), *evaluation_charts(report.evaluations if report else {})],
    ) + "\n"  # fmt: skip


def _notes(report: Report | None) -> list[str]:
    if report is None:
        return []
    finished = sum(run.finished for run in report.runs)
    missing = [f"Not there: {', '.join(report.missing)}."] if report.missing else []
    return [f"{len(report.runs)} runs of {len(report.variants)} variants, {finished} finished.", *missing]


def _sections(report: Report | None) -> list[Section]:
    if report is None:
        return []
    found = [
        Section(
            "variants",
            "Variants",
            Table(*variant_rows(report)),
            ["Medians of the finished runs, and from the least to the greatest."],
        )
    ]
    if report.comparisons:
        head, rows, notes = comparison_rows(report)
        told = [note.replace("`", "") for note in notes]
        found.append(Section("against", f"Against {report.comparisons[0].against}", Table(head, rows), told))
    if report.evaluations:
        told = [columns.NOTE.replace("`", "")]
        table = Table(columns.HEAD, columns.rows(report.evaluations))
        found.append(Section("evaluation", "What the fine-tune changed", table, told))
    found.append(Section("equal", "What was equal", Table(*equality_rows(report))))
    found.append(Section("runs", "Runs", Table(*run_rows(report))))
    unfinished = [
        (run.name, run.status, " ".join(run.cause.split()) if run.cause else UNKNOWN)
        for run in report.runs
        if not run.finished
    ]
    if unfinished:
        found.append(Section("unfinished", "Not finished", Table(("run", "status", "cause"), unfinished)))
    return found
