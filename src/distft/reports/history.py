"""What runs logged, step by step: of run folders, and of anybody's transformers Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distft.errors import RunFolderError
from distft.runs.folder import RunFolder

_LARGEST = 700.0
"""No loss from here on has a perplexity that a float can hold."""


@dataclass(frozen=True)
class History:
    """The records of one run, oldest first, each with its `step`; `profile` is its profile.json. Runs of one `variant` are repeats. Of a log,
    which has a `source`, `unread` counts its records without a step and `infinite` its values that are no numbers; both were left out."""

    name: str
    variant: str
    records: Sequence[Mapping[str, Any]] = field(repr=False)
    profile: Mapping[str, Any] | None = field(default=None, repr=False)
    source: Path | None = None
    unread: int = 0
    infinite: int = 0

    @classmethod
    def of_run(cls, folder: RunFolder, variant: str) -> History:
        """Of a run folder.

        Raises:
            RunFolderError: a file in it is damaged.
        """
        try:
            records = folder.read_metrics()
            profile = json.loads(folder.profile.read_text(encoding="utf-8")) if folder.profile.is_file() else None
        except ValueError as error:
            raise RunFolderError(f"{folder.path} is damaged: {error}") from error
        return cls(folder.name, variant, records, profile)

    @classmethod
    def of_log(cls, path: Path) -> History:
        """Of a `trainer_state.json`, or of a file that holds its `log_history` alone.

        Raises:
            RunFolderError: it is neither, or nothing in it has a step.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path} cannot be read as JSON: {error}") from error
        listed = content.get("log_history") if isinstance(content, dict) else content
        if not isinstance(listed, list):
            raise RunFolderError(f"{path} holds no log_history: a list of records, or a trainer_state.json")
        if not listed:
            raise RunFolderError(f"{path} holds an empty log_history: that Trainer has logged nothing (logging_steps)")
        numbers = [_numbers(record) for record in listed]
        records = [_record(record) for record in numbers if _step(record) is not None]
        if not records:
            raise RunFolderError(
                f"none of the {len(listed)} records in {path} has a step, a whole number, so that nothing can be drawn"
            )
        infinite = sum(not math.isfinite(value) for record in numbers for value in record.values())
        name = _name(path)
        return cls(name, name, records, source=path, unread=len(listed) - len(records), infinite=infinite)

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        """The values of two keys in the records that have both."""
        return [
            (float(record[x]), float(record[y]))
            for record in self.records
            if isinstance(record.get(x), int | float) and isinstance(record.get(y), int | float)
        ]

    @property
    def final(self) -> dict[str, float]:
        """The figures of a log that its end shows, by the keys of FINAL, those alone that it has."""
        known = {key: [record[key] for record in self.records if key in record] for key in _LOGGED.values()}
        losses = known["eval_loss"]
        best = {"best_eval_loss": min(losses)} if losses else {}
        last = {key: known[logged][-1] for key, logged in _LOGGED.items() if known[logged]}
        found = {**last, "steps": max(known["step"]), **best}
        return {key: found[key] for key, _, _ in FINAL if key in found}


FINAL = (
    ("steps", "steps", ",.0f"), ("last_train_loss", "last train loss", ",.4f"), ("mean_train_loss", "mean train loss", ",.4f"),
    ("best_eval_loss", "best eval loss", ",.4f"), ("last_eval_loss", "last eval loss", ",.4f"), ("last_perplexity", "last perplexity", ",.2f"),
    ("train_runtime_s", "train time, s", ",.1f"), ("train_samples_per_second", "samples/s", ",.2f"),
)  # fmt: skip
"""Keys, titles and forms of the figures of a log."""
_LOGGED = {
    "steps": "step", "last_train_loss": "loss", "mean_train_loss": "train_loss", "last_eval_loss": "eval_loss", "last_perplexity": "eval_perplexity",
    "train_runtime_s": "train_runtime", "train_samples_per_second": "train_samples_per_second",
}  # fmt: skip
"""What transformers calls them in its records."""


def find_log(path: Path) -> Path | None:
    """The log that `path` is or, as a folder of a Trainer's output, holds: its own, or else the newest checkpoint's."""
    if not path.is_dir():
        return path if path.is_file() and path.suffix == ".json" else None
    own = path / "trainer_state.json"
    states = {state.parent.name.rpartition("-")[2]: state for state in path.glob("checkpoint-*/trainer_state.json")}
    newest = max((step for step in states if step.isdigit()), key=int, default=None)
    return own if own.is_file() else states[newest] if newest is not None else None


def distinct(logs: Sequence[History]) -> list[History]:
    """Each log once, called by its path where another has its name as well."""
    once = [*{log.source.resolve(): log for log in logs if log.source}.values()]
    names = [log.name for log in once]
    named = [log.name if names.count(log.name) == 1 else str(log.source) for log in once]
    return [dataclasses.replace(log, name=name, variant=name) for log, name in zip(once, named, strict=True)]


def _name(path: Path) -> str:
    """The folder of a `trainer_state.json`, of a checkpoint with the folder it is in; the stem of a file that has a name of its own."""
    folder = path.resolve().parent
    if path.stem != "trainer_state" or not folder.name:
        return path.stem
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("checkpoint-") else folder.name


def _numbers(record: Any) -> dict[str, float]:
    """The values of a record that are numbers or texts of numbers; {} of what is no record."""
    found = {}
    for key, value in record.items() if isinstance(record, dict) else ():
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                found[key] = int(value) if value.strip().isdigit() else float(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = value
    return found


def _step(record: Mapping[str, float]) -> int | None:
    step = record.get("step")
    return int(step) if step is not None and math.isfinite(step) and step == int(step) else None


def _record(numbers: Mapping[str, float]) -> dict[str, float]:
    """What can be drawn of it, with the perplexity that belongs to its evaluation loss."""
    record = {key: value for key, value in numbers.items() if math.isfinite(value)} | {"step": _step(numbers) or 0}
    if "eval_loss" in record and record["eval_loss"] < _LARGEST:
        record.setdefault("eval_perplexity", math.exp(record["eval_loss"]))
    return record
