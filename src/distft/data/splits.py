"""Which examples form which split, and what follows from that: samples, counts, and digests.

Examples are numbered over all stores of a recipe, one store after the other.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.table import MemoryMappedTable, Table, concat_tables

from distft import upstream_api
from distft.config.schema import Data
from distft.data.pieces import TRAINED, Array
from distft.data.token_store import TokenStore

Members = np.ndarray[Any, np.dtype[np.int64]]
"""Numbers of the examples of a split, in its order."""


def split_members(number: int, data: Data, seed: int, with_test: bool) -> dict[str, Members]:
    """Split a permutation of 0 … `number` - 1 by `seed` into train, validation and test (empty unless `with_test`).

    15,011 rows at 80/10/10 become 12,008, 1,501 and 1,502.
    """
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).numpy()[: data.max_samples]
    test_fraction = data.test_fraction if with_test else 0.0
    train = int(len(order) * (1 - data.validation_fraction - test_fraction) + 1e-6)
    validation = len(order) - train if not test_fraction else int(len(order) * data.validation_fraction + 1e-6)
    bounds = {"train": (0, train), "validation": (train, train + validation), "test": (train + validation, len(order))}
    return {name: order[low:high] for name, (low, high) in bounds.items()}


def split_rows(rows: Sequence[Any], data: Data, seed: int, *, with_test: bool) -> dict[str, list[Any]]:
    """Do what `split_members` does with the rows themselves."""
    members = split_members(len(rows), data, seed, with_test=with_test)
    return {name: [rows[i] for i in numbers.tolist()] for name, numbers in members.items()}


@dataclass(frozen=True)
class Examples:
    """All examples of a recipe: those of each store, one store after the other."""

    stores: Sequence[TokenStore]

    @functools.cached_property
    def known(self) -> Array:
        """[examples] of `pieces.EXAMPLE`."""
        return np.concatenate([store.examples for store in self.stores])

    @functools.cached_property
    def starts(self) -> list[int]:
        """The number of each store's first example, and of all examples."""
        return [0, *np.cumsum([len(store.examples) for store in self.stores]).tolist()]

    def is_sample(self, members: Members) -> Array:
        """Whether each example has a trained token."""
        return np.asarray((self.known["flags"][members] & TRAINED) != 0)

    def sample_numbers(self, members: Members) -> Members:
        """The members that are samples, as rows of `samples`."""
        number = np.cumsum((self.known["flags"] & TRAINED) != 0) - 1
        return np.asarray(number[members[self.is_sample(members)]], dtype=np.int64)

    def samples(self) -> Table:
        """All samples of all stores, memory-mapped."""
        files = [file for store in self.stores for file in store.arrow_files]
        return concat_tables([MemoryMappedTable.from_file(str(file)) for file in files])

    def difficulties(self, members: Members) -> Array | None:
        """The numbers of the members that are samples, in the column that data.order names; None if it names none."""
        known = [store.difficulties for store in self.stores]
        if all(found is None for found in known):
            return None
        everything = [  # a held-out store has none
            np.zeros(len(store.examples)) if found is None else found
            for store, found in zip(self.stores, known, strict=True)
        ]
        return np.asarray(np.concatenate(everything)[members[self.is_sample(members)]])

    def counted(self, name: Literal["marked", "trained"], members: Members) -> Counter[str]:
        """The sums over the members of what the stores count."""
        times = np.bincount(members, minlength=self.starts[-1])
        total = Counter[str]()
        for start, store in zip(self.starts, self.stores, strict=False):
            for key, found in getattr(store, name).items():
                total[key] += int((times[found[:, 0] + start] * found[:, 1]).sum())
        return +total

    def repeated(self, members: Members, others: Members) -> int:
        """How many of the members have the text of one of the `others`."""
        return int(np.isin(self.known["text"][members], self.known["text"][others]).sum())

    def digest(self, members: Members) -> str:
        """A hash of the texts of the members in order, and of their trained parts.

        If the texts are too large to be read in this order, it is one of their hashes.
        """
        texts = [store.texts() for store in self.stores]
        found = hashlib.sha256()
        if any(text is None for text in texts):
            found.update(self.known["content"][members].tobytes())
            return found.hexdigest()[:16]
        ends = [np.cumsum(store.examples["bytes"], dtype=np.int64) for store in self.stores]
        sizes = self.known["bytes"][members].tolist()
        of_store = (np.searchsorted(self.starts, members, side="right") - 1).tolist()
        for member, size, number in zip(members.tolist(), sizes, of_store, strict=True):
            text, end = texts[number], int(ends[number][member - self.starts[number]])
            assert text is not None
            found.update(text[end - size : end])
        return found.hexdigest()[:16]


def save_rows(file: Path, rows: Members) -> None:
    """Save rows of a table as what `Dataset` takes for `indices_table`."""
    table = pa.table({"indices": pa.array(rows, pa.uint64())})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


def lengths_of(samples: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens per sample, from the Arrow offsets alone."""
    chunks = [chunk.value_lengths().to_numpy() for chunk in samples.data.column("input_ids").chunks]
    lengths = np.concatenate(chunks) if chunks else np.zeros(0)
    rows = upstream_api.dataset_rows(samples)
    return np.asarray(lengths if rows is None else lengths[rows], dtype=np.int64)


def padded_lengths(samples: Dataset, *, pairs: bool) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens that each sample takes in padded rows; of a pair, both rows are as wide as the longer sequence."""
    lengths = lengths_of(samples)
    if not pairs:
        return lengths
    chosen = np.asarray(samples.with_format("numpy")["chosen"][:], dtype=np.int64)
    return np.asarray(2 * np.maximum(chosen, lengths - chosen), dtype=np.int64)


def longest_sequence(samples: Dataset) -> int:
    """Tokens of the longest sequence: of a pair, the longer of its two."""
    lengths = lengths_of(samples)
    if "chosen" in samples.column_names:
        chosen = np.asarray(samples.with_format("numpy")["chosen"][:], dtype=np.int64)
        lengths = np.maximum(chosen, lengths - chosen)
    return int(lengths.max())


def first_samples(samples: Dataset | None, limit: int | None) -> Dataset | None:
    """The first `limit` samples, or all of them if `limit` is None."""
    return samples if samples is None or limit is None else samples.select(range(min(len(samples), limit)))
