"""The recipe that a `Draft` has become, as a file that `distft check` passes, and the table of what its keys became."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distft.config.recipe import Recipe, load_recipe
from distft.config.yaml import dump_yaml
from distft.errors import Fault, RecipeError
from distft.files import write_atomically
from distft.importing.draft import HEADINGS, Draft, Note

Checks = Sequence[Callable[[Recipe], list[Fault]]]
_ORDER = (
    "run",
    "strategy",
    "objective",
    "preference",
    "adapter",
    "model",
    "quantization",
    "lora",
    "data",
    "batching",
    "training",
)
_COLUMN = 44
"""Characters of the first column of the table, at most."""


def settle(draft: Draft, target: Path, checks: Checks) -> None:
    """Remove the keys that have faults from the recipe, note them, and write the files that it refers to.

    Args:
        target: where the recipe will be.
        checks: find faults in a recipe whose values are right by themselves.
    """
    if text := draft.files.get("jinja"):
        path = target.with_suffix(".jinja")
        write_atomically(path, text)
        draft.set("data.chat_template", str(path))

    def faults_of(values: Mapping[str, Any]) -> Sequence[Fault]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / target.name
            path.write_text(dump_yaml(dict(values)), encoding="utf-8")
            try:
                load_recipe([f"recipe={path}"], checks=checks)
            except RecipeError as error:
                return error.faults
        return []

    draft.settle(faults_of)


def recipe_text(draft: Draft, source: Path, program: str) -> str:
    """The recipe as YAML, with the table as comments below it."""
    values = {key: draft.recipe[key] for key in _ORDER if draft.recipe.get(key) not in (None, {})}
    values |= {key: value for key, value in draft.recipe.items() if key not in values and value not in (None, {})}
    for section, first in (("data", ("name", "sources", "format")), ("model", ("name",)), ("training", ())):
        if isinstance(tree := values.get(section), dict):
            head = [key for key in first if key in tree] or sorted(tree)
            values[section] = {key: tree[key] for key in dict.fromkeys([*head, *tree])}
    sections = "\n".join(dump_yaml({key: value}) for key, value in values.items())
    notes = "\n".join(f"# {line}".rstrip() for line in table(draft.notes, 116))
    return f"# Imported by `distft import` from {source.name} ({program}).\n{sections}\n{notes}\n"


def table(notes: Sequence[Note], width: int) -> list[str]:
    """The notes under a heading for each kind, in lines of at most `width` characters."""
    lines: list[str] = []
    for kind, heading in HEADINGS.items():
        rows = [(note.theirs, " – ".join(filter(None, (note.ours, note.why)))) for note in notes if note.kind == kind]
        if not rows:
            continue
        column = min(max(len(left) for left, _ in rows), _COLUMN)
        lines += ["", f"{heading}:"]
        for left, right in rows:
            head = textwrap.wrap(left, column, break_long_words=True)
            tail = textwrap.wrap(right, max(width - column - 5, 20), break_long_words=False) or [""]
            height = max(len(head), len(tail))
            head, tail = head + [""] * (height - len(head)), tail + [""] * (height - len(tail))
            arrow = ["→" if kind in ("taken", "translated") else " ", *[" "] * (height - 1)]
            lines += [f"  {a:<{column}} {b} {c}".rstrip() for a, b, c in zip(head, arrow, tail, strict=True)]
    return lines[1:]


def as_json(draft: Draft, program: str) -> dict[str, Any]:
    """The recipe and the table, for other programs."""
    return {"program": program, "recipe": draft.recipe, "notes": [asdict(note) for note in draft.notes]}
