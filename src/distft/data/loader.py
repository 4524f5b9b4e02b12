"""From a batch plan to the batches of one rank, moved to its device ahead of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from distft.data.pairs import sequences_of
from distft.data.shared_prompts import shared_row
from distft.data.tokenize import IGNORED


class Collator:
    """Collates prepared samples into one micro-batch: a single packed row with sample boundaries, or padded rows.

    The width is a multiple of `multiple`, if given; a pack is filled up with a dummy sample that the loss ignores. An
    empty list of samples gives a single ignored token, so that an idle rank still takes part in every collective. With
    `for_head`, the batch also has what `trained_positions` returns, as `scored` and `targets`.

    With `pairs`, each sample is a pair, of which the two sequences become two rows or samples of the pack, the chosen
    one first. With `rated`, it is an answer with a label, and the batch has `good` [samples]. Either way, the batch has
    what `trained_counts` returns, as `counts`. With `whole_chosen`, the sequence of a chosen answer is trained from its
    second token on, and `answers` says which of the scored positions are of answers. With `shared`, the prompt of a
    pair is in the pack once (`data.shared_prompts`). If pairs have `reference`, the batch has it for all `targets`.
    """

    def __init__(
        self,
        pad_token: int,
        *,
        packed: bool,
        multiple: int | None = None,
        for_head: bool = False,
        pairs: bool = False,
        rated: bool = False,
        whole_chosen: bool = False,
        shared: bool = False,
    ) -> None:
        self._pad_token, self._fill_to = pad_token, (multiple or 1) if packed else 1
        self._multiple, self._for_head, self._pairs = multiple or 1, for_head, pairs
        self._rated, self._whole_chosen, self._shared = rated, whole_chosen, shared
        self._collate = DataCollatorForLanguageModeling(
            pad_token, padding_free=packed, pad_to_multiple_of=None if packed else multiple
        )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._batch(rows)
        if rows and "reference" in rows[0]:
            known = torch.zeros(batch["targets"].shape)
            values = torch.cat([torch.as_tensor(row["reference"]) for row in rows])
            known[0, : len(values)] = values
            batch["reference"] = known
        return batch

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if self._shared:
            return shared_row(rows, self._pad_token, self._multiple)
        good = torch.tensor([row["chosen"] > 0 for row in rows], dtype=torch.bool) if self._rated else None
        plain = sequences_of(rows) if self._pairs else rows
        sequences = rows = [*map(_whole, plain, [True, False] * len(rows))] if self._whole_chosen else plain
        missing = -sum(len(row["input_ids"]) for row in rows) % self._fill_to if rows else 1
        if missing:
            rows = [*rows, {"input_ids": [self._pad_token] * missing, "labels": [IGNORED] * missing}]
        batch: dict[str, Any] = self._collate(rows)
        if self._for_head:
            batch["scored"], batch["targets"] = trained_positions(batch["labels"], self._multiple)
        if self._pairs or self._rated:
            batch["counts"] = trained_counts(sequences, batch["targets"].shape[1])
        if good is not None:
            batch["good"] = good
        if self._whole_chosen:
            of = [
                answer != IGNORED
                for each, own in zip(sequences, plain, strict=True)
                for label, answer in zip(each["labels"][1:], own["labels"][1:], strict=True)
                if label != IGNORED
            ]
            batch["answers"] = torch.tensor([*of, *[False] * (batch["targets"].shape[1] - len(of))])
        return batch


def _whole(sequence: dict[str, Any], chosen: bool) -> dict[str, Any]:
    """The sequence, of which all is trained if its answer is the chosen one."""
    ids = sequence["input_ids"]
    return {"input_ids": ids, "labels": [IGNORED, *ids[1:]]} if chosen else sequence


def trained_positions(labels: torch.Tensor, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions in `labels` [rows, width] whose next token is trained.

    Returns:
        Indices [n] into the flattened rows, and the labels [1, n] of the next tokens. n is at least 1 and is filled up
        to a multiple of `multiple` with position 0 and label -100.
    """
    following = torch.full_like(labels, IGNORED)
    following[:, :-1] = labels[:, 1:]
    flat = following.flatten()
    (positions,) = torch.nonzero(flat != IGNORED, as_tuple=True)
    spare = -len(positions) % multiple or (0 if len(positions) else multiple)
    targets = torch.cat([flat[positions], flat.new_full((spare,), IGNORED)])
    return torch.cat([positions, positions.new_zeros(spare)]), targets[None]


def trained_counts(sequences: list[dict[str, Any]], scored: int) -> torch.Tensor:
    """How many of the `scored` positions of a batch are of each sequence, and how many fill it up, [sequences + 1]."""
    counts = [sum(label != IGNORED for label in each["labels"][1:]) for each in sequences]
    return torch.tensor([*counts, scored - sum(counts)])


class DataWait:
    """Adds up the seconds that this process waits for batches.

    It outlives any one iterator, because accelerate creates another data loader for the first epoch of a resumed run.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Iterate over `batches`, timing each wait."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.seconds += time.perf_counter() - start
            yield batch


def build_loader(
    samples: Any,
    batches: Iterable[list[int]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    device: torch.device,
    workers: int,
    **options: Any,
) -> DataLoaderShard:
    """Load the micro-batches with these indices into `samples`; each moves to `device` while the previous one is
    computed. `options` are those of torch's DataLoader."""
    return DataLoaderShard(
        samples,
        device=device,
        _non_blocking=True,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        **({"pin_memory": device.type == "cuda"} | options),
    )
