"""The column of the data whose numbers order a curriculum. Imports no torch."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from distft.config.schema import Data
from distft.data.files import Row
from distft.data.sources import Rows
from distft.errors import DataError

ORDERS = ("shuffled", "length", "loss")
"""Values of data.order that are not the name of a column."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def difficulty_column(data: Data) -> str | None:
    """The column that data.order names, if it names one."""
    return None if data.order in ORDERS else data.order


def check_difficulty_column(rows: Rows, data: Data) -> None:
    """Check that every file of `rows` has the column that data.order names.

    Raises:
        DataError: one has not; the message lists its columns.
    """
    wanted = difficulty_column(data)
    if wanted is None:
        return
    for part in rows.parts:
        columns = part.columns([wanted])
        if columns and wanted not in columns:
            raise DataError(
                f"the data ({part.name}) has no column {wanted}; it has {', '.join(columns)}\n"
                f"  data.order is {', '.join(ORDERS)} or the name of a column with numbers"
            )


def difficulty(row: Row, column: str) -> float:
    """The number in a column, which may be written as text, as in a CSV file.

    Raises:
        DataError: there is none, or it is not finite.
    """
    value = row.get(column)
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = value.strip()
    elif isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        what = "none" if value is None or value == "" else f"{value!r:.60}"
        raise DataError(f"data.order={column} needs a number in each row, and this one has {what}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"data.order={column} needs a finite number in each row, and this one has {value}")
    return number
