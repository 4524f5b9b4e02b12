"""From a plan to the batches of one rank, on its device before they are asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from distft.data.batch_plan import Plan, RankBatches
from distft.data.tokenize import IGNORED


class Collator:
    """Rows to one micro-batch: packed into one row with the bounds of the samples, or padded; its width a multiple of `multiple`,
    if any (in a pack one more sample, which the loss does not look at). No rows give one token that the loss does not look at, so
    that a rank with nothing to do enters every collective. `for_head` adds what `scored` finds, as `scored` and `targets`."""

    def __init__(self, pad_token: int, *, packed: bool, multiple: int | None = None, for_head: bool = False) -> None:
        self._pad_token, self._fill_to = pad_token, (multiple or 1) if packed else 1
        self._multiple, self._for_head = multiple or 1, for_head
        self._collate = DataCollatorForLanguageModeling(
            pad_token, padding_free=packed, pad_to_multiple_of=None if packed else multiple
        )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        lacking = -sum(len(row["input_ids"]) for row in rows) % self._fill_to if rows else 1
        if lacking:
            rows = [*rows, {"input_ids": [self._pad_token] * lacking, "labels": [IGNORED] * lacking}]
        batch: dict[str, Any] = self._collate(rows)
        if self._for_head:
            batch["scored"], batch["targets"] = scored(batch["labels"], self._multiple)
        return batch


def scored(labels: torch.Tensor, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of labels [rows, width] the positions whose next token is trained, as indices [n] into the flattened rows, and the labels of
    these next tokens [1, n]. n is filled up to a multiple of `multiple`, by position 0 with no label, and is never 0."""
    following = torch.full_like(labels, IGNORED)
    following[:, :-1] = labels[:, 1:]
    flat = following.flatten()
    (positions,) = torch.nonzero(flat != IGNORED, as_tuple=True)
    spare = -len(positions) % multiple or (0 if len(positions) else multiple)
    targets = torch.cat([flat[positions], flat.new_full((spare,), IGNORED)])
    return torch.cat([positions, positions.new_zeros(spare)]), targets[None]


class Waits:
    """The seconds that this process has waited for its batches, through whichever iterator they came: accelerate makes another
    loader for the first epoch of a resumed run."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def through(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`, each wait counted."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.seconds += time.perf_counter() - start
            yield batch


def loader(
    samples: Dataset, plan: Plan, collator: Collator, rank: int, world_size: int, accumulation: int, device: torch.device, workers: int
) -> DataLoaderShard:  # fmt: skip
    """The micro-batches that `plan` gives to `rank`, each moved to `device` while the one before it is worked on."""
    return DataLoaderShard(
        samples, device=device, _non_blocking=True, batch_sampler=RankBatches(plan, rank, world_size, accumulation),
        collate_fn=collator, num_workers=workers, pin_memory=device.type == "cuda",
    )  # fmt: skip
