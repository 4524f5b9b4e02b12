"""What a report is made of: a document of sections, each with a typed table and lines of text.

`sections` builds a document from runs; `markdown` and `html` render it. Neither renderer knows what a figure means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distft.runs.figures import Figure

UNKNOWN = "–"
_LONG = 40
"""Characters from which the text of a cell is laid out as words instead of a figure."""


class Code(str):
    """A name in a line of text, such as that of a run or a recipe key: shown in a monospaced font."""

    __slots__ = ()


Line = tuple[str, ...]
"""A line of text in pieces, plain strings and `Code`."""


@dataclass(frozen=True)
class Phrase:
    """The text of a cell. `interval` follows it in brackets and is never broken over lines; `full` is the text before
    it was shortened."""

    text: str
    interval: str = ""
    full: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".strip()

    @property
    def long(self) -> bool:
        return len(str(self)) > _LONG


@dataclass(frozen=True)
class Range:
    """A value with the smallest and largest ones around it; without them if both are the value itself."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval (None if unknown) in a format of its own, for columns that mix figures."""

    value: float | None
    low: float | None
    high: float | None
    format: str


Cell = str | float | Range | Estimate | Phrase | None
"""None is unknown. Numbers and ranges are written in the format of their column."""


def written(value: float, form: str) -> str:
    """A number in the format `form`; `NaN` and `infinite` in words, because they are results and not unknown."""
    return format(value, form) if math.isfinite(value) else "NaN" if math.isnan(value) else "infinite"


@dataclass(frozen=True)
class Column:
    """A column: `name` identifies the row, `prose` may be of any length, and only numbers are aligned right."""

    title: str
    kind: Literal["name", "text", "number", "prose"] = "number"
    unit: str = ""
    format: str = ""

    @classmethod
    def of(cls, figure: Figure) -> Column:
        return cls(figure.label, unit=figure.unit, format=figure.format)

    @property
    def head(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def right(self) -> bool:
        """Whether its cells are aligned right."""
        return self.kind == "number"

    def show(self, cell: Cell) -> Phrase:
        """The text of a cell in this column."""
        match cell:
            case None | Estimate(value=None):
                return Phrase(UNKNOWN)
            case Phrase():
                return cell
            case str():
                return Phrase(cell or UNKNOWN)
            case Range(value, low, high):
                text, least, greatest = (written(each, self.format) for each in (value, low, high))
                return Phrase(text, "" if least == greatest else f"({least}–{greatest})")
            case Estimate(value, low, high, form):
                known = value == value and low is not None and high is not None and low == low and high == high
                text = UNKNOWN if value != value else f"{value:{form}}"
                return Phrase(text, f"[{low:{form}}, {high:{form}}]" if known else "")
            case _:
                return Phrase(written(cell, self.format))


@dataclass(frozen=True)
class Table:
    """Columns and rows of cells; the first column says what a row is about."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    compact: bool = False
    """Whether words may break anywhere before the table gets wider than the page."""

    @property
    def heads(self) -> list[str]:
        return [column.head for column in self.columns]

    @property
    def shown(self) -> list[list[Phrase]]:
        """The text of every cell."""
        return [[column.show(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]

    @property
    def texts(self) -> list[list[str]]:
        """The text of every cell, as plain strings."""
        return [[str(phrase) for phrase in row] for row in self.shown]

    def without_unknown(self) -> Table:
        """The table without the columns in which every cell is unknown."""
        known = [n for n in range(len(self.columns)) if n == 0 or any(row[n] is not None for row in self.rows)]
        rows = tuple(tuple(row[n] for n in known) for row in self.rows)
        return Table(tuple(self.columns[n] for n in known), rows, self.compact)


@dataclass(frozen=True)
class Section:
    """A heading with warnings, a table, `notes` (paragraphs) and `items` (a list) under it, in this order."""

    key: str
    title: Line
    table: Table | None = None
    notes: Sequence[Line] = ()
    items: Sequence[Line] = ()
    warnings: Sequence[str] = ()
    level: int = 2


@dataclass(frozen=True)
class Document:
    """A whole report: its title, the answer (empty if there is none), a few facts, and the sections."""

    title: str
    verdict: str
    notes: Sequence[Line]
    sections: Sequence[Section]
