"""Facts in which variants differ, as lines of text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distft.reports.tables import Code, Line

_NAMES = 6
"""How many names a line lists; of more, it lists two and their number."""


def fact_lines(facts: Mapping[str, Mapping[str, Any]], variants: Sequence[str]) -> list[Line]:
    """A line for each fact with its value in every variant, and one for a section of the recipe that only some have."""
    lines: list[Line] = []
    sections: dict[tuple[str, Line, Line], list[str]] = {}
    for key, values in facts.items():
        groups: dict[str, list[str]] = {}
        for name in (name for name in variants if name in values):
            groups.setdefault(_value(values[name]), []).append(name)
        section, _, leaf = key.partition(".")
        given = [value for value in groups if value != "null"]
        if len(given) == 1 and "null" in groups and not section.startswith(("as run", "machine")):
            owners, others = (names(groups[value]) for value in (given[0], "null"))
            sections.setdefault((section, owners, others), []).append(f"{leaf} {given[0]}".lstrip())
        else:
            pieces: list[str] = [Code(key), ": "]
            for number, (value, group) in enumerate(groups.items()):
                pieces += [f"{', ' if number else ''}{value} (in ", *names(group), ")"]
            lines.append(tuple(pieces))
    for (section, owners, others), settings in sections.items():
        lines.append((Code(section), f": {', '.join(settings)} (in ", *owners, "), not set (in ", *others, ")"))
    return lines


def names(found: Iterable[str]) -> Line:
    """The names, separated by commas."""
    listed = [*found]
    more = len(listed) - 2 if len(listed) > _NAMES else 0
    pieces: list[str] = []
    for name in listed[:2] if more else listed:
        pieces += [", ", Code(name)] if pieces else [Code(name)]
    return (*pieces, f" and {more} more") if more else tuple(pieces)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
