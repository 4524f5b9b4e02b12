"""The order of a curriculum: from how hard each sample is to the stage of an epoch that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset

from distft.config.schema import Data
from distft.data.batch_plan import Lengths
from distft.data.pieces import Array
from distft.data.tokenize import IGNORED
from distft.errors import DataError
from distft.text import count

_AT_ONCE = 1_000
_SHOWN = 6
"""Stages whose ranges are printed."""


def difficulties_of(data: Data, lengths: Lengths, column: Array | None) -> Array | None:
    """How hard each training sample is: its length, or its number in a `column`; None if the order needs none, or a
    model has to say it."""
    return lengths if data.order == "length" else column


def known_stages(data: Data, lengths: Lengths, column: Array | None) -> Lengths | None:
    """The stages of the samples, as far as `difficulties_of` knows them."""
    found = difficulties_of(data, lengths, column)
    return None if found is None else stage_numbers(found, data.stages)


def stage_numbers(difficulties: Array, stages: int) -> Lengths:
    """The stage of each sample: `stages` stages of equally many samples (up to one), the easiest first. Samples that
    are equally hard keep their order.

    Raises:
        DataError: there are fewer samples than stages.
    """
    if len(difficulties) < stages:
        raise DataError(
            f"data.stages={stages} needs at least as many training samples, and there are {len(difficulties)}; lower it"
        )
    found: Lengths = np.empty(len(difficulties), dtype=np.int64)
    for number, members in enumerate(np.array_split(np.argsort(difficulties, kind="stable"), stages)):
        found[members] = number
    return found


def order_line(data: Data, difficulties: Array, unit: str) -> str:
    """What to tell the user about the stages of an epoch."""
    parts = stage_numbers(difficulties, data.stages)
    ranges = [
        f"{found.min():,.4g}–{found.max():,.4g}"
        for found in (difficulties[parts == number] for number in range(data.stages))
    ]
    shown = ", ".join(ranges if len(ranges) <= _SHOWN else [*ranges[: _SHOWN - 1], "…", ranges[-1]])
    size = len(difficulties) // data.stages
    return f"order: by {data.order} in {count(data.stages, 'stage')} of {size:,} samples: {shown} {unit}".rstrip()


def order_notes(data: Data, samples: int, difficulties: Array | None) -> list[str]:
    """What is known of the order before a run; `difficulties` are known unless they are losses of the base.

    Raises:
        DataError: an epoch has fewer samples than stages.
    """
    if data.order == "shuffled":
        return []
    stage_numbers(np.zeros(samples), data.stages)
    if difficulties is None:
        stages = f"{count(data.stages, 'stage')} of {samples // data.stages:,} samples"
        return [f"order: by the loss of the base in {stages}; a run scores each sample once, and keeps the scores"]
    return [order_line(data, difficulties, "tokens" if data.order == "length" else "")]


def trained_tokens(samples: Dataset) -> Lengths:
    """The number of tokens of each sample that are predicted and trained; nothing predicts the first."""
    return np.array([int((labels[1:] != IGNORED).sum()) for _, labels in _arrays(samples)], dtype=np.int64)


def sample_hashes(samples: Dataset) -> Array:
    """A hash of the tokens and labels of each sample, [samples] of uint64."""
    found = [xxhash.xxh3_64_intdigest(ids.tobytes() + labels.tobytes()) for ids, labels in _arrays(samples)]
    return np.array(found, dtype=np.uint64)


def _arrays(samples: Dataset) -> Iterator[tuple[Array, Array]]:
    """The tokens and labels of each sample. A batch of rows is in memory at a time."""
    for table in samples.with_format("arrow").iter(_AT_ONCE):
        of_column = []
        for name in ("input_ids", "labels"):
            lists = pa.concat_arrays(table.column(name).chunks)
            ends = np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))
            of_column.append(np.split(lists.flatten().to_numpy(), ends[:-1]))
        yield from zip(*of_column, strict=True)
