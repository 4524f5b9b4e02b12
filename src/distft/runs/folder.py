"""The run folder: the name of every file in it, and the records written there.

runs/<name>/
  recipe.yaml         resolved; `distft train recipe=runs/<name>/recipe.yaml` runs it again
  environment.json    versions, hardware, command
  metrics.jsonl       one record a log step
  checkpoints/        what the trainer saves on its way
  adapter/  model/    the result: a PEFT adapter, or the whole model where there is no adapter
  faults.jsonl        one record for each time that the run broke down: when, which rank, after which step, why
  probe.json          how much memory each micro-batch takes, where batching.micro_batch is auto
  stacks/             what every rank was doing when the run stood still
  logs/               what each rank printed, rank<N>.log, where there are several
  evaluation/         of `distft evaluate`: what each task made, item by item, one folder each
  evaluation.json     what the tasks found
  wandb/              W&B's own files, one folder in it for each start
  profile.json        where the time of some steps went
  wandb.json          the id of the W&B run that all starts log to
  summary.json        status, cause and the figures of the run
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.errors import RunFolderError
from distft.files import append_lines, read_lines, to_json, write_atomically
from distft.runs.figures import SUMMARY_KEYS


@dataclass(frozen=True)
class RunFolder:
    """One run, one folder. Constructing it touches no disk."""

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
        """What `rank`, counted over all nodes, printed; appended to at each start."""
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
        """What each micro-batch takes, where `batching.micro_batch` is auto."""
        return self.path / "probe.json"

    @property
    def lock(self) -> Path:
        """Held by the process that writes here, for as long as it lives."""
        return self.path / ".lock"

    def is_held(self) -> bool:
        """Whether a process writes here, by its lock; True where nobody can tell (no lock yet, or a disk that knows none)."""
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
    def evaluation(self) -> Path:
        """What each task of `distft evaluate` made, `<task>/…`."""
        return self.path / "evaluation"

    @property
    def results(self) -> Path:
        """What the tasks of `distft evaluate` found."""
        return self.path / "evaluation.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @classmethod
    def claim(cls, parent: Path, name: str, *, exact: bool) -> RunFolder:
        """Create `parent/name`, or `name-2`, `name-3`, … where it exists: a run never writes over another.

        `mkdir` decides, so that two runs that start at once get two folders.

        Raises:
            RunFolderError: the folder exists and `exact` asks for this very name, or cannot be created.
        """
        for number in range(1, 10_000):
            path = parent / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError:
                if exact:
                    free = next(n for n in range(2, 10_000) if not (parent / f"{name}-{n}").exists())
                    raise RunFolderError(
                        f"run folder {path} is in use, and distft never writes over a run; "
                        f"take another name, run.name={name}-{free} say"
                    ) from None
            except OSError as error:
                raise RunFolderError(f"cannot create the run folder {path}: {error.strerror}; set run.dir") from error
        raise RunFolderError(f"too many runs named {name} in {parent}")

    @classmethod
    def named(cls, parent: Path, name: str) -> list[RunFolder]:
        """The run folders `name`, `name-2`, `name-3`, … that there are, newest first."""
        numbered = [(1, parent / name)]
        for path in parent.glob(f"{name}-*"):
            number = path.name.removeprefix(f"{name}-")
            if number.isdigit():
                numbered.append((int(number), path))
        return [cls(path) for _, path in sorted(numbered, reverse=True) if (path / "summary.json").is_file()]

    def read_environment(self) -> dict[str, Any]:
        """What `environment.json` says of the processes that worked here last; {} where none has."""
        if not self.environment.is_file():
            return {}
        return dict(json.loads(self.environment.read_text(encoding="utf-8")))

    def read_summary(self) -> dict[str, Any]:
        """The summary as a dict.

        Raises:
            RunFolderError: this is no run folder, or its summary is not readable.
        """
        try:
            record = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self.path} holds no readable {self.summary.name}: {error}") from error
        if not isinstance(record, dict):
            raise RunFolderError(f"{self.summary} is not a JSON object")
        return record

    def write_summary(self, record: Mapping[str, Any]) -> None:
        """Write `summary.json` with every key of `SUMMARY_KEYS`, null where `record` has none."""
        unknown = set(record) - set(SUMMARY_KEYS)
        if unknown:
            raise KeyError(f"not keys of a summary: {sorted(unknown)}")
        write_atomically(self.summary, to_json({key: record.get(key) for key in SUMMARY_KEYS}) + "\n")

    def append_metrics(self, *records: Mapping[str, Any]) -> None:
        """Append each record to `metrics.jsonl` as one line, in a single write, so that a kill or a full disk tears at most
        the last line; a line that was torn before is cut off first."""
        append_lines(self.metrics, records)

    def append_fault(self, fault: Mapping[str, Any]) -> bool:
        """Append one record to `faults.jsonl`; or return False where its `launch` and `attempt` have one already: what comes
        first is the cause, what the other ranks see after it are consequences."""
        with self.faults.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if any(
                (known["launch"], known["attempt"]) == (fault["launch"], fault["attempt"])
                for known in self.read_faults()
            ):
                return False
            append_lines(self.faults, [fault])
            return True

    def read_faults(self) -> list[dict[str, Any]]:
        """All records of `faults.jsonl`, oldest first."""
        return read_lines(self.faults)

    def keep_metrics(self, step: int) -> None:
        """Drop the records after `step`, and a torn last line: a run that resumes there writes them anew."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete records of `metrics.jsonl`; a last line torn by a kill is left out."""
        return read_lines(self.metrics)
