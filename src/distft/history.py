"""What runs logged, step by step: of run folders, and of anybody's transformers Trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distft.errors import RunFolderError
from distft.run import RunFolder


@dataclass(frozen=True)
class History:
    """The records of one run, oldest first, each with its `step`; `profile` is its profile.json. Runs of one `variant` are repeats."""

    name: str
    variant: str
    records: Sequence[Mapping[str, Any]] = field(repr=False)
    profile: Mapping[str, Any] | None = field(default=None, repr=False)

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
            RunFolderError: it is neither.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path} cannot be read as JSON: {error}") from error
        records = content.get("log_history") if isinstance(content, dict) else content
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise RunFolderError(f"{path} holds no log_history: a list of records, or a trainer_state.json")
        steps = [record for record in records if isinstance(record.get("step"), int)]
        name = path.parent.name if path.stem == "trainer_state" else path.stem
        return cls(name, name, steps)

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        """The values of two keys in the records that have both."""
        return [
            (float(record[x]), float(record[y]))
            for record in self.records
            if isinstance(record.get(x), int | float) and isinstance(record.get(y), int | float)
        ]
