"""The run folder: the name of every file in it, and the records written there.

runs/<name>/
  recipe.yaml         the resolved recipe; `distft train recipe=runs/<name>/recipe.yaml` runs it again
  environment.json    versions, hardware, command
  metrics.jsonl       one record per log step
  checkpoints/        saved during training
  adapter/  model/    the result: a PEFT adapter, or the whole model if there is no adapter
  faults.jsonl        one record per failure of the run: when, which rank, after which step, why
  probe.json          how much memory each micro-batch takes, if batching.micro_batch is auto
  stacks/             the Python stacks of every rank when the run hung
  logs/               what each rank printed, rank<N>.log, if there are several
  samples.json        answers to a few held-out prompts, before and after training
  evaluation/         the items of each task of `distft evaluate`, one folder per task
  evaluation.json     the results of these tasks
  export/             what `distft export` wrote, one folder per form
  wandb/              W&B's files, one folder per start
  profile.json        where the time of the profiled steps went
  wandb.json          the id of the W&B run that all starts log to
  summary.json        status, cause and the figures of the run
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distft.errors import RunFolderError
from distft.files import append_lines, read_lines, to_json, write_atomically
from distft.runs.figures import SUMMARY_KEYS


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. Constructing it does not touch the disk."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def faults(self) -> Path:
        return self.path / "faults.jsonl"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log(self, rank: int) -> Path:
        """The log of `rank`, counted over all nodes. Each start appends to it."""
        return self.logs / f"rank{rank}.log"

    @property
    def profile(self) -> Path:
        return self.path / "profile.json"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def wandb_run(self) -> Path:
        return self.path / "wandb.json"

    @property
    def probe(self) -> Path:
        """How much memory each micro-batch takes, if `batching.micro_batch` is auto."""
        return self.path / "probe.json"

    @property
    def scores(self) -> Path:
        """How hard the base finds each training sample, if `data.order` is loss."""
        return self.path / "scores"

    @property
    def reference(self) -> Path:
        """The reference's log-probabilities, if they were computed before the first step."""
        return self.path / "reference.npz"

    @property
    def samples(self) -> Path:
        """The answers to a few held-out prompts, if `evaluation.samples` asks for them."""
        return self.path / "samples.json"

    @property
    def lock(self) -> Path:
        """Locked by the process that writes here, for as long as it lives."""
        return self.path / ".lock"

    def is_held(self) -> bool:
        """Whether a process holds the lock. True if unknown: there is no lock file, or the disk has no locks."""
        try:
            with self.lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        return False

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def export(self) -> Path:
        """What `distft export` wrote, one folder per form."""
        return self.path / "export"

    @property
    def evaluation(self) -> Path:
        """The items of each task of `distft evaluate`, `<task>/…`."""
        return self.path / "evaluation"

    @property
    def results(self) -> Path:
        """The results of the tasks of `distft evaluate`."""
        return self.path / "evaluation.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @classmethod
    def claim(cls, parent: Path, name: str, *, exact: bool) -> RunFolder:
        """Create `parent/name`, or `name-2`, `name-3`, … if it exists: a run never overwrites another.

        `mkdir` is atomic, so runs that start at the same time get different folders.

        Raises:
            RunFolderError: the folder exists and `exact` allows no other name, or it cannot be created.
        """
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot create the folder {parent}: {error.strerror}; set run.dir") from error
        for number in range(1, 10_000):
            path = parent / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                return cls(path)
            except FileExistsError:
                if exact:
                    free = next(n for n in range(2, 10_000) if not os.path.lexists(parent / f"{name}-{n}"))
                    raise RunFolderError(
                        f"run folder {path} is in use, and distft never overwrites a run; choose another name, such as "
                        f"run.name={name}-{free}"
                    ) from None
            except OSError as error:
                raise RunFolderError(f"cannot create the run folder {path}: {error.strerror}; set run.dir") from error
        raise RunFolderError(f"too many runs named {name} in {parent}")

    @classmethod
    def named(cls, parent: Path, name: str) -> list[RunFolder]:
        """The existing run folders `name`, `name-2`, `name-3`, …, newest first."""
        first = parent / name
        numbered = [(1, first)]
        for path in first.parent.iterdir() if first.parent.is_dir() else ():
            number = path.name.removeprefix(f"{first.name}-")
            if path.name != number and number.isdecimal():
                numbered.append((int(number), path))
        return [cls(path) for _, path in sorted(numbered, reverse=True) if (path / "summary.json").is_file()]

    def read_environment(self) -> dict[str, Any]:
        """What `environment.json` says about the latest processes of the run; empty if there were none."""
        if not self.environment.is_file():
            return {}
        return dict(json.loads(self.environment.read_text(encoding="utf-8-sig")))

    def read_summary(self) -> dict[str, Any]:
        """The content of `summary.json`.

        Raises:
            RunFolderError: this is not a run folder, or its summary cannot be read.
        """
        try:
            record = json.loads(self.summary.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self.path} has no readable {self.summary.name}: {error}") from error
        if not isinstance(record, dict):
            raise RunFolderError(f"{self.summary} is not a JSON object")
        return record

    def write_summary(self, record: Mapping[str, Any]) -> None:
        """Write `summary.json` with every key of `SUMMARY_KEYS`; keys that `record` lacks are null."""
        unknown = set(record) - set(SUMMARY_KEYS)
        if unknown:
            raise KeyError(f"not keys of a summary: {sorted(unknown)}")
        write_atomically(self.summary, to_json({key: record.get(key) for key in SUMMARY_KEYS}) + "\n")

    def append_metrics(self, *records: Mapping[str, Any]) -> None:
        """Append each record to `metrics.jsonl` as one line, in a single write.

        A kill or a full disk damages at most the last line, and the next call removes it.
        """
        append_lines(self.metrics, records)

    def append_fault(
        self,
        cause: str,
        *,
        rank: int | None,
        step: int,
        launch: str | None,
        attempt: int | None,
        facts: Mapping[str, Any] | None = None,
    ) -> bool:
        """Append a record to `faults.jsonl`, unless this `attempt` of this `launch` has one already.

        The first fault of an attempt is the cause; what other ranks see after it are consequences. Returns whether the
        record was written. `rank` is None if several ranks failed; `facts` are additional keys.
        """
        with self.faults.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if any((known["launch"], known["attempt"]) == (launch, attempt) for known in self.read_faults()):
                return False
            when = datetime.now(UTC).isoformat(timespec="seconds")
            fault = {"time": when, "rank": rank, "step": step, "cause": cause, "launch": launch, "attempt": attempt}
            append_lines(self.faults, [fault | dict(facts or {})])
            return True

    def read_faults(self) -> list[dict[str, Any]]:
        """All records of `faults.jsonl`, oldest first."""
        return read_lines(self.faults)

    def keep_metrics(self, step: int) -> None:
        """Drop the records after `step` and an incomplete last line: a run that resumes there writes them again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete records of `metrics.jsonl`, without a last line that a kill left incomplete."""
        return read_lines(self.metrics)
