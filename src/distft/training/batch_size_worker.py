"""python -m distft.training.batch_size_worker RESULTS recipe=…: measure how much memory each micro-batch takes.

`distft.training.batch_size_probe` starts one process per rank, in a process group of their own, so that everything they
take is released when they end, even by an allocator that has failed. Every micro-batch that divides the global batch
runs two forward and backward passes and an optimizer step on the longest samples, smallest first. A size is skipped if
the line through the last two says that it would not leave the margin free. Rank 0 appends a JSON line per size to
RESULTS.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from distft.config.recipe import Recipe, load_recipe
from distft.data.batch_plan import Plan
from distft.data.curriculum import known_stages
from distft.data.loader import build_loader
from distft.data.splits import padded_lengths
from distft.distributed.collectives import reduce
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import Strategy
from distft.distributed.supervisor import end_with_parent
from distft.distributed.world import World
from distft.hardware import GIB, limit_gpu
from distft.models.activation_checkpointing import set_up_checkpointing
from distft.models.loading import load_model
from distft.runs.folder import RunFolder
from distft.text import first_line
from distft.training.arguments import training_arguments
from distft.training.micro_batches import padded, settle
from distft.training.oom import MARGIN, device_memory, is_out_of_memory
from distft.training.preference import trainer_class
from distft.training.setup import TrainingData, setup_data, setup_strategy
from distft.training.trainer import Trainer, build_trainer, collator

PASSES = 2
"""Micro-batches per step: from the second one on, the gradients of the first take memory as well."""


class Budget:
    """The memory of this process: its peak since the last `start`, and what it may take, in bytes."""

    def __init__(self, world: World, limit_gib: float | None) -> None:
        self._gpu = torch.cuda.is_available()
        limit = float("inf") if limit_gib is None else limit_gib * GIB
        free, total = device_memory()
        if not self._gpu:
            total = free // world.local_world_size + psutil.Process().memory_info().rss
        self._total = min(total, limit)

    def start(self) -> None:
        if self._gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def taken(self) -> tuple[float, float]:
        """Return the peak and its limit: the total minus the margin and, on a GPU, minus what other processes hold."""
        if not self._gpu:
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, self._total * (1 - MARGIN)
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()
        return torch.cuda.max_memory_reserved(), min(total - others, self._total) - MARGIN * self._total


class HeaviestBatches(Dataset[dict[str, Any]]):
    """Collated micro-batches of the longest samples: `PASSES` of each size.

    The first size comes twice, because the optimizer has its states only after a step.
    """

    def __init__(
        self, samples: Any, sizes: Sequence[int], batch_of: Callable[[int], tuple[list[int], Callable[..., Any]]]
    ) -> None:
        self._samples = samples
        self._batches = [batch_of(size) for size in (sizes[0], *sizes) for _ in range(PASSES)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows, collate = self._batches[index]
        batch: dict[str, Any] = collate([self._samples[row] for row in rows])
        return batch


class ProbeTrainer(Trainer):
    """The trainer of a run, except that its micro-batches are the given ones and not those of the plan."""

    def __init__(self, *args: Any, micro_batches: HeaviestBatches, **kwargs: Any) -> None:
        self._micro_batches = micro_batches
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        one_by_one = [[index] for index in range(len(self._micro_batches))]
        return build_loader(self._micro_batches, one_by_one, _only, self.args.device, self.args.dataloader_num_workers)

    def _rounds(self) -> int:
        return PASSES


def _only(batches: list[dict[str, Any]]) -> dict[str, Any]:
    (batch,) = batches
    return batch


class Measure(TrainerCallback):  # type: ignore[misc]
    """Record what each size took. All ranks stop at the first size that does not fit, or before one that would not."""

    def __init__(self, sizes: Sequence[int], budget: Budget, world: World, results: Path) -> None:
        self._sizes, self._budget, self._world, self._results = sizes, budget, world, results
        self._tried: list[tuple[int, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._budget.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            return
        size = self._sizes[state.global_step - 2]
        peak, limit = self._budget.taken()
        over, peak = reduce([peak - limit, peak], "max", self._world)
        limit = peak - over  # of the rank with the least room
        self._tried.append((size, peak))
        if self._world.is_main:
            with self._results.open("a") as file:
                file.write(json.dumps({"micro_batch": size, "peak_bytes": peak, "limit_bytes": limit}) + "\n")
        following = self._sizes[state.global_step - 1 : state.global_step]
        if peak > limit or not following or self._predicted(following[0]) > limit:
            control.should_training_stop = True

    def _predicted(self, size: int) -> float:
        """Extrapolate the bytes that `size` takes from the last two sizes; 0 if fewer were tried."""
        if len(self._tried) < 2:
            return 0.0
        (first, low), (second, high) = self._tried[-2:]
        return high + (high - low) / (second - first) * (size - second)


def probe_recipe(arguments: Sequence[str]) -> Recipe:
    """The recipe at the smallest micro-batch, without evaluation, saving and logging."""
    quiet = ("eval_strategy", "save_strategy", "logging_strategy")
    return load_recipe([*arguments, *(f"training.{name}=no" for name in quiet)]).with_micro_batch(1)


def setup_probe(
    recipe: Recipe,
    strategy: Strategy,
    data: TrainingData,
    folder: RunFolder,
    callbacks: Callable[[Sequence[int]], Sequence[TrainerCallback]],
) -> Trainer:
    """Build the trainer that runs every micro-batch; `callbacks` are those for the sizes to try."""
    stages = known_stages(recipe.data, data.lengths, data.splits.difficulties)
    plan = Plan(data.lengths, recipe.batching, recipe.run.seed, stages)
    sizes = plan.sizes(strategy.world.world_size)
    arguments = training_arguments(recipe, strategy, folder, PASSES)
    arguments.max_steps = 1 + len(sizes)
    model = load_model(recipe, strategy)
    widths = padded_lengths(data.splits.train, pairs=recipe.pairs)
    largest = settle(model, recipe.with_micro_batch(sizes[-1]), strategy, data.tokenizer, widths).recipe
    packs = recipe.batching.micro_batch_tokens is not None
    is_padded = packs and largest.batching.micro_batch_tokens is None

    def rows_and_collator(size: int) -> tuple[list[int], Callable[..., Any]]:
        sized = recipe.with_micro_batch(size)
        if packs and not is_padded:
            return plan.longest(size), collator(sized, strategy, data.tokenizer)
        sized = padded(sized, widths, strategy.world.world_size) if is_padded else sized
        return Plan(widths, sized.batching).longest(sized.micro_batch), collator(sized, strategy, data.tokenizer)

    set_up_checkpointing(model, recipe, strategy, None)
    batches = HeaviestBatches(data.splits.train, sizes, rows_and_collator)
    made = trainer_class(recipe) or functools.partial(Trainer)
    trainer: Any = made.func
    kind = ProbeTrainer if trainer is Trainer else type("ProbeTrainer", (ProbeTrainer, trainer), {})
    return build_trainer(
        recipe,
        strategy,
        model,
        arguments,
        plan,
        data.tokenizer,
        data.splits,
        callbacks=callbacks(sizes),
        changed=lambda line: None,
        create=functools.partial(kind, micro_batches=batches, **made.keywords),
    )


def probe(results: Path, arguments: Sequence[str]) -> None:
    """Run every micro-batch and write what it took to `results`. All ranks enter."""
    recipe = probe_recipe(arguments)
    strategy = setup_strategy(recipe, Launcher())
    data = setup_data(recipe, strategy)
    limit_gpu(recipe.batching.memory_limit_gib)
    budget = Budget(strategy.world, recipe.batching.memory_limit_gib)
    folder = RunFolder(results.parent / "run")
    setup_probe(recipe, strategy, data, folder, lambda sizes: [Measure(sizes, budget, strategy.world, results)]).train()


def main() -> int:
    end_with_parent()
    results = Path(sys.argv[1])
    try:
        probe(results, sys.argv[2:])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        with results.open("a") as file:
            file.write(json.dumps({"failed": first_line(error)}) + "\n")
        os._exit(1)  # an orderly exit would wait for the other ranks
    return 0


if __name__ == "__main__":
    sys.exit(main())
