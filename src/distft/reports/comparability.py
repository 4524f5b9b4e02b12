"""What runs were made with, beside each other: which of them are repeats, and what was the same in all.

The facts of a run are the recipe's values by their dotted keys, and under `as run.` and `machine.` what the summary and the
environment say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

_NAMES_OF_A_RUN = ("run.name", "run.dir", "run.resume", "run.force", "tracking.")
"""What makes no difference to what a run does."""

DATA, WEIGHTS = "as run.data_digest", "as run.weights_digest"
"""The facts that say what the texts and the base weights were: names of files say it only while nobody writes to them."""

EQUAL: dict[str, tuple[str, ...]] = {
    "samples": ("as run.samples", "as run.skipped_steps", "data.", DATA, "run.seed"),
    "order": ("data.", DATA, "run.seed"),
    "global_batch": ("as run.global_batch_size", "as run.global_batch_tokens"),
    "tokens": ("as run.tokens",),
    "base_weights": (WEIGHTS, "model.name", "model.revision", "model.dtype", "quantization", "quantization.load_",
                     "quantization.bnb_4bit_quant_type", "quantization.bnb_4bit_use_double_quant", "quantization.llm_int8_"),
    "loss": (),
    "steps": ("as run.steps",),
    "seed": ("run.seed",),
}  # fmt: skip
"""What can be equal, and the facts that have to be for it, by the beginnings of their names; losses are compared instead."""

BY_DEFAULT: tuple[Literal["samples", "order", "global_batch"], ...] = ("samples", "order", "global_batch")
"""What must be equal for speeds to be compared, where nothing else is declared."""


def sameness(facts: Mapping[str, Any], *more: Any) -> str:
    """A text that is equal for runs that are repeats of each other: by their facts, and by `more` that tells runs apart."""
    made = {
        key: _word(value)
        for key, value in facts.items()
        if key == DATA or not key.startswith((*_NAMES_OF_A_RUN, "as run."))
    }
    return json.dumps([made, *more], sort_keys=True)


def differences(
    named: Mapping[str, Sequence[Mapping[str, Any]]], of: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Of the facts of the runs of each variant those that are not the same in all runs, and that `of` names the beginnings of. Each with
    its value in every variant: one, or a list where the repeats differ among themselves."""
    found: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys(key for runs in named.values() for facts in runs for key in facts):
        if key.startswith(_NAMES_OF_A_RUN) if of is None else not _begins(key, of):
            continue
        # A recipe that says nothing says null; of a run that has not finished nothing is known.
        told = {name: [facts.get(key) for facts in runs if key in facts or not key.startswith("as run.")]
                for name, runs in named.items()}  # fmt: skip
        if len({_word(value) for values in told.values() for value in values}) > 1:
            found[key] = {name: _one(values) for name, values in told.items() if values}
    return found


def _begins(key: str, of: Sequence[str]) -> bool:
    return any(key == start or (start.endswith((".", "_")) and key.startswith(start)) for start in of)


def _one(values: Sequence[Any]) -> Any:
    return values[0] if len({_word(value) for value in values}) == 1 else list(values)


def _word(value: Any) -> str:
    """One text for values that are equal: 0 and 0.0 are."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return json.dumps(value, sort_keys=True, default=str)
