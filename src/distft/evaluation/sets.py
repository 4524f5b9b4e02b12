"""Result sets: what a task found on one set of data. Another data file gets a set of its own next to the first.

`evaluation.json` has the results on the run's own data under the name of the task (`imdb`), those on other data under
`imdb@NAME`. Raw outputs are in the folder of the same name. Importing this module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from distft.config.evaluation import OF_TASK, TaskName
from distft.config.recipe import Recipe
from distft.data.patterns import Patterns, stem
from distft.data.remote import Remote, is_remote
from distft.data.sources import KNOWN_DATASETS, HubSplit, Source, data_sources, parts_of
from distft.text import redacted

_HOW_ASKED = ("endpoint", "api_key_env", "concurrency", "timeout_s", "retries")
"""Settings of a judge that do not change its judgement."""
_LONGEST = 60
"""Characters of a name that comes from the data."""


@dataclass(frozen=True)
class DataOf:
    """What a task measures on: a short name, and the place, which is the same for the same data."""

    name: str
    place: str

    @classmethod
    def at(cls, source: Source) -> DataOf:
        """Files, a folder, or a split on the hub."""
        if isinstance(source, HubSplit):
            return cls(_plain(source.name.rpartition("/")[2]), json.dumps(source))
        if isinstance(source, Patterns):
            place = redacted(source.folder) if is_remote(source.folder) else str(Path(source.folder).resolve())
            return cls(_plain(source.stem or "files"), json.dumps([place, *map(redacted, source.patterns)]))
        if isinstance(source, Remote):
            return cls(_plain(stem(str(source)) or "files"), str(source))
        return cls(_plain(source.name.partition(".")[0] or source.name), str(source.resolve()))

    @classmethod
    def listed(cls, names: Sequence[str], place: str) -> DataOf:
        """Several benchmarks."""
        return cls(_plain("+".join(names)), place)

    @classmethod
    def held_out(cls, recipe: Recipe) -> DataOf:
        """The recipe's held-out rows."""
        data = recipe.data
        if data.sources is not None:
            return cls("+".join(parts_of(data)), json.dumps(list(map(str, data_sources(data)))))
        found = cls.at(data_sources(data)[-1])
        known = data.name in KNOWN_DATASETS and not (data.path or data.files or data.test_path)
        return cls(data.name, found.place) if known else found


def key_of_set(
    task: TaskName, data: DataOf | None, own: DataOf | None, name: str | None, results: Mapping[str, Mapping[str, Any]]
) -> str:
    """The key of a task's results on `data` among `results`, whether or not it is there.

    Args:
        own: the run's own data; None if its recipe names none, or the model's training is not known. The first data
            are its own then.
        name: of the set, if the user gives one.
    """
    if name is not None:
        return f"{task}@{name}"
    there = (results.get(task) or {}).get("data")
    if (
        data is None
        or data == own
        or (own is None and (task not in results or (there or {}).get("place") == data.place))
    ):
        return str(task)
    for number in count(1):
        key = f"{task}@{data.name}" + ("" if number == 1 else f"-{number}")
        found = (results.get(key) or {}).get("data")
        if key not in results or (found or {}).get("place") == data.place:
            return key
    raise AssertionError


def split_key(key: str) -> tuple[str, str]:
    """The task and the name of the set, empty for the run's own data."""
    task, _, name = key.partition("@")
    return task, name


def asked(task: str, recipe: Recipe) -> str:
    """A digest of the settings that decide a task's result, besides model and data."""
    settings = recipe.evaluation.model_dump()
    judge = {key: value for key, value in settings["judge"].items() if key not in _HOW_ASKED}
    generation = {
        key: value
        for key, value in settings["generation"].items()
        if key != "batch_tokens" and (key not in OF_TASK or task == "generation")
    }
    is_judged = task in ("mt_bench", "alpaca") or (task == "generation" and recipe.evaluation.generation.judged)
    judged = [generation, judge] if is_judged else []
    own = generation if task == "generation" else settings.get(task)
    parts = [own, settings["seed"], settings["max_samples"], *judged]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _plain(name: str) -> str:
    """`name` as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-")[:_LONGEST] or "data"
