"""Recognise out-of-memory errors, and restart with a smaller micro-batch. The global batch never changes.

The rank that runs out of memory records it in faults.jsonl and exits. The next start of the run, by the elastic
launcher or by the same command, reads that and halves the micro-batch, which doubles the accumulation.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil
import torch

from distft.config.files import list_recipes
from distft.config.recipe import Recipe, divisors, load_recipe
from distft.console import say
from distft.data.batch_plan import Lengths
from distft.distributed.strategies import Strategy, strategy_faults
from distft.errors import OutOfMemory, RecipeError
from distft.files import to_json, write_atomically
from distft.hardware import GIB, limit_gpu
from distft.runs.record import Record
from distft.text import count
from distft.training.batch_size_probe import probe
from distft.training.memory_estimate import Shape, cheaper, device_bytes

T = TypeVar("T")

MARGIN = 0.08
"""Share of a device's memory to leave free: for fragmentation, and for what no probe measures."""
_OOM_MESSAGES = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` comes from a memory allocator, of a GPU or of the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OOM_MESSAGES)


_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB}
_SIZE = rf"([\d.]+) ({'|'.join(_UNITS)})"


def asked_bytes(error: BaseException) -> int | None:
    """Return the size of the allocation that failed, if the message says it."""
    return _bytes(re.search(rf"[Tt]ried to allocate {_SIZE}", str(error)))


def taken_bytes(error: BaseException) -> int | None:
    """Return what PyTorch had allocated at the failure, if the message says it; by now, some of it is free again."""
    return _bytes(re.search(rf"{_SIZE} is allocated by PyTorch", str(error)))


def _bytes(found: re.Match[str] | None) -> int | None:
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def device_memory(limit_gib: float | None = None) -> tuple[int, int]:
    """Return the free and total bytes of this process's GPU, within the limit, or of the machine if it has no GPU."""
    if not torch.cuda.is_available():
        memory = psutil.virtual_memory()
        return memory.available, memory.total
    free, total = torch.cuda.mem_get_info()
    limit = total if limit_gib is None else min(total, int(limit_gib * GIB))
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min(free + unused, limit - torch.cuda.memory_allocated()), limit


class MemoryGuard:
    """Settles the micro-batch of a run, and explains running out of memory.

    `recipe` is that of the run, with its final micro-batch. Leaving the context with an allocator's error raises
    OutOfMemory instead, on the rank that ran out.
    """

    def __init__(self, recipe: Recipe, strategy: Strategy, lengths: Lengths, record: Record) -> None:
        self._strategy, self._lengths, self._record = strategy, lengths, record
        self.recipe, self._limit_gib = recipe, recipe.batching.memory_limit_gib
        limit_gpu(self._limit_gib)
        self.recipe = self._after_faults(self._probed(recipe) if recipe.micro_batch_is_auto else recipe)

    def _in_words(self, micro_batch: int) -> str:
        unit = "sample" if self.recipe.batching.micro_batch_tokens is None else "token"
        return count(micro_batch, unit)

    def _smaller(self, micro_batch: int) -> int | None:
        """Return the largest micro-batch that divides the global batch and is at most half of `micro_batch`, or None.

        For packs it is half the tokens, but at least those of the longest sample.
        """
        size = self.recipe.batching.global_batch_size
        if self.recipe.batching.micro_batch_tokens is not None:
            longest = int(self._lengths.max())
            return max(micro_batch // 2, longest) if micro_batch > longest else None
        if size is None:
            return micro_batch // 2 or None
        share = size // self._strategy.world.world_size
        return max((size for size in divisors(share) if size <= micro_batch // 2), default=None)

    def _probed(self, recipe: Recipe) -> Recipe:
        """Return `recipe` with the largest micro-batch that fits. The run folder keeps it for later starts of the run.

        Raises:
            OutOfMemory: not even the smallest micro-batch fits.
        """
        world, path = self._strategy.world, self._record.folder.probe
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        place = {"world_size": world.world_size, "device": device, "memory_limit_gib": recipe.batching.memory_limit_gib}
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if place.items() <= known.items():
            return recipe.with_micro_batch(known["micro_batch"])
        if world.is_main:
            say("measuring the largest micro-batch that fits, with the longest samples of the data")
        found = probe(self._record.folder.recipe, world)
        if found.largest is None:
            raise OutOfMemory(
                f"even a micro-batch of one sample does not fit: {found}. {self.cheaper_recipes()}",
                place,
                restart=False,
            )
        self._record.changed(f"micro-batch {found.largest} is the largest that fits: {found}")
        if world.is_main:
            write_atomically(path, to_json({**place, "micro_batch": found.largest, **asdict(found)}) + "\n")
        return recipe.with_micro_batch(found.largest)

    def _after_faults(self, recipe: Recipe) -> Recipe:
        """Return `recipe`, with half the micro-batch if an earlier start of the run ran out of memory.

        Raises:
            OutOfMemory: the micro-batch cannot be halved, but a launcher has restarted the processes. All ranks raise.
        """
        failed = [fault for fault in self._record.folder.read_faults() if "micro_batch" in fault]
        if not failed:
            return recipe
        last = min(failed, key=lambda fault: int(fault["micro_batch"]))
        smaller = self._smaller(last["micro_batch"])
        if smaller is None and self._record.restarted:
            raise OutOfMemory(f"not started again: {last['cause']}", {}, restart=False)
        if smaller is None or recipe.micro_batch <= smaller:
            return recipe
        self._record.changed(
            f"micro-batch {smaller} instead of {recipe.micro_batch}, with correspondingly more accumulation: rank "
            f"{last['rank']} ran out of memory with {last['micro_batch']} after step {last['step']}"
        )
        return recipe.with_micro_batch(smaller)

    def __enter__(self) -> MemoryGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not is_out_of_memory(error):
            return
        micro_batch = self.recipe.micro_batch
        smaller = self._smaller(micro_batch)
        # The other ranks learn of it at their next start, in `_after_faults`.
        when, facts = f"with a micro-batch of {self._in_words(micro_batch)}", {"micro_batch": micro_batch}
        raise self._out_of_memory(error, when, self._remedy(smaller), facts, restart=True) from error

    def _remedy(self, smaller: int | None) -> str:
        """Say what happens next; `smaller` is the micro-batch that a restart would use, or None if there is none."""
        if smaller is None:
            return self.cheaper_recipes()
        if self.recipe.run.max_restarts == 0:
            return (
                f"Restarts are disabled (run.max_restarts: 0); one would use a micro-batch of {self._in_words(smaller)}"
            )
        return (
            f"The run resumes from its last checkpoint with a micro-batch of {self._in_words(smaller)} and the same "
            "global batch: automatically under `distft train`, otherwise when you run the same command again"
        )

    def _out_of_memory(
        self, error: BaseException, when: str, remedy: str, facts: Mapping[str, Any], *, restart: bool
    ) -> OutOfMemory:
        """Turn `error` into a message: where it happened, how much memory was missing, and what to do."""
        free, total = device_memory(self._limit_gib)
        asked, taken = asked_bytes(error), taken_bytes(error)
        if taken is not None:
            free = max(min(free, total - taken), 0)
        if asked is not None and asked > free:
            missing = f" ({(asked - free) / GIB:,.2f} GiB short)"
        else:
            missing = "" if asked is None or taken is None else ", but fragmented"
        wanted = "an allocation failed" if asked is None else f"tried to allocate {asked / GIB:,.2f} GiB"
        place = "GPU" if torch.cuda.is_available() else "machine"
        return OutOfMemory(
            f"out of memory on rank {self._strategy.world.rank} {when}: {wanted}, and {free / GIB:,.2f} of the "
            f"{place}'s {total / GIB:,.2f} GiB are free{missing}. {remedy}",
            {**facts, "asked_bytes": asked, "free_bytes": free, "total_bytes": total},
            restart=restart,
        )

    def load(self, work: Callable[[], T]) -> T:
        """Return `work()`, which loads the weights; no smaller micro-batch would help here.

        Raises:
            OutOfMemory: the weights do not fit.
        """
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(
                error, "while the model was loaded", self.cheaper_recipes(), {}, restart=False
            ) from error

    def cheaper_recipes(self) -> str:
        """Say which of the shipped recipes should fit, by the estimate."""
        recipe, (_, total) = self.recipe, device_memory(self._limit_gib)
        tokens = int(self._lengths.max())
        same = [
            f"{key}={value}"
            for key, value in {
                "model.name": recipe.model.name,
                "model.tokenizer": recipe.model.tokenizer,
                "data.name": recipe.data.name,
                "data.path": recipe.data.path,
                "data.files": recipe.data.files,
            }.items()
            if value
        ]
        others = []
        for name in list_recipes(Path.cwd()):
            with contextlib.suppress(RecipeError):  # not every recipe suits every model and data set
                others.append(load_recipe([f"recipe={name}", *same], checks=(strategy_faults,)))
        shape = Shape.of(recipe)
        ours = device_bytes(recipe, shape, self._strategy, 1, tokens)
        found = cheaper(recipe, others, shape, self._strategy, tokens, int(total * (1 - MARGIN)))
        estimate = (
            f"By estimate, {recipe.source.name} takes {ours / GIB:,.1f} GiB with samples of {tokens} tokens, "
            "one at a time"
        )
        if not found:
            return (
                f"{estimate}; no shipped recipe would fit with this model. Use shorter samples (training.max_length), "
                "a smaller model, or more GPUs"
            )
        listed = "; ".join(f"recipe={name} ({size / GIB:,.1f} GiB)" for name, size in found)
        return (
            f"{estimate}. These should fit with the same model: {listed}. Shorter samples (training.max_length) "
            "also take less"
        )
