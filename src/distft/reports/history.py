"""What was logged step by step, by runs of distft and by any transformers Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
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

    `profile` is its profile.json; runs of one `variant` are repeats. The log of another program has a `source`.
    `unread` counts its records without a step, which were left out, and `infinite` its values that are not finite,
    which charts leave out. `not_finite` maps each loss that ends that way to the step from which it is not finite.
    """

    name: str
    variant: str
    records: Sequence[Mapping[str, Any]] = field(repr=False)
    profile: Mapping[str, Any] | None = field(default=None, repr=False)
    source: Path | None = None
    unread: int = 0
    infinite: int = 0
    not_finite: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_run(cls, folder: RunFolder, variant: str) -> History:
        """From a run folder.

        Raises:
            RunFolderError: a file in the folder is damaged.
        """
        try:
            records = [_with_nan(record) for record in folder.read_metrics()]
            profile = json.loads(folder.profile.read_text(encoding="utf-8-sig")) if folder.profile.is_file() else None
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
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path} is not readable JSON: {error}") from error
        listed = content.get("log_history") if isinstance(content, dict) else content
        if not isinstance(listed, list):
            raise RunFolderError(f"{path} has no log_history: expected a trainer_state.json or a list of records")
        if not listed:
            raise RunFolderError(f"{path} has an empty log_history: the Trainer logged nothing (see logging_steps)")
        numbers = [_numbers(record) for record in listed]
        records = _unfiltered([_record(record) for record in numbers if _step(record) is not None])
        if not records:
            raise RunFolderError(
                f"{path} cannot be drawn: none of its {count(len(listed), 'record')} has a whole number as step"
            )
        infinite = sum(not math.isfinite(value) for record in numbers for value in record.values())
        name = _name(path)
        unread = len(listed) - len(records)
        return cls(name, name, records, source=path, unread=unread, infinite=infinite, not_finite=_not_finite(records))

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        """The values of two keys, from the records that have both."""
        return [
            (float(record[x]), float(record[y]))
            for record in self.records
            if isinstance(record.get(x), int | float) and isinstance(record.get(y), int | float)
        ]

    @property
    def diverged(self) -> int | None:
        """The step from which the training loss is not finite (the evaluation losses, if no training loss was
        logged)."""
        trained = any("loss" in record for record in self.records)
        return self.not_finite.get("loss") if trained else min(self.not_finite.values(), default=None)

    @property
    def final(self) -> dict[str, float]:
        """The figures at the end of a log, by the keys of `final_figures`; only those that it has.

        The last value of a metric is the last one logged, finite or not.
        """
        logged = {key: [record[key] for record in self.records if key in record] for key in _LOGGED.values()}
        found = {key: logged[name][-1] for key, name in _LOGGED.items() if logged[name]}
        found["steps"] = max(logged["step"])
        if "mean_train_loss" in found and "loss" in self.not_finite:
            found["mean_train_loss"] = math.nan  # transformers counts a loss that is NaN as 0 there
        for metric in ("eval_loss", *other_metrics([self])):
            values = [record[metric] for record in self.records if metric in record]
            if values:
                found[f"last_{metric}"] = values[-1]
                found[f"best_{metric}"] = min(filter(math.isfinite, values), default=math.nan)
        return {figure.key: found[figure.key] for figure in final_figures([self]) if figure.key in found}


_FINAL = (
    Figure(key="steps", label="steps", format=",.0f"),
    Figure(key="last_train_loss", label="last train loss", format=",.4f"),
    Figure(key="mean_train_loss", label="mean train loss", format=",.4f"),
    Figure(key="best_eval_loss", label="best eval loss", format=",.4f"),
    Figure(key="last_eval_loss", label="last eval loss", format=",.4f"),
    Figure(key="last_perplexity", label="last perplexity", format=",.2f"),
)
_RATES = (
    Figure(key="train_runtime_s", label="train time", unit="s", format=",.1f"),
    Figure(key="train_samples_per_second", label="samples/s", format=",.2f"),
)
_LOGGED = {
    "steps": "step",
    "last_train_loss": "loss",
    "mean_train_loss": "train_loss",
    "last_perplexity": "eval_perplexity",
    "train_runtime_s": "train_runtime",
    "train_samples_per_second": "train_samples_per_second",
}
"""The keys of transformers' records that figures come from."""
_NOT_METRICS = ("_runtime", "_per_second", "_num_tokens", "_preparation_time")
"""How the keys end that a Trainer logs at an evaluation and that are not metrics."""


def other_metrics(histories: Iterable[History]) -> list[str]:
    """The metrics of evaluations that other programs logged, besides the loss and the perplexity on a single set:
    `eval_accuracy`, or `eval_alpaca_loss` where there are several sets."""
    logged = dict.fromkeys(key for each in histories if each.source for record in each.records for key in record)
    known = ("eval_loss", "eval_perplexity")
    return [key for key in logged if key.startswith("eval_") and key not in known and not key.endswith(_NOT_METRICS)]


def final_figures(logs: Sequence[History]) -> list[Figure]:
    """The figures of the logs of other programs; those of `other_metrics` follow the fixed ones."""
    metrics = [
        Figure(key=f"{which}_{metric}", label=f"{which} {metric.replace('_', ' ')}", format=",.4f")
        for metric in other_metrics(logs)
        for which in (("best", "last") if metric.endswith("_loss") else ("last",))
    ]
    return [*_FINAL, *metrics, *_RATES]


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
        elif value is None and _is_loss(key):
            found[key] = math.nan  # strict JSON has no NaN
    return found


def _with_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl with NaN instead of null, which is how JSON represents a loss that is not finite."""
    return {key: math.nan if value is None and _is_loss(key) else value for key, value in record.items()}


def _is_loss(key: str) -> bool:
    return key == "loss" or (key.startswith("eval_") and key.endswith("_loss"))


def _step(record: Mapping[str, float]) -> int | None:
    step = record.get("step")
    return int(step) if step is not None and math.isfinite(step) and step == int(step) else None


def _record(numbers: Mapping[str, float]) -> dict[str, float]:
    """A record with the perplexity of its evaluation loss."""
    record = {**numbers, "step": _step(numbers) or 0}
    if "eval_loss" in record:
        loss = record["eval_loss"]
        record.setdefault("eval_perplexity", math.inf if loss >= _LARGEST else math.exp(loss))
    return record


def _unfiltered(records: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The records with NaN in place of each loss that transformers logged as 0.0 because it was not finite.

    By default (`logging_nan_inf_filter`), transformers adds nothing to the logged loss at a step whose loss is not
    finite: the log then says 0.0. Such a 0.0 is recognised by a gradient norm that is not finite or, in a log without
    norms, by an evaluation loss that is not.
    """
    exploded = any(_is_loss(key) and not math.isfinite(value) for record in records for key, value in record.items())
    return [
        record | {"loss": math.nan}
        if record.get("loss") == 0 and not math.isfinite(record.get("grad_norm", math.nan if exploded else 0.0))
        else record
        for record in records
    ]


def _not_finite(records: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """Each loss whose last value is not finite, with the step from which none is.

    A window of steps may have averaged the last finite losses although its gradient norm was not finite any more: the
    training diverged within it.
    """
    found = {}
    for key in dict.fromkeys(key for record in records for key in record if _is_loss(key)):
        logged = [record for record in records if key in record]
        tail = [*itertools.takewhile(lambda record: not math.isfinite(record[key]), reversed(logged))]  # noqa: B023
        if tail and key == "loss":
            before = logged[: len(logged) - len(tail)]
            tail += itertools.takewhile(
                lambda record: not math.isfinite(record.get("grad_norm", 0.0)), reversed(before)
            )
        if tail:
            found[key] = int(tail[-1]["step"])
    return found
