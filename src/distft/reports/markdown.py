"""Renders a report as Markdown, aligned so that it also reads well in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distft.reports.history import History
from distft.reports.report import Report
from distft.reports.sections import document
from distft.reports.tables import UNKNOWN, Code, Line, Section, Table


def markdown(report: Report | None, logs: Sequence[History] = (), title: str = "") -> str:
    """A report on runs, on the logs of other programs, or on both; ends in a newline."""
    layout = document(report, logs, title)
    blocks = [f"# {layout.title}", *([f"**{layout.verdict}**"] if layout.verdict else [])]
    blocks += map(_text, layout.notes)
    for section in layout.sections:
        blocks += _section(section)
    return "\n\n".join(blocks) + "\n"


def _section(section: Section) -> Iterable[str]:
    yield f"{'#' * section.level} {_text(section.title)}"
    if section.warnings:
        yield "\n".join(f"- Warning: {line}." for line in section.warnings)
    if section.table is not None:
        yield _table(section.table)
    yield from map(_text, section.notes)
    if section.items:
        yield "\n".join(f"- {_text(line)}" for line in section.items)


def _text(line: Line) -> str:
    return "".join(f"`{piece}`" if isinstance(piece, Code) else piece for piece in line)


def _table(table: Table) -> str:
    if any(column.kind == "prose" for column in table.columns):  # a column of sentences is no table on a terminal
        return "\n".join(
            f"- `{name}`: " + ": ".join(cell for cell in cells if cell != UNKNOWN) for name, *cells in table.texts
        )
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (table.heads, *table.texts)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = [
        "-" * (width - column.right) + ":" * column.right for column, width in zip(table.columns, widths, strict=True)
    ]
    lines = [
        [
            cell.rjust(width) if column.right else cell.ljust(width)
            for column, width, cell in zip(table.columns, widths, row, strict=True)
        ]
        for row in cells
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (lines[0], rule, *lines[1:]))
