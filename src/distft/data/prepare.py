"""From a recipe to tokenized samples: read, format, split, tokenize, and cache the result.

A prepared sample is {"input_ids": [int], "labels": [int]}, both of the same length. Labels are -100 where the loss
ignores the token; the last label of a sample that was not truncated is the end-of-sequence token.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, List, Value, load_from_disk
from datasets.utils.logging import disable_progress_bar

from distft.config.recipe import Recipe
from distft.config.schema import Data
from distft.data.formats import check_columns, format_rows, formatter
from distft.data.inference import with_format
from distft.data.sources import Rows, data_sources, read_source, source_notes
from distft.data.templates import Dropped, Example
from distft.data.tokenize import IGNORED, tokenize
from distft.errors import DataError
from distft.files import build_folder_once
from distft.paths import cache_folder
from distft.text import count

_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
_VERSION = 5
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
    max_length = recipe.training.get("max_length", 1024)
    key = {
        "version": _VERSION,
        "format": form.key(),
        "splits": [data.validation_fraction, data.test_fraction, data.max_samples],
        "sources": [None if each is None else each.digest() for each in (raw, test)],
        "seed": recipe.run.seed,
        "max_length": max_length,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "ends": [tokenizer.bos_token_id, tokenizer.eos_token_id],
    }
    folder = cache_folder() / "data" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def build(temporary: Path) -> None:
        splits, report = _prepare(recipe, tokenizer, raw, test, max_length)
        splits.save_to_disk(temporary)
        (temporary / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")

    build_folder_once(folder, build)
    splits = DatasetDict(load_from_disk(str(folder)))
    report = Report(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
    notes = [*([] if inferred is None else [inferred]), *form.lines(), *source_notes(data)]
    report = replace(report, notes=(*notes, *_batch_notes(recipe, report)))
    return Splits(recipe, splits["train"], splits.get("validation"), splits.get("test"), report, inferred)


def _batch_notes(recipe: Recipe, report: Report) -> list[str]:
    """Say so if the training split is smaller than one global batch."""
    sizes = {"global_batch_size": report.rows["train"], "global_batch_tokens": report.tokens["train"]}
    return [
        f"batching.{key}={asked:,} is more than the {have:,} of the training split: every step has {have:,}"
        for key, have in sizes.items()
        if (asked := getattr(recipe.batching, key)) is not None and asked > have
    ]


def _prepare(
    recipe: Recipe, tokenizer: Any, raw: Rows, official: Rows | None, max_length: int | None
) -> tuple[DatasetDict, Report]:
    """Format, split and tokenize `raw`; `official` holds the rows of a separate test split, if there is one."""
    data, tally = recipe.data, _Tally()
    rows, kept = _examples(recipe, tokenizer, raw, tally)
    parts: dict[str, list[Example]] = split_rows(kept, data, recipe.run.seed, with_test=official is None)
    if official is not None:
        _, parts["test"] = _examples(recipe, tokenizer, official, tally)
    if not kept:
        reasons = ", ".join(tally.dropped)
        raise DataError(f"no row is left to train on: {rows} of {rows} rows have nothing to train on ({reasons})")
    if not parts["train"]:
        raise DataError(
            f"no row is left to train on: {rows - len(kept)} of {rows} rows are empty, the rest went to the other "
            "splits\n  give more rows, or set data.validation_fraction=0 data.test_fraction=0 training.eval_strategy=no"
        )
    counts: dict[str, dict[str, int]] = {"rows": {}, "dropped_untrained": {}, "truncated": {}, "tokens": {}}
    splits: dict[str, Dataset] = {}
    for name, examples in parts.items():
        ids, labels, truncated = [], [], 0
        for sample_ids, sample_labels, cut in tokenize(examples, tokenizer, max_length, tally.marked, tally.trained):
            if any(label != IGNORED for label in sample_labels):
                ids.append(np.asarray(sample_ids, dtype=np.int32))
                labels.append(np.asarray(sample_labels, dtype=np.int32))
                truncated += cut
        if examples and not ids:
            raise DataError(
                f"all {len(examples)} samples of the {name} split were dropped: training.max_length={max_length} "
                "leaves nothing to train on"
            )
        counts["rows"][name], counts["truncated"][name] = len(ids), truncated
        counts["dropped_untrained"][name] = len(examples) - len(ids)
        counts["tokens"][name] = sum(map(len, ids))
        if ids:
            splits[name] = Dataset.from_dict({"input_ids": ids, "labels": labels}, features=_FEATURES)
    trained = {example.text for example in parts["train"]}
    overlap = {
        name: sum(example.text in trained for example in examples)
        for name, examples in parts.items()
        if name != "train" and examples
    }
    report = Report(
        rows=counts["rows"],
        dropped=dict(tally.dropped),
        noted=dict(tally.noted),
        dropped_untrained=counts["dropped_untrained"],
        truncated=counts["truncated"],
        tokens=counts["tokens"],
        trained=dict(tally.trained),
        marked=dict(tally.marked),
        overlap=overlap,
        digest=texts_digest(parts["train"]),
        held_out_digest=texts_digest([*parts["validation"], *parts["test"]]),
    )
    return DatasetDict(splits), report


@dataclass(frozen=True)
class _Tally:
    """Counts for the report, under the names that they have there."""

    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    trained: Counter[str] = field(default_factory=Counter)
    marked: Counter[str] = field(default_factory=Counter)


def _examples(recipe: Recipe, tokenizer: Any, rows: Rows, tally: _Tally) -> tuple[int, list[Example]]:
    """The number of `rows`, and the examples of those that have something to train on.

    Raises:
        DataError: there are no rows, a column is missing, or a row does not fit the format.
    """
    check_columns(rows, recipe.data)
    total, kept = 0, []
    for _, example in format_rows(rows, recipe, tokenizer=tokenizer):
        total += 1
        tally.noted.update(example.notes)
        if isinstance(example, Dropped):
            tally.dropped[example.reason] += 1
        else:
            kept.append(example)
    if not total:
        raise DataError(f"{rows.name} is empty")
    return total, kept


def texts_digest(examples: Iterable[Example]) -> str:
    """A hash of the texts in order, and of their trained parts."""
    texts = hashlib.sha256()
    for example in examples:
        parts = example.trained if example.rendered else [example.first_trained]
        texts.update(json.dumps([example.text, *parts]).encode())
    return texts.hexdigest()[:16]


def split_rows(rows: Sequence[Any], data: Data, seed: int, *, with_test: bool) -> dict[str, list[Any]]:
    """Split a permutation of `rows` by `seed` into train, validation and test (empty unless `with_test`).

    15,011 rows at 80/10/10 become 12,008, 1,501 and 1,502.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    order = order[: data.max_samples]
    test_fraction = data.test_fraction if with_test else 0.0
    train = int(len(order) * (1 - data.validation_fraction - test_fraction) + 1e-6)
    validation = len(order) - train if not test_fraction else int(len(order) * data.validation_fraction + 1e-6)
    bounds = {"train": (0, train), "validation": (train, train + validation), "test": (train + validation, len(order))}
    return {name: [rows[i] for i in order[low:high]] for name, (low, high) in bounds.items()}


def lengths_of(samples: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens per sample, read from the Arrow offsets without creating Python objects."""
    column = samples.with_format("arrow")[:].column("input_ids")
    return np.asarray(column.combine_chunks().value_lengths(), dtype=np.int64)


def first_samples(samples: Dataset | None, limit: int | None) -> Dataset | None:
    """The first `limit` samples, or all of them if `limit` is None."""
    return samples if samples is None or limit is None else samples.select(range(min(len(samples), limit)))
