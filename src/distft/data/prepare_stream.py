"""What `prepare_data` does for a recipe with data.streaming: the held-out rows, and the first window of the stream."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from datasets.table import MemoryMappedTable, concat_tables

from distft.config.recipe import Recipe
from distft.config.schema import Data
from distft.data.files import Row
from distft.data.formats import check_columns, formatter
from distft.data.inference import with_format
from distft.data.pieces import CUT_INSIDE, TRAINED, TRUNCATED, UNCUTTABLE, Worker
from distft.data.prepare import Splits, what_samples_depend_on
from distft.data.report import Report
from distft.data.sources import Rows, read_data, source_notes
from distft.data.splits import Examples, Members
from distft.data.stream import Stream
from distft.data.token_store import store_of
from distft.errors import DataError
from distft.paths import cache_folder


@dataclass(frozen=True)
class Beginning:
    """The first rows of several parts, as one part."""

    rows: Rows
    number: int
    name: str

    def __iter__(self) -> Iterator[Row]:
        return itertools.islice(self.rows, self.number)

    def columns(self, wanted: Collection[str]) -> list[str]:
        return self.rows.parts[0].columns(wanted)

    def digest(self) -> str:
        return f"{self.rows.digest()} {self.number}"


def prepare_stream(recipe: Recipe, tokenizer: Any) -> Splits:
    """The held-out splits of a stream; `train` is its first window.

    Raises:
        DataError: as `prepare_data`; or the stream has fewer samples than a window.
    """
    recipe, inferred = with_format(recipe, tokenizer)
    data, form = recipe.data, formatter(recipe, tokenizer)
    raw, *official = read_data(data)
    for rows in (raw, *official):
        check_columns(rows, data)
    key = what_samples_depend_on(recipe, form, tokenizer)
    size = window_size(recipe)
    held_out = round(size * (data.validation_fraction + (0 if official else data.test_fraction)))
    stream = Stream(
        _folder(key, raw, size, held_out), raw, form, tokenizer, recipe.training.get("max_length", 1024), size, held_out
    )
    work, processes = Worker(Path(), form, tokenizer, stream.max_length), recipe.training.get("dataset_num_proc")
    beginning = [Rows(raw.name, [Beginning(raw, held_out, raw.name)])] if held_out else []
    examples = Examples([store_of(rows, work, key, processes) for rows in (*beginning, *official)])
    members = _held_out(data, examples, recipe.run.seed, official=bool(official))
    splits = {name: _samples(examples, each, stream, name) for name, each in members.items()}
    first = stream.window(0)  # after the beginning, which is in the same files
    report = replace(
        _report(stream, examples, members),
        notes=(
            f"streamed in windows of {size:,} samples; the training counts are those of the first one",
            *([inferred] if inferred else []),
            *form.lines(),
            *source_notes(data),
        ),
    )
    train = Dataset(MemoryMappedTable.from_file(str(first.file)), fingerprint=f"{stream.folder.name}train")
    return Splits(recipe, train, splits.get("validation"), splits.get("test"), report, inferred, stream=stream)


def window_size(recipe: Recipe) -> int:
    """Samples of a window: whole global batches, at least one."""
    batch = recipe.batching.global_batch_size
    assert batch is not None
    return max(recipe.data.window // batch, 1) * batch


def _folder(key: dict[str, Any], rows: Rows, size: int, held_out: int) -> Path:
    place = key | {"rows": rows.digest(), "size": size, "held_out": held_out, "form": 1}
    name = hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "streams" / name


def _held_out(data: Data, examples: Examples, seed: int, *, official: bool) -> dict[str, Members]:
    """The examples of the held-out splits. Rows at the beginning are shuffled, so that both splits are of all of
    them."""
    sizes = [len(store.examples) for store in examples.stores]
    number = sum(sizes[:-1] if official else sizes)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).numpy()
    if official:
        return {"validation": order, "test": np.arange(number, sum(sizes))}
    share = data.validation_fraction + data.test_fraction
    validation = round(number * data.validation_fraction / share) if share else 0
    return {"validation": order[:validation], "test": order[validation:]}


def _samples(examples: Examples, members: Members, stream: Stream, name: str) -> Dataset | None:
    if not len(members):
        return None
    rows = examples.sample_numbers(members)
    if not len(rows):
        raise DataError(
            f"all {len(members)} samples of the {name} split were dropped: training.max_length={stream.max_length} "
            "leaves nothing to train on"
        )
    return Dataset(concat_tables([examples.samples()]), fingerprint=f"{stream.folder.name}{name}").select(rows)


def _report(stream: Stream, examples: Examples, members: dict[str, Members]) -> Report:
    """What was done for the first window and the held-out rows."""
    first, held_out = stream.record(0), np.concatenate(list(members.values()))
    known = {name: examples.known[each] for name, each in members.items() if len(each)}
    used = {name: each[(each["flags"] & TRAINED) != 0] for name, each in known.items()}

    def counted(name: str) -> dict[str, int]:
        return dict(sum((Counter(getattr(each, name)) for each in examples.stores), Counter[str](first[name])))

    def of_examples(name: Literal["trained", "marked"]) -> dict[str, int]:
        return dict(Counter[str](first[name]) + (examples.counted(name, held_out) if len(held_out) else Counter()))

    def flagged(name: str, flag: int, of: dict[str, Any]) -> dict[str, int]:
        return {"train": first["samples"].get(name, 0)} | {
            split: int(((each["flags"] & flag) != 0).sum()) for split, each in of.items()
        }

    lengths = {name: int(each["length"].sum(dtype=np.int64)) for name, each in used.items()}
    return Report(
        rows={"train": stream.size} | {name: len(used.get(name, ())) for name in members},
        dropped=counted("dropped"),
        noted=counted("noted"),
        dropped_untrained={"train": first["samples"].get("untrained", 0)}
        | {name: len(each) - len(used[name]) for name, each in known.items()},
        truncated=flagged("truncated", TRUNCATED, used),
        tokens={"train": first["tokens"]} | lengths,
        trained=of_examples("trained"),
        marked=of_examples("marked"),
        overlap={},
        digest=stream.folder.name,
        held_out_digest=examples.digest(held_out) if len(held_out) else "",
        cut_inside=flagged("cut_inside", CUT_INSIDE, used),
        uncuttable=flagged("uncuttable", UNCUTTABLE, known),
    )
