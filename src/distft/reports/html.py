"""Renders a report as one HTML file without scripts that loads nothing: charts are inline SVG. The page is
assets/report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from distft.paths import packaged
from distft.reports.charts import charts
from distft.reports.drawing import Chart
from distft.reports.evaluation_charts import evaluation_charts
from distft.reports.history import History
from distft.reports.report import Report
from distft.reports.results import DAMAGED, SHOWN
from distft.reports.sections import document
from distft.reports.tables import Code
from distft.runs.folder import RunFolder


def histories(report: Report) -> list[History]:
    """The histories of all runs that can be read.

    Raises:
        RunFolderError: a file of a run is damaged.
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
    environment.tests["code"] = lambda piece: isinstance(piece, Code)
    template = environment.from_string(packaged("assets/report.html").read_text(encoding="utf-8"))
    layout = document(report, [history for history in logged if history.source], title)
    return template.render(document=layout, charts=_charts(logged, report)) + "\n"


def _charts(logged: Sequence[History], report: Report | None) -> list[Chart]:
    if report is None:
        return charts(logged)
    times = {variant.name: variant.time for variant in report.variants if variant.time}
    # The memory of the host's processes where no run was on a GPU.
    memory = [figure for figure in SHOWN if figure.key in ("peak_memory_gib", "host_rss_gib")]
    measured = [figure for figure in memory if any(variant.spreads[figure.key] for variant in report.variants)]
    figure = (measured or memory)[0]
    points = {}
    for variant in report.variants:
        gib, speed = variant.spreads[figure.key], variant.spreads["samples_per_second"]
        if gib and speed:
            points[variant.name] = (gib.median, speed.median)
    return [*charts(logged, points, times, figure.title), *evaluation_charts(report.evaluations)]
