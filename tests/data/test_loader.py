"""From samples to micro-batches on a device."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from distft.data.loader import Collator, DataWait, trained_positions
from distft.data.tokenize import IGNORED

ROWS = [
    {"input_ids": [5, 6, 2], "labels": [IGNORED, 6, 2]},
    {"input_ids": [7, 2], "labels": [IGNORED, 2]},
]


def test_a_pack_is_one_row_with_the_boundaries_of_its_samples() -> None:
    batch = Collator(0, packed=True)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 2, 7, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 2, IGNORED, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert (batch["cu_seq_lens_q"].tolist(), batch["max_length_q"]) == ([0, 3, 5], 3)
    assert "attention_mask" not in batch


@pytest.mark.parametrize(
    ("labels", "multiple", "positions", "targets"),
    [
        ([[IGNORED, 6, 2, IGNORED, 2]], 1, [0, 1, 3], [6, 2, 2]),
        ([[IGNORED, 6, 2, IGNORED, 2]], 4, [0, 1, 3, 0], [6, 2, 2, IGNORED]),
        ([[IGNORED, 5, 6], [7, 8, IGNORED]], 1, [0, 1, 3], [5, 6, 8]),  # nothing predicts the first token of a row
        ([[IGNORED, IGNORED]], 1, [0], [IGNORED]),
        ([[IGNORED, IGNORED]], 4, [0] * 4, [IGNORED] * 4),
    ],
)
def test_trained_positions(labels: list[list[int]], multiple: int, positions: list[int], targets: list[int]) -> None:
    found = trained_positions(torch.tensor(labels), multiple)
    assert (found[0].tolist(), found[1].tolist()) == (positions, [targets])


def test_padding_is_ignored_and_can_be_to_a_multiple() -> None:
    assert Collator(0, packed=False)(ROWS)["input_ids"].tolist() == [[5, 6, 2], [7, 2, 0]]
    batch = Collator(0, packed=False, multiple=4)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 2, 0], [7, 2, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 2, IGNORED], [IGNORED, 2, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    batch = Collator(0, packed=True, multiple=4)(ROWS)
    assert batch["labels"].tolist() == [[IGNORED, 6, 2, IGNORED, 2, *[IGNORED] * 3]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8], "the filling of a pack is one more sample"


@pytest.mark.parametrize("packed", [False, True])
def test_no_rows_give_one_ignored_token(packed: bool) -> None:
    batch = Collator(3, packed=packed)([])
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([[3]], [[IGNORED]])


def test_waits_are_timed_across_iterators() -> None:
    waits = DataWait()

    def slow() -> Any:
        for number in range(3):
            time.sleep(0.05)
            yield number

    batches = slow()
    assert next(waits.timed(batches)) == 0  # the trainer takes a few at a time
    assert list(waits.timed(batches)) == [1, 2]
    assert 0.15 <= waits.seconds < 5
