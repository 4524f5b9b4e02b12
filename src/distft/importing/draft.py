"""A recipe in the making, and the table of what became of each foreign key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distft.config.files import related
from distft.errors import Fault

Kind = Literal["taken", "translated", "unmatched", "silent", "open"]
HEADINGS: dict[Kind, str] = {
    "taken": "taken over",
    "translated": "translated",
    "unmatched": "no counterpart, left out",
    "silent": "what they do without saying so",
    "open": "to be done before the run",
}
FALLBACK = "ddp"
"""The strategy that runs everywhere."""
STAND_IN = "tiny"
"""The embedded model and data, where the file names none."""


@dataclass(frozen=True)
class Note:
    """One line of the table: what the file says, what the recipe says in its place, and why."""

    kind: Kind
    theirs: str
    ours: str = ""
    why: str = ""


class Draft:
    """Turns the keys of a foreign configuration into those of a recipe, and notes each of them once.

    `left` holds the keys that nothing was made of yet. What is null or empty there switches nothing on, and is not
    part of it.
    """

    def __init__(self, values: Mapping[str, Any], folder: Path, processes: int = 1) -> None:
        self.left = {key: value for key, value in values.items() if value not in (None, "", [], {})}
        self.given = dict(self.left)
        self.folder = folder
        self.processes = processes
        self.recipe: dict[str, Any] = {}
        self.notes: list[Note] = []
        self.files: dict[str, str] = {}
        """Texts to write beside the recipe, such as a chat template, by the name of their file."""
        self.filled: dict[str, Any] = {}
        """Their defaults for keys that the file leaves out."""

    def fill_in(self, defaults: Mapping[str, Any]) -> None:
        """Give keys that the file leaves out the value that its program would."""
        filled = {key: value for key, value in defaults.items() if key not in self.left}
        self.filled |= filled
        self.left |= filled

    def pop(self, key: str, default: Any = None) -> Any:
        """The value of a key, which is then dealt with."""
        return self.left.pop(key, default)

    def set(self, key: str, value: Any) -> None:
        """Set a dotted key of the recipe."""
        *sections, leaf = key.split(".")
        tree = self.recipe
        for section in sections:
            tree = tree.setdefault(section, {})
        tree[leaf] = value

    def get(self, key: str) -> Any:
        """The value of a dotted key of the recipe, or None."""
        tree: Any = self.recipe
        for part in key.split("."):
            tree = tree.get(part) if isinstance(tree, dict) else None
        return tree

    def take(self, keys: Mapping[str, str]) -> None:
        """Take over each key as it is, under the name that `keys` gives it."""
        for key, ours in keys.items():
            if key in self.left:
                value = number(self.left.pop(key))
                self.set(ours, value)
                if key not in self.filled:
                    self.notes.append(Note("taken", shown(key, value), ours))

    def translate(self, theirs: str, ours: str, value: Any, why: str) -> None:
        """Set a key of the recipe that says in another way what `theirs` says."""
        self.set(ours, value)
        self.notes.append(Note("translated", theirs, shown(ours, value), why))

    def note(self, kind: Kind, theirs: str, why: str, ours: str = "") -> None:
        self.notes.append(Note(kind, theirs, ours, why))

    def finish(self, reasons: Mapping[str, str]) -> None:
        """Note every key that is left as one without a counterpart, with its reason in `reasons`."""
        for key, value in list(self.left.items()):
            self.left.pop(key)
            if value is not False and key not in self.filled:
                self.note("unmatched", shown(key, value), reasons.get(key, "distft has no such setting"))
        noted = "\n".join(note.theirs for note in self.notes)
        for key, value in self.given.items():
            if value is not False and key not in noted:
                self.note("translated", shown(key, value), "", "as the recipe has it")
        if self.filled:
            pairs = ", ".join(shown(key, value) for key, value in self.filled.items())
            self.note("silent", "defaults they fill in", pairs)

    def settle(self, faults_of: Callable[[Mapping[str, Any]], Sequence[Fault]]) -> None:
        """Leave out what `faults_of` the recipe finds, and note it, until it finds nothing."""
        seen: set[tuple[str, str]] = set()
        while faults := [fault for fault in faults_of(self.recipe) if (fault.key, fault.problem) not in seen]:
            for fault in {fault.key: fault for fault in reversed(faults)}.values():  # the first one of each key
                seen.add((fault.key, fault.problem))
                self._give_up(fault)

    def _built_in_data(self) -> str:
        """The built-in data that the objective can train on."""
        if self.get("objective") != "dpo":
            return STAND_IN
        return "tiny_ratings" if self.get("preference.loss_type") == "kto" else "tiny_preferences"

    def _give_up(self, fault: Fault) -> None:
        """Leave out the key of a fault, or note what is to be done if it has to stay: a file is not here, say."""
        why = f"{fault.problem} ({fault.hint})" if fault.hint else fault.problem
        if fault.key in ("model.name", "data.name") and self.get(fault.key) is None:
            name = self._built_in_data() if fault.key == "data.name" else STAND_IN
            self.set(fault.key, name)
            self.note(
                "open", fault.key, "the file names none; the recipe uses the built-in one", shown(fault.key, name)
            )
            return
        if fault.key == "strategy" and self.get("strategy") != FALLBACK:
            self.note("unmatched", shown("strategy", self.get("strategy")), why, f"strategy: {FALLBACK}")
            self.set("strategy", FALLBACK)
            return
        if fault.key == "lora" and not self.recipe.get("lora"):
            self.set("lora.target_modules", "all-linear")
            self.note("open", "lora", f"{fault.problem}; the recipe puts an adapter on all linear layers", "lora")
            return
        key = fault.key
        while key and self.get(key) is None:
            key = key.rpartition(".")[0]
        if (
            not key
            or key in ("strategy", "model", "data", "batching", "training", "model.name")
            or (related(key, "data") and "there is no" in fault.problem)
        ):
            self.note("open", fault.key, why)
            return
        self.notes = [note for note in self.notes if not note.ours.startswith(key)]  # it is not so after all
        self.note("unmatched", shown(key, self.get(key)), why)
        section, _, leaf = key.rpartition(".")
        tree = self.get(section) if section else self.recipe
        del tree[leaf]


def number(value: Any) -> Any:
    """Text that is a number as that number: PyYAML reads `2e-5` as text, and the programs turn it into a number."""
    if isinstance(value, str):
        try:
            return float(value) if any(mark in value for mark in ".eE") else int(value)
        except ValueError:
            return value
    return value


def shown(key: str, value: Any) -> str:
    """`key: value` on one line, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = " ".join(text.split())
    return f"{key}: {text if len(text) <= 60 else text[:57] + '…'}"
