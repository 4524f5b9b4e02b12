"""The batch plan over a stream: a plan of its own for each window, and the samples that it numbers."""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import numpy as np
from datasets.table import MemoryMappedTable
from torch.utils.data import Dataset

from distft.config.schema import Batching
from distft.data.batch_plan import Lengths, Plan
from distft.data.prefetch import Prefetch
from distft.data.stream import Stream, Window

_OPEN = 3
"""Windows of which a process remembers the lengths, or has the samples open."""


class WindowedPlan(Plan):
    """The optimizer steps over the windows of a stream, each as an epoch. Sample i of window w has the number
    w · size + i.

    The first process of a node has the next window made ahead of time, and removes those that lie behind.
    """

    def __init__(self, stream: Stream, batching: Batching, seed: int = 0) -> None:
        super().__init__(stream.window(0).lengths, batching, seed)
        self.stream = stream
        self._ahead = Prefetch(stream) if os.environ.get("LOCAL_RANK", "0") == "0" else None

    def samples(self, step: int) -> Lengths:
        window = step // self.steps
        return super().samples(step) + window * self.stream.size

    @property
    def longest_sample(self) -> int:
        """Tokens of the longest sample that may come; without training.max_length, of that in the first window."""
        return self.stream.max_length or int(self.lengths.max())

    def tokens_after(self, step: int) -> int:
        window, rest = divmod(step, self.steps)
        before = int(self.stream.record(window - 1)["tokens"]) if window else 0
        order, starts = self._epoch(window)
        return before + (int(self._window(window).lengths[order[: starts[rest]]].sum()) if rest else 0)

    def accumulation(self, world_size: int, epochs: int) -> int:
        """As for other plans; but packs must suffice for any lengths that may come."""
        if self._budget is None:
            return super().accumulation(world_size, epochs)
        self._check_fits(self.longest_sample)
        assert self.batching.global_batch_size is not None
        packs = math.ceil(self.batching.global_batch_size / (self._budget // self.longest_sample))
        return math.ceil(packs / world_size)

    def _lengths_of(self, samples: Lengths) -> Lengths:
        if not len(samples):
            return samples
        return np.asarray(self._window(int(samples[0]) // self.stream.size).lengths[samples % self.stream.size])

    @functools.lru_cache(maxsize=_OPEN)  # noqa: B019 - a run has one plan of its stream
    def _window(self, number: int) -> Window:
        window = self.stream.window(number)
        if self._ahead is not None:
            self._ahead.ask_for(number + 1)
            self.stream.remove(number - 2)
        return window


class StreamedSamples(Dataset[dict[str, Any]]):
    """The samples of a stream by the numbers that the plan gives them."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._tables: dict[int, Any] = {}

    def __len__(self) -> int:
        """Samples of an epoch: of a window."""
        return self._stream.size

    def __getitem__(self, number: int) -> dict[str, Any]:
        window, row = divmod(number, self._stream.size)
        if window not in self._tables:
            self._tables[window] = MemoryMappedTable.from_file(str(self._stream.window(window).file))
            for old in sorted(self._tables)[:-_OPEN]:
                del self._tables[old]
        found = self._tables[window].fast_slice(row, 1).to_pydict()
        return {name: values[0] for name, values in found.items()}
