"""The workload of the throughput benchmark: model, rows, and the order in which distft's plan takes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import synthetic
import torch
from cases import Batch

from distft.config.recipe import Recipe
from distft.data.batch_plan import Plan
from distft.data.splits import split_rows


@dataclass(frozen=True)
class Workload:
    """What all runs share: the model's folder, the rows, and the token count of each row."""

    shape: synthetic.Shape
    model: Path
    rows: Path
    lengths: Any

    def overrides(self, batch: Batch) -> list[str]:
        """Overrides that make a recipe train on this workload only."""
        on_cpu = ["model.dtype=float32", "training.bf16=false"] if not torch.cuda.is_available() else []
        return [
            f"model.name={self.model}",
            f"model.tokenizer={self.model / 'tokenizer'}",
            f"data.name={self.rows}",
            "data.format.text=text",
            "data.validation_fraction=0.0",
            "data.test_fraction=0.0",
            "evaluation.before_and_after=false",
            "training.eval_strategy=no",
            "training.save_strategy=no",
            "tracking.report_to=[]",
            *batch.overrides(self.shape),
            *on_cpu,
        ]

    def order(self, recipe: Recipe, gpus: int, steps: int) -> list[dict[str, Any]]:
        """For each step, the rows that distft's plan takes, the packs they form, and their tokens."""
        numbers = split_rows(range(len(self.lengths)), recipe.data, recipe.run.seed, with_test=True)["train"]
        plan = Plan(self.lengths[numbers], recipe.batching, recipe.run.seed)
        found = []
        for step in range(steps):
            packs = [pack for ranks in plan.micro_batches(step, gpus) for pack in ranks]
            samples = [numbers[index] for index in plan.samples(step)]
            found.append(
                {
                    "samples": samples,
                    "tokens": int(self.lengths[samples].sum()),
                    "packs": [[numbers[index] for index in pack] for pack in packs],
                }
            )
        return found


def cumulative(steps: list[list[int]]) -> dict[int, list[int]]:
    """Cumulative samples and tokens after each step, from those of each step."""
    done, found = [0, 0], {}
    for number, step in enumerate(steps, 1):
        done = [total + count for total, count in zip(done, step, strict=True)]
        found[number] = list(done)
    return found
