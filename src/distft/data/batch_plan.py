"""The plan of training: which samples make which optimizer step, and which rank takes which of them at once.

A step's samples are a function of the seed, the epoch, the lengths and the global batch alone; the world size and the
micro-batch only say how a step is cut into micro-batches. So every strategy does the same optimisation.
"""

from __future__ import annotations

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
    """Steps of an epoch over samples of `lengths` (tokens), as `batching` counts them.

    With `global_batch_size` a step has that many samples and an epoch's last step what is left. With `global_batch_tokens`
    an epoch has as many steps as its tokens fill, and each takes the samples whose middles fall into its share of the tokens.
    """

    def __init__(
        self, lengths: Sequence[int] | Lengths, batching: Batching, seed: int = 0, *, shuffle: bool = True
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batching, self._seed, self._shuffle = batching, seed, shuffle

    def evaluation(self, lengths: Lengths, micro_batch: int) -> Plan:
        """The plan of a pass over other samples, in their order, as one step; a sample beyond the token budget is a pack."""
        budget = self._budget
        size = {"global_batch_size": len(lengths), "global_batch_tokens": None, "micro_batch": micro_batch}
        size["micro_batch_tokens"] = None if budget is None else max(budget, int(lengths.max()))
        return Plan(lengths, self.batching.model_copy(update=size), shuffle=False)

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch, the same in every epoch."""
        if self.batching.global_batch_size is not None:
            return -(-len(self.lengths) // self.batching.global_batch_size)
        assert self.batching.global_batch_tokens is not None
        # Rounded down, so that a share is never smaller than asked for; every share then holds a sample's middle.
        return max(1, int(self.lengths.sum()) // max(self.batching.global_batch_tokens, int(self.lengths.max())))

    def samples(self, step: int) -> Lengths:
        """Indices of the samples of the optimizer step `step`, counted from the start of the run, in the order of the seed."""
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
    def heaviest_tokens(self) -> int:
        """Tokens, padding counted, of the largest micro-batch that there can be."""
        return self._budget or self._micro_batch * int(self.lengths.max())

    def longest(self, size: int) -> list[int]:
        """Indices of the heaviest micro-batch of `size` (tokens where samples are packed, else samples): the longest samples."""
        order = np.argsort(-self.lengths, kind="stable")
        if self.batching.micro_batch_tokens is not None:
            size = max(1, int(np.searchsorted(np.cumsum(self.lengths[order]), size, side="right")))
        return [int(index) for index in order[:size]]

    def sizes(self, world_size: int) -> list[int]:
        """Micro-batches worth trying, smallest first: for packs from the longest sample to the fullest step's share, each larger
        by half; else numbers of samples that divide the global batch."""
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
        """Samples that the first `step` steps see."""
        epochs, rest = divmod(step, self.steps)
        return epochs * len(self.lengths) + int(self._epoch(epochs)[1][rest])

    def tokens_after(self, step: int) -> int:
        """Tokens, trained or not, of those samples."""
        epochs, rest = divmod(step, self.steps)
        order, starts = self._epoch(epochs)
        return int(epochs * self.lengths.sum() + self.lengths[order[: starts[rest]]].sum())

    def accumulation(self, world_size: int, epochs: int) -> int:
        """gradient_accumulation_steps: the fewest with which every step of the first `epochs` epochs can be cut into
        micro-batches of the size that `batching` allows.

        Raises:
            DataError: a sample is longer than the token budget of a micro-batch.
        """
        budget = self._budget
        if budget is None:
            # Counted in samples, no step is larger than the first.
            steps = range(1 if self.batching.global_batch_size is not None else self.steps * epochs)
            size = max(len(self.samples(step)) for step in steps)
            return math.ceil(size / (self._micro_batch * world_size))
        longest = int(self.lengths.max())
        if longest > budget:
            raise DataError(
                f"the longest sample has {longest:,} tokens, and batching.micro_batch_tokens={budget} is less; "
                f"raise it, or set training.max_length={budget} (which truncates)"
            )
        contents = (self.samples(step) for step in range(self.steps * epochs))
        return max(len(self._packs(samples, world_size)) for samples in contents) // world_size

    def micro_batches(self, step: int, world_size: int) -> list[list[list[int]]]:
        """[rounds][world_size] lists of indices that together are `samples(step)`, in as few rounds as can be; a rank that has
        nothing to do in a round has an empty list.

        Packs are balanced by tokens. Padded micro-batches hold samples of like length, and so little padding. What the ranks
        do at the same time is of like size.
        """
        samples = self.samples(step)
        if self.batching.micro_batch_tokens is not None:
            packs = self._packs(samples, world_size)
        else:
            by_length = samples[np.argsort(-self.lengths[samples], kind="stable")].tolist()
            size = self._micro_batch
            packs = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        packs += [[]] * (-len(packs) % world_size)
        return [packs[start : start + world_size] for start in range(0, len(packs), world_size)]

    def _packs(self, samples: Lengths, world_size: int) -> list[list[int]]:
        """A multiple of `world_size` packs within the token budget, the longest first."""
        budget = self._budget
        assert budget is not None
        rounds = math.ceil(int(self.lengths[samples].sum()) / (budget * world_size))
        packs = _balanced(samples, self.lengths, rounds * world_size)
        while max(packs)[0] > budget:
            rounds += 1
            packs = _balanced(samples, self.lengths, rounds * world_size)
        packs.sort(key=lambda pack: pack[0], reverse=True)
        return [pack for _, pack in packs] + [[]] * (rounds * world_size - len(packs))

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a run has one plan for training and one for each split
    def _epoch(self, epoch: int) -> tuple[Lengths, Lengths]:
        """The order of an epoch, and where in it each step starts (the end of the last included)."""
        count = len(self.lengths)
        order: Lengths = np.arange(count)
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator).numpy()
        if self.batching.global_batch_size is not None:
            return order, np.minimum(np.arange(self.steps + 1) * self.batching.global_batch_size, count)
        ends = np.cumsum(self.lengths[order])
        shares = np.arange(1, self.steps) * (ends[-1] / self.steps)
        inner = np.searchsorted(ends - self.lengths[order] / 2, shares)
        return order, np.concatenate([[0], inner, [count]])


def _balanced(samples: Lengths, lengths: Lengths, packs: int) -> list[tuple[int, list[int]]]:
    """`samples` in at most `packs` packs of like length, each with its tokens: the longest first, each into the shortest pack
    (Graham's LPT rule, SIAM J. Appl. Math. 17, 1969: at most 4/3 of the best)."""
    heap: list[tuple[int, int]] = [(0, number) for number in range(min(packs, len(samples)))]
    content: list[list[int]] = [[] for _ in heap]
    sizes = lengths[samples]
    for position in np.argsort(-sizes, kind="stable").tolist():
        load, number = heap[0]
        content[number].append(int(samples[position]))
        heapq.heapreplace(heap, (load + int(sizes[position]), number))
    return [(load, content[number]) for load, number in heap]


class RankBatches(Sampler[list[int]]):
    """The micro-batches of one rank, epoch by epoch: the batch sampler of its data loader.

    A step that takes fewer rounds than `accumulation` begins with empty ones.
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
