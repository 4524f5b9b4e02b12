"""python -m distft.training.batch_size_worker RESULTS recipe=…: how much memory each micro-batch takes, tried out. `distft.training.batch_size_probe` starts it.

One process for each of the run's, in a group of their own: what they took is given back when they end, an allocator that
has failed among it. Each micro-batch that divides the global batch is taken through two forward and backward passes and
an optimizer step, smallest first, with the longest samples of the data; the next one is left out where the line through
the last two does not leave the margin free. RESULTS gets a JSON line for each from rank 0.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from trl import SFTTrainer

from distft.config.recipe import load_recipe
from distft.data.batch_plan import Plan
from distft.data.loader import Collator
from distft.data.prepare import lengths_of, prepare_data
from distft.distributed.collectives import reduce
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import choose
from distft.distributed.supervisor import end_with_parent
from distft.distributed.world import World
from distft.hardware import GIB, limit_gpu
from distft.models.activation_checkpointing import set_up_checkpointing
from distft.models.adapter import keep_adapter_in_fp32
from distft.models.loading import load_model, load_tokenizer
from distft.runs.folder import RunFolder
from distft.training.oom import MARGIN, device_memory, is_out_of_memory
from distft.training.trainer import InTime, sft_config

PASSES = 2
"""Micro-batches of a step: from the second on, the gradients of the first take memory as well."""


class Budget:
    """Memory of this process: the most that was taken since the last `start`, and what it may take, in bytes."""

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
        """The peak, and what it may be: on a GPU without what others hold of it, both without the margin."""
        if not self._gpu:
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, self._total * (1 - MARGIN)
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()
        return torch.cuda.max_memory_reserved(), min(total - others, self._total) - MARGIN * self._total


class Growing(SFTTrainer):  # type: ignore[misc]
    """Trains on the heaviest micro-batch of each size in turn, `PASSES` of them a step; the first size twice, for the
    optimizer has its states from then on."""

    def __init__(self, *args: Any, plan: Plan, sizes: Sequence[int], **kwargs: Any) -> None:
        self._batches = [plan.longest(size) for size in (sizes[0], *sizes) for _ in range(PASSES)]
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_sampler=self._batches, collate_fn=self.data_collator)


class Measure(TrainerCallback):  # type: ignore[misc]
    """Writes what each size took, and ends the trial where a size did not fit or the next would not. All ranks agree."""

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
        limit = peak - over  # of the rank with the least to spare
        self._tried.append((size, peak))
        if self._world.is_main:
            with self._results.open("a") as file:
                file.write(json.dumps({"micro_batch": size, "peak_bytes": peak, "limit_bytes": limit}) + "\n")
        following = self._sizes[state.global_step - 1 : state.global_step]
        if peak > limit or not following or self._line(following[0]) > limit:
            control.should_training_stop = True

    def _line(self, size: int) -> float:
        """What `size` would take by the line through the last two that were tried."""
        if len(self._tried) < 2:
            return 0.0
        (first, low), (second, high) = self._tried[-2:]
        return high + (high - low) / (second - first) * (size - second)


def trial(results: Path, arguments: Sequence[str]) -> None:
    quiet = ("eval_strategy", "save_strategy", "logging_strategy")
    recipe = load_recipe([*arguments, *(f"training.{name}=no" for name in quiet)]).with_micro_batch(1)
    world = World.from_environment(os.environ)
    how = choose(recipe, world, os.environ, Launcher())
    how.configure(os.environ)
    how.accumulate(os.environ, PASSES)
    tokenizer = load_tokenizer(recipe)
    splits = prepare_data(recipe, tokenizer)
    plan = Plan(lengths_of(splits.train), recipe.batching, recipe.run.seed)
    sizes = plan.sizes(world.world_size)
    config = sft_config(recipe, how, RunFolder(results.parent / "run"), PASSES)
    config.max_steps = 1 + len(sizes)
    limit_gpu(recipe.batching.memory_limit_gib)
    budget = Budget(world, recipe.batching.memory_limit_gib)
    model = load_model(recipe, how)
    set_up_checkpointing(model, recipe, how, None)
    trainer = Growing(
        model=model, args=config, processing_class=tokenizer, plan=plan, sizes=sizes, train_dataset=splits.train,
        data_collator=Collator(tokenizer.pad_token_id, packed=recipe.batching.micro_batch_tokens is not None),
        callbacks=[InTime(how, recipe.batching.memory_limit_gib, lambda _: None), Measure(sizes, budget, world, results)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    keep_adapter_in_fp32(model, recipe, how)
    trainer.train()


def main() -> int:
    end_with_parent()
    results = Path(sys.argv[1])
    try:
        trial(results, sys.argv[2:])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        with results.open("a") as file:
            file.write(json.dumps({"failed": str(error).strip().splitlines()[0]}) + "\n")
        os._exit(1)  # an orderly end would wait for the others
    return 0


if __name__ == "__main__":
    sys.exit(main())
