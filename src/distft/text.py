"""Small pieces of text in messages: counts, shortened lists, first lines, addresses, durations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping


def count(number: int, noun: str) -> str:
    """`1 process`, `2 processes`, `1,024 GPUs`."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"


def shorten(items: Iterable[str], limit: int, separator: str = ", ") -> str:
    """The first `limit` items, and how many more there are: `a, b and 3 more`."""
    items = list(items)
    more = len(items) - limit
    return separator.join(items[:limit]) + (f" and {more:,} more" if more > 0 else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def redacted(text: str) -> str:
    """`text` without what may be a secret in its addresses: `user:password@`, and the query of https://…?signature=…"""
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/'\"@]+@", r"\1", text)
    return re.sub(r"(https?://[^\s'\"?]*)\?[^\s'\"]*", r"\1", text)


def with_interval(estimate: Mapping[str, float | None] | None, form: str) -> str:
    """A `value` formatted with `form`, followed by its interval (`low` and `high`) if it has one; – if unknown."""
    value, low, high = ((estimate or {}).get(key) for key in ("value", "low", "high"))
    if value is None or value != value:
        return "–"
    if low is None or high is None or low != low or high != high:
        return format(value, form)
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def parse_duration(text: str) -> float:
    """Seconds in a duration as sbatch writes it: `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M` or `D-H:M:S`."""
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes, seconds = [*parts, 0, 0][:3] if dash or len(parts) == 3 else [0, *parts, 0][:3]
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)
