"""The batch plan: which samples make up each optimizer step, and how ranks share them in micro-batches.

The samples of a step depend only on the seed, the epoch, the sample lengths, the global batch and the stages of a
curriculum. The world size and
the micro-batch decide only how a step is divided, so every strategy performs the same optimisation.
"""

from __future__ import annotations

import copy
import functools
import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from distft.config.schema import Batching
from distft.errors import DataError

Lengths = np.ndarray[Any, np.dtype[np.int64]]


class Plan:
    """The optimizer steps over samples of the given `lengths` (tokens per sample).

    With `global_batch_size`, a step has that many samples and the last step of an epoch has the rest. With
    `global_batch_tokens`, the tokens of an epoch are divided evenly into steps, and a sample belongs to the step that
    contains its middle token.

    `stages` numbers the stage of each sample: an epoch takes one stage after the other, and shuffles within each.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Lengths,
        batching: Batching,
        seed: int = 0,
        stages: Lengths | None = None,
        *,
        shuffle: bool = True,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batching, self._seed, self._stages, self._shuffle = batching, seed, stages, shuffle

    def divided(self, batching: Batching) -> Plan:
        """The same steps, in the micro-batches of `batching`."""
        found = copy.copy(self)
        found.batching = batching
        return found

    def evaluation(self, lengths: Lengths, micro_batch: int) -> Plan:
        """The plan of one pass, as a single step, over other samples in order. An overlong sample gets its own pack."""
        budget = self._budget
        size = {"global_batch_size": len(lengths), "global_batch_tokens": None, "micro_batch": micro_batch}
        size["micro_batch_tokens"] = None if budget is None else max(budget, int(lengths.max()))
        return Plan(lengths, self.batching.model_copy(update=size), shuffle=False)

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        if self.batching.global_batch_size is not None:
            return -(-len(self.lengths) // self.batching.global_batch_size)
        assert self.batching.global_batch_tokens is not None
        # Round down: a step never gets less than asked for, and each contains the middle of at least one sample.
        return max(1, int(self.lengths.sum()) // max(self.batching.global_batch_tokens, int(self.lengths.max())))

    def samples(self, step: int) -> Lengths:
        """Indices of the samples in optimizer step `step` of the run, in the order of its epoch."""
        epoch, step = divmod(step, self.steps)
        order, starts = self._epoch(epoch)
        return order[starts[step] : starts[step + 1]]

    @property
    def _micro_batch(self) -> int:
        assert self.batching.micro_batch != "auto"
        return self.batching.micro_batch

    @property
    def _budget(self) -> int | None:
        assert self.batching.micro_batch_tokens != "auto"
        return self.batching.micro_batch_tokens

    @property
    def longest_sample(self) -> int:
        """Tokens of the longest sample."""
        return int(self.lengths.max())

    @property
    def heaviest_tokens(self) -> int:
        """Tokens, including padding, in the largest possible micro-batch."""
        return self._budget or self._micro_batch * self.longest_sample

    def longest(self, size: int) -> list[int]:
        """Indices of the longest samples that fit a micro-batch of `size` (tokens if packed, otherwise samples)."""
        order = np.argsort(-self.lengths, kind="stable")
        if self.batching.micro_batch_tokens is not None:
            size = max(1, int(np.searchsorted(np.cumsum(self.lengths[order]), size, side="right")))
        return [int(index) for index in order[:size]]

    def sizes(self, world_size: int) -> list[int]:
        """Micro-batch sizes worth trying, in ascending order.

        Packed (tokens): from the longest sample to one rank's share of the largest step, growing by half each time.
        Otherwise (samples): the divisors of one rank's share of the global batch.
        """
        count = len(self.lengths)
        if self.batching.micro_batch_tokens is None:
            share = (self.batching.global_batch_size or count) // world_size
            return [size for size in range(1, min(share, count) + 1) if share % size == 0]
        share = max(int(self.lengths[self.samples(step)].sum()) for step in range(self.steps)) // world_size + 1
        sizes = [int(self.lengths.max())]
        while sizes[-1] < share:
            sizes.append(min(sizes[-1] * 3 // 2, share))
        return sizes

    def samples_after(self, step: int) -> int:
        """Number of samples in the first `step` steps."""
        epochs, rest = divmod(step, self.steps)
        return epochs * len(self.lengths) + int(self._epoch(epochs)[1][rest])

    def tokens_after(self, step: int) -> int:
        """Number of tokens, trained or not, in the first `step` steps."""
        epochs, rest = divmod(step, self.steps)
        order, starts = self._epoch(epochs)
        return int(epochs * self.lengths.sum() + self.lengths[order[: starts[rest]]].sum())

    def accumulation(self, world_size: int, epochs: int) -> int:
        """The smallest gradient_accumulation_steps that fits every step of the first `epochs` epochs.

        Raises:
            DataError: a sample is longer than the token budget of a micro-batch.
        """
        budget = self._budget
        if budget is None:
            # With a batch size in samples, no step is larger than the first.
            steps = range(1 if self.batching.global_batch_size is not None else self.steps * epochs)
            size = max(len(self.samples(step)) for step in steps)
            return math.ceil(size / (self._micro_batch * world_size))
        self._check_fits(self.longest_sample)
        contents = (self.samples(step) for step in range(self.steps * epochs))
        return max(len(self._packs(samples, world_size)) for samples in contents) // world_size

    def _check_fits(self, longest: int) -> None:
        budget = self._budget
        if budget is not None and longest > budget:
            raise DataError(
                f"the longest sample has {longest:,} tokens, which exceeds batching.micro_batch_tokens={budget}; "
                f"raise it, or truncate samples with training.max_length={budget}"
            )

    def _lengths_of(self, samples: Lengths) -> Lengths:
        """Tokens of each of these samples of a step."""
        return self.lengths[samples]

    def micro_batches(self, step: int, world_size: int) -> list[list[list[int]]]:
        """The samples of `step`, divided into [rounds][world_size] lists of indices with as few rounds as possible.

        A rank that is idle in a round has an empty list. Packs are balanced by tokens; padded micro-batches group
        samples of similar length to minimise padding. Within a round, all ranks get similar amounts of work.
        """
        samples = self.samples(step)
        if self.batching.micro_batch_tokens is not None:
            packs = self._packs(samples, world_size)
        else:
            by_length = samples[np.argsort(-self._lengths_of(samples), kind="stable")].tolist()
            size = self._micro_batch
            packs = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        packs += [[]] * (-len(packs) % world_size)
        return [packs[start : start + world_size] for start in range(0, len(packs), world_size)]

    def _packs(self, samples: Lengths, world_size: int) -> list[list[int]]:
        """Divide `samples` into packs within the token budget, longest first; their number is a multiple of
        `world_size`."""
        budget = self._budget
        assert budget is not None
        lengths = self._lengths_of(samples)
        rounds = math.ceil(int(lengths.sum()) / (budget * world_size))
        packs = _balanced(samples, lengths, rounds * world_size)
        while max(packs)[0] > budget:
            rounds += 1
            packs = _balanced(samples, lengths, rounds * world_size)
        packs.sort(key=lambda pack: pack[0], reverse=True)
        return [pack for _, pack in packs] + [[]] * (rounds * world_size - len(packs))

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a run has one plan per split
    def _epoch(self, epoch: int) -> tuple[Lengths, Lengths]:
        """The sample order of an epoch, and the start of each step in it (plus the end of the last step)."""
        count = len(self.lengths)
        order: Lengths = np.arange(count)
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator).numpy()
        if self._stages is not None:
            order = order[np.argsort(self._stages[order], kind="stable")]
        if self.batching.global_batch_size is not None:
            return order, np.minimum(np.arange(self.steps + 1) * self.batching.global_batch_size, count)
        ends = np.cumsum(self.lengths[order])
        shares = np.arange(1, self.steps) * (ends[-1] / self.steps)
        inner = np.searchsorted(ends - self.lengths[order] / 2, shares)
        return order, np.concatenate([[0], inner, [count]])


def _balanced(samples: Lengths, sizes: Lengths, packs: int) -> list[tuple[int, list[int]]]:
    """Divide `samples` of these `sizes` into at most `packs` packs of similar length; returns (tokens, indices) for
    each pack.

    Longest processing time first: the longest remaining sample goes into the shortest pack. The longest pack is at most
    4/3 of the optimum (Graham 1969, SIAM J. Appl. Math. 17).
    """
    heap: list[tuple[int, int]] = [(0, number) for number in range(min(packs, len(samples)))]
    content: list[list[int]] = [[] for _ in heap]
    for position in np.argsort(-sizes, kind="stable").tolist():
        load, number = heap[0]
        content[number].append(int(samples[position]))
        heapq.heapreplace(heap, (load + int(sizes[position]), number))
    return [(load, content[number]) for load, number in heap]


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Group indices into batches of similar length for inference, longest first.

    A batch has at most `max_tokens` tokens including padding, or a single row. The longest batch comes first, so that
    an out-of-memory error shows up at once and a progress estimate is not too optimistic.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class RankBatches(Sampler[list[int]]):
    """Batch sampler that yields the micro-batches of one rank, one epoch at a time.

    A step with fewer rounds than `accumulation` starts with empty micro-batches.
    """

    def __init__(self, plan: Plan, rank: int, world_size: int, accumulation: int) -> None:
        self._plan, self._rank, self._world_size, self._accumulation = plan, rank, world_size, accumulation
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self._plan.steps * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * self._plan.steps
        for step in range(first, first + self._plan.steps):
            rounds = self._plan.micro_batches(step, self._world_size)
            yield from [[]] * (self._accumulation - len(rounds))
            for ranks in rounds:
                yield ranks[self._rank]
