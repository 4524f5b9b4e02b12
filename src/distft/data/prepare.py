"""From a recipe to tokenized samples: read, format, split, tokenize, and cache the result.

A prepared sample is {"input_ids": [int], "labels": [int]}, both of the same length. Labels are -100 where the loss
ignores the token; the last label of a sample that was not truncated is the end-of-sequence token.
"""

from __future__ import annotations

import array
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.table import MemoryMappedTable
from datasets.utils.logging import disable_progress_bar

from distft.config.recipe import Recipe
from distft.data.formats import check_columns, format_rows, formatter
from distft.data.inference import with_format
from distft.data.pieces import TRUNCATED, Worker
from distft.data.sources import Rows, data_sources, read_source, source_notes
from distft.data.splits import Examples, Members, save_rows, split_members
from distft.data.templates import Dropped
from distft.data.token_store import Draw, store_of
from distft.errors import DataError
from distft.files import build_folder_once
from distft.paths import cache_folder
from distft.text import count

_VERSION = 6
"""Part of the cache key: raise it whenever the same recipe and rows should give different samples."""


@dataclass(frozen=True)
class Report:
    """What preparing the data did, in samples (or tokens) per split."""

    rows: dict[str, int]
    dropped: dict[str, int]
    """Rows that are not trained on, over all splits, by the reason: `an empty response`."""
    noted: dict[str, int]
    """What else was found, in rows: `null prompt`, `empty completion`."""
    dropped_untrained: dict[str, int]
    """Samples that truncation left without any trained token."""
    truncated: dict[str, int]
    tokens: dict[str, int]
    trained: dict[str, int]
    """Trained tokens of conversations by the role that speaks, over all splits."""
    marked: dict[str, int]
    """Samples whose text brings the token that begins or ends a sequence, by token; it is not added again."""
    overlap: dict[str, int]
    """Samples of `validation` and `test` whose text is also that of a training sample."""
    digest: str
    """Hash of the training texts in order: independent of the tokenizer and of file names."""
    held_out_digest: str
    """Hash of the validation and test texts in order."""
    notes: tuple[str, ...] = ()
    """What else to tell the user about this run's data; not cached."""

    def lines(self) -> list[str]:
        sizes = ", ".join(f"{name} {count:,}" for name, count in self.rows.items())
        found = [f"data: {sizes} samples; {self.tokens['train']:,} training tokens"]
        for reason, number in self.dropped.items():
            found.append(f"data: dropped {number:,} rows with {reason}")
        if list(self.noted.values()) not in ([], [*self.dropped.values()]):  # one kind, all dropped, has just been said
            kinds = ", ".join(f"{what} in {count(number, 'row')}" for what, number in self.noted.items())
            found.append(f"data: {kinds}")
        if self.trained:
            roles = ", ".join(f"{number:,} of {role}" for role, number in self.trained.items())
            found.append(f"data: trained tokens: {roles}")
        if untrained := sum(self.dropped_untrained.values()):
            found.append(f"data: dropped {untrained:,} samples: training.max_length leaves nothing to train on")
        if truncated := sum(self.truncated.values()):
            found.append(f"data: truncated {truncated:,} samples to training.max_length")
        for token, number in self.marked.items():
            found.append(f"data: {count(number, 'sample')} with {token} in the text, which is not added again")
        for name, number in self.overlap.items():
            if number:
                found.append(
                    f"data: {number:,} of {self.rows[name]:,} {name} samples also occur in the training split, so that "
                    "figures on that split are not those of unseen text"
                )
        return [*found, *(f"data: {note}" for note in self.notes)]


@dataclass(frozen=True)
class Splits:
    """Prepared samples; `validation` and `test` are None if the recipe has no such split. `recipe` names the format of
    the data, also where that was inferred."""

    recipe: Recipe
    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    report: Report
    inferred: str | None = None
    """What was inferred of the format, in words; None if the recipe names it."""


def prepare_data(recipe: Recipe, tokenizer: Any) -> Splits:
    """The recipe's data, tokenized once and cached on disk.

    The first process to arrive does the work. The others wait for its file lock rather than in a collective, which
    could time out.

    Raises:
        DataError: the data is missing, unreadable or empty, lacks a column, or has no rows left to train on.
    """
    disable_progress_bar()
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "the model's tokenizer has no fast version, which distft needs to map tokens to characters; "
            "set model.tokenizer"
        )
    recipe, inferred = with_format(recipe, tokenizer)
    data, form = recipe.data, formatter(recipe, tokenizer)
    raw, *held_out = map(read_source, data_sources(data))
    test = held_out[0] if held_out else None
    for rows in (raw, *held_out):
        check_columns(rows, data)
    max_length = recipe.training.get("max_length", 1024)
    key = {
        "version": _VERSION,
        "format": form.key(),
        "max_length": max_length,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "ends": [tokenizer.bos_token_id, tokenizer.eos_token_id],
    }
    work = Worker(Path(), form, tokenizer, max_length)
    processes = recipe.training.get("dataset_num_proc")
    stores = [store_of(raw, work, key, processes, _draw(recipe, tokenizer))]
    if test is not None:
        stores.append(store_of(test, work, key, processes))
    place = {
        "stores": [store.folder.name for store in stores],
        "splits": [data.validation_fraction, data.test_fraction, data.max_samples],
        "seed": recipe.run.seed,
    }
    folder = cache_folder() / "data" / hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()[:16]

    def build(temporary: Path) -> None:
        samples, report = _split(recipe, Examples(stores))
        for name, rows in samples.items():
            save_rows(temporary / f"{name}.arrow", rows)
        (temporary / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")

    build_folder_once(folder, build)
    report = Report(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
    notes = [*([] if inferred is None else [inferred]), *form.lines(), *source_notes(data)]
    report = replace(report, notes=(*notes, *_batch_notes(recipe, report)))
    table = Examples(stores).samples()
    splits: dict[str, Dataset | None] = {
        name: Dataset(table, indices_table=MemoryMappedTable.from_file(str(file)), fingerprint=f"{folder.name}{name}")
        for name in ("train", "validation", "test")
        if (file := folder / f"{name}.arrow").exists()
    }
    train = splits["train"]
    assert train is not None
    return Splits(recipe, train, splits.get("validation"), splits.get("test"), report, inferred)


def _batch_notes(recipe: Recipe, report: Report) -> list[str]:
    """Say so if the training split is smaller than one global batch."""
    sizes = {"global_batch_size": report.rows["train"], "global_batch_tokens": report.tokens["train"]}
    return [
        f"batching.{key}={asked:,} is more than the {have:,} of the training split: every step has {have:,}"
        for key, have in sizes.items()
        if (asked := getattr(recipe.batching, key)) is not None and asked > have
    ]


def _split(recipe: Recipe, examples: Examples) -> tuple[dict[str, Members], Report]:
    """The samples of each split that has any, and the report; a second store is the official test split."""
    data, store, official = recipe.data, examples.stores[0], examples.stores[1:]
    parts = split_members(store.kept, data, recipe.run.seed, with_test=not official)
    if data.max_samples is not None:  # the store has only these, in the order of the rows
        parts = dict(zip(parts, _ranks(list(parts.values())), strict=True))
    if official:
        parts["test"] = np.arange(*examples.starts[1:])
    dropped, noted = (
        dict(sum((getattr(each, name) for each in examples.stores), Counter[str]())) for name in ("dropped", "noted")
    )
    if not store.kept:
        reasons = ", ".join(store.dropped)
        raise DataError(
            f"no row is left to train on: {store.rows} of {store.rows} rows have nothing to train on ({reasons})"
        )
    if not len(parts["train"]):
        raise DataError(
            f"no row is left to train on: {store.rows - store.kept} of {store.rows} rows are empty, the rest went to "
            "the other splits\n  give more rows, or set data.validation_fraction=0 data.test_fraction=0 "
            "training.eval_strategy=no"
        )
    samples = {name: examples.sample_numbers(members) for name, members in parts.items()}
    for name, members in parts.items():
        if len(members) and not len(samples[name]):
            raise DataError(
                f"all {len(members)} samples of the {name} split were dropped: training.max_length="
                f"{recipe.training.get('max_length', 1024)} leaves nothing to train on"
            )
    used = {name: examples.known[members[examples.is_sample(members)]] for name, members in parts.items()}
    everything = np.concatenate(list(parts.values()))
    report = Report(
        rows={name: len(rows) for name, rows in samples.items()},
        dropped=dropped,
        noted=noted,
        dropped_untrained={name: len(members) - len(samples[name]) for name, members in parts.items()},
        truncated={name: int(((each["flags"] & TRUNCATED) != 0).sum()) for name, each in used.items()},
        tokens={name: int(each["length"].sum(dtype=np.int64)) for name, each in used.items()},
        trained=dict(examples.counted("trained", everything)),
        marked=dict(examples.counted("marked", everything)),
        overlap={
            name: examples.repeated(members, parts["train"])
            for name, members in parts.items()
            if name != "train" and len(members)
        },
        digest=examples.digest(parts["train"]),
        held_out_digest=examples.digest(np.concatenate([parts["validation"], parts["test"]])),
    )
    return {name: rows for name, rows in samples.items() if len(rows)}, report


def _ranks(parts: Sequence[Members]) -> list[Members]:
    """The numbers in `parts`, which differ from each other, by their rank among all of them."""
    ranks = np.argsort(np.argsort(np.concatenate(parts)))
    return np.split(ranks, np.cumsum([len(part) for part in parts])[:-1])


def _draw(recipe: Recipe, tokenizer: Any) -> Draw | None:
    """With data.max_samples: how to find the rows that the splits consist of, so that no other is tokenized."""
    data, seed = recipe.data, recipe.run.seed
    if data.max_samples is None:
        return None

    def rows_of(rows: Rows) -> tuple[Members, dict[str, Any]]:
        tally = {"dropped": Counter[str](), "noted": Counter[str]()}
        kept, number = array.array("q"), -1
        for number, (_, example) in enumerate(format_rows(rows, recipe, tokenizer=tokenizer)):
            tally["noted"].update(example.notes)
            if isinstance(example, Dropped):
                tally["dropped"][example.reason] += 1
            else:
                kept.append(number)
        parts = split_members(len(kept), data, seed, with_test=True)
        drawn = np.array(kept)[np.sort(np.concatenate(list(parts.values())))]
        return drawn, {"rows": number + 1, "kept": len(kept), **tally}

    return Draw([data.max_samples, seed], rows_of)
