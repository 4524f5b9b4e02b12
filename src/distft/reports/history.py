"""What was logged step by step, by runs of distft and by any transformers Trainer."""

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
from distft.runs.figures import Figure
from distft.runs.folder import RunFolder
from distft.text import count

_LARGEST = 700.0
"""The perplexity of a loss from here on overflows a float."""


@dataclass(frozen=True)
class History:
    """The records of one run, oldest first, each with its `step`.

    `profile` is its profile.json; runs of one `variant` are repeats. The log of another program has a `source`;
    `unread` counts its records without a step and `infinite` its values that are not finite. Both were left out.
    """

    name: str
    variant: str
    records: Sequence[Mapping[str, Any]] = field(repr=False)
    profile: Mapping[str, Any] | None = field(default=None, repr=False)
    source: Path | None = None
    unread: int = 0
    infinite: int = 0

    @classmethod
    def of_run(cls, folder: RunFolder, variant: str) -> History:
        """From a run folder.

        Raises:
            RunFolderError: a file in the folder is damaged.
        """
        try:
            records = folder.read_metrics()
            profile = json.loads(folder.profile.read_text(encoding="utf-8")) if folder.profile.is_file() else None
        except ValueError as error:
            raise RunFolderError(f"{folder.path} is damaged: {error}") from error
        return cls(folder.name, variant, records, profile)

    @classmethod
    def of_log(cls, path: Path) -> History:
        """From a `trainer_state.json`, or from a file with only its `log_history`.

        Raises:
            RunFolderError: the file is neither, or none of its records has a step.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path} is not readable JSON: {error}") from error
        listed = content.get("log_history") if isinstance(content, dict) else content
        if not isinstance(listed, list):
            raise RunFolderError(f"{path} has no log_history: expected a trainer_state.json or a list of records")
        if not listed:
            raise RunFolderError(f"{path} has an empty log_history: the Trainer logged nothing (see logging_steps)")
        numbers = [_numbers(record) for record in listed]
        records = [_record(record) for record in numbers if _step(record) is not None]
        if not records:
            raise RunFolderError(
                f"{path} cannot be drawn: none of its {count(len(listed), 'record')} has a whole number as step"
            )
        infinite = sum(not math.isfinite(value) for record in numbers for value in record.values())
        name = _name(path)
        return cls(name, name, records, source=path, unread=len(listed) - len(records), infinite=infinite)

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        """The values of two keys, from the records that have both."""
        return [
            (float(record[x]), float(record[y]))
            for record in self.records
            if isinstance(record.get(x), int | float) and isinstance(record.get(y), int | float)
        ]

    @property
    def final(self) -> dict[str, float]:
        """The figures at the end of a log, by the keys of FINAL; only those that it has."""
        logged = {key: [record[key] for record in self.records if key in record] for key in _LOGGED.values()}
        found = {key: logged[name][-1] for key, name in _LOGGED.items() if logged[name]}
        found["steps"] = max(logged["step"])
        if losses := logged["eval_loss"]:
            found["best_eval_loss"] = min(losses)
        return {figure.key: found[figure.key] for figure in FINAL if figure.key in found}


FINAL = (
    Figure(key="steps", label="steps", format=",.0f"),
    Figure(key="last_train_loss", label="last train loss", format=",.4f"),
    Figure(key="mean_train_loss", label="mean train loss", format=",.4f"),
    Figure(key="best_eval_loss", label="best eval loss", format=",.4f"),
    Figure(key="last_eval_loss", label="last eval loss", format=",.4f"),
    Figure(key="last_perplexity", label="last perplexity", format=",.2f"),
    Figure(key="train_runtime_s", label="train time", unit="s", format=",.1f"),
    Figure(key="train_samples_per_second", label="samples/s", format=",.2f"),
)
"""The figures of the log of another program."""
_LOGGED = {
    "steps": "step",
    "last_train_loss": "loss",
    "mean_train_loss": "train_loss",
    "last_eval_loss": "eval_loss",
    "last_perplexity": "eval_perplexity",
    "train_runtime_s": "train_runtime",
    "train_samples_per_second": "train_samples_per_second",
}
"""The keys of transformers' records that they come from."""


def find_log(path: Path) -> Path | None:
    """The log at `path`, or in a Trainer's output folder there: its own trainer_state.json, else the newest
    checkpoint's."""
    if not path.is_dir():
        return path if path.is_file() and path.suffix == ".json" else None
    own = path / "trainer_state.json"
    states = {state.parent.name.rpartition("-")[2]: state for state in path.glob("checkpoint-*/trainer_state.json")}
    newest = max((step for step in states if step.isdigit()), key=int, default=None)
    return own if own.is_file() else states[newest] if newest is not None else None


def distinct(logs: Sequence[History]) -> list[History]:
    """Each log once. Logs with the same name are called by their paths."""
    once = [*{log.source.resolve(): log for log in logs if log.source}.values()]
    names = [log.name for log in once]
    named = [log.name if names.count(log.name) == 1 else str(log.source) for log in once]
    return [dataclasses.replace(log, name=name, variant=name) for log, name in zip(once, named, strict=True)]


def _name(path: Path) -> str:
    """The name of a log: that of its folder for a `trainer_state.json` (with its parent for a checkpoint), else its
    stem."""
    folder = path.resolve().parent
    if path.stem != "trainer_state" or not folder.name:
        return path.stem
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("checkpoint-") else folder.name


def _numbers(record: Any) -> dict[str, float]:
    """The values of a record that are numbers or strings of numbers; {} if it is not a record."""
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
    """The finite values of a record, with the perplexity of its evaluation loss."""
    record = {key: value for key, value in numbers.items() if math.isfinite(value)} | {"step": _step(numbers) or 0}
    if "eval_loss" in record and record["eval_loss"] < _LARGEST:
        record.setdefault("eval_perplexity", math.exp(record["eval_loss"]))
    return record
