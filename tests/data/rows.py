"""What the tests of this package share: recipes of the tiny model, rows on disk, and readable forms of a sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from distft.config.recipe import Recipe, load_recipe
from distft.data.checks import data_faults
from distft.data.prepare import Splits
from distft.data.templates import Example
from distft.data.tokenize import IGNORED, tokenize

ALL = (
    "data.validation_fraction=0.0",
    "data.test_fraction=0.0",
    "training.eval_strategy=no",
    "training.max_length=null",
)
"""Put every row into the train split, untruncated."""
RESPONSE_ONLY = "training.completion_only_loss=true"

Prepare = Callable[..., Splits]


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe(overrides, checks=(data_faults,))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    # splitlines() would also split at U+0085, which a few reviews contain.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def whole(row: dict[str, Any], tokenizer: Any) -> str:
    """The text of a sample."""
    return str(tokenizer.decode(row["input_ids"]))


def trained(row: dict[str, Any], tokenizer: Any) -> str:
    """The trained part of a sample's text."""
    return str(tokenizer.decode([label for label in row["labels"] if label != IGNORED]))


def row_with(splits: Splits, words: str, tokenizer: Any) -> dict[str, Any]:
    """The one training sample that contains `words`."""
    (found,) = (row for row in splits.train if words in whole(row, tokenizer))
    return dict(found)


def tokenize_one(example: Example, tokenizer: Any, max_length: int | None) -> tuple[list[int], list[int], bool]:
    (sample,) = tokenize([example], tokenizer, max_length)
    return sample
