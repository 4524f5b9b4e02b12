"""What runs were made with: which of them are repeats of each other, and what was the same in all.

The facts of a run are the values of its recipe by their dotted keys and, under `as run.` and `machine.`, what the
summary and the environment say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distft.reports.results import DATA, WEIGHTS, Run, Spread

LOSS_TOLERANCE = 0.01
"""Losses are equal if they differ by at most this share of the first variant's, unless the experiment says
otherwise."""

MARGIN = 1.05
"""Two speeds show "no difference" if the interval of their ratio contains 1 and lies within this factor either way. A
wider interval that contains 1 is inconclusive."""

ROUNDING = 1e-4
"""Figures that all agree to within this share are equal: strategies sum in different orders and round differently."""

_LOSSES = ("train_loss", "eval_loss_after")
"""The figures that decide whether losses are equal."""

_NAMES_OF_A_RUN = ("run.name", "run.dir", "run.resume", "run.force", "tracking.")
"""Keys that have no effect on what a run computes."""

EQUAL: dict[str, tuple[str, ...]] = {
    "samples": ("as run.samples", "as run.skipped_steps", "data.", DATA, "run.seed"),
    "order": ("data.", DATA, "run.seed", "as run.data_order_digest"),
    "global_batch": ("as run.global_batch_size", "as run.global_batch_tokens"),
    "tokens": ("as run.tokens",),
    "base_weights": (
        WEIGHTS,
        "model.name",
        "model.revision",
        "model.dtype",
        "quantization",
        "quantization.load_",
        "quantization.bnb_4bit_quant_type",
        "quantization.bnb_4bit_use_double_quant",
        "quantization.llm_int8_",
    ),
    "loss": (),
    "steps": ("as run.steps",),
    "seed": ("run.seed",),
}
"""What can be declared equal, and the facts that it depends on: their names, or prefixes that end in `.` or `_`. For
`loss` the figures are compared instead."""

BY_DEFAULT: tuple[Literal["samples", "order", "global_batch"], ...] = ("samples", "order", "global_batch")
"""What must be equal for speeds to be compared, unless the experiment declares something else."""


@dataclass(frozen=True)
class Equality:
    """Whether `what` was equal in all finished runs; None if fewer than two variants have one, or it is not known.

    `unequal` has the facts that differ, each with its value in every variant.
    """

    what: str
    declared: bool
    equal: bool | None
    unequal: Mapping[str, Mapping[str, Any]]


def equality(what: str, declared: bool, finished: Mapping[str, Sequence[Run]], tolerance: float) -> Equality:
    """Whether `what` (a key of EQUAL) was equal in the `finished` runs of all variants."""
    if len(finished) < 2:
        return Equality(what, declared, None, {})
    by_facts = differences(facts_of(finished), EQUAL[what])
    if what == "loss" and not any(
        run.figures[key] is not None for runs in finished.values() for run in runs for key in _LOSSES
    ):
        return Equality(what, declared, None, {})  # none was measured
    unequal = _unequal_losses(finished, tolerance) if what == "loss" else by_facts
    return Equality(what, declared, not unequal, unequal)


def facts_of(named: Mapping[str, Sequence[Run]]) -> dict[str, list[Mapping[str, Any]]]:
    """The facts of the runs of each variant."""
    return {name: [run.facts for run in runs] for name, runs in named.items()}


def all_differences(named: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """Every fact in which variants differ. Variants without a recorded run are compared by their recipes alone."""
    recorded = {name: known for name, runs in named.items() if (known := [run for run in runs if run.recorded])}
    found = differences(facts_of(recorded))
    if len(recorded) < len(named):
        asked = {name: [run.asked for run in recorded.get(name, runs)] for name, runs in named.items()}
        order = [*recorded, *(name for name in named if name not in recorded)]
        found |= differences({name: asked[name] for name in order})
    return found


def _unequal_losses(finished: Mapping[str, Sequence[Run]], tolerance: float) -> dict[str, dict[str, Any]]:
    found = {}
    for key in _LOSSES:
        spreads = {name: Spread.of(run.figures[key] for run in runs) for name, runs in finished.items()}
        medians = {name: None if spread is None else spread.median for name, spread in spreads.items()}
        known = [median for median in medians.values() if median is not None]
        apart = max((abs(median - known[0]) for median in known), default=0.0)
        if known and (len(known) < len(medians) or any(map(math.isnan, known)) or apart > tolerance * abs(known[0])):
            found[key] = medians
    return found


def sameness(facts: Mapping[str, Any], *more: Any) -> str:
    """A string that is equal for runs that are repeats of each other, by their facts and by `more`."""
    made = {
        key: _canonical(value)
        for key, value in facts.items()
        if key == DATA or not key.startswith((*_NAMES_OF_A_RUN, "as run."))
    }
    return json.dumps([made, *more], sort_keys=True)


def differences(
    named: Mapping[str, Sequence[Mapping[str, Any]]], of: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """The facts that are not the same in all runs, each with its value in every variant.

    A value is a list where the repeats of a variant differ among themselves. `of` restricts the facts to these names
    and prefixes (as in EQUAL).
    """
    found: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys(key for runs in named.values() for facts in runs for key in facts):
        if key.startswith(_NAMES_OF_A_RUN) if of is None else not _matches(key, of):
            continue
        # A key that a recipe lacks is null; an unfinished run has no `as run.` facts, which says nothing.
        values = {
            name: [facts.get(key) for facts in runs if key in facts or not key.startswith("as run.")]
            for name, runs in named.items()
        }
        if len({_canonical(value) for each in values.values() for value in each}) > 1:
            found[key] = {name: _one_or_list(each) for name, each in values.items() if each}
    return found


def _matches(key: str, names: Sequence[str]) -> bool:
    return any(key == name or (name.endswith((".", "_")) and key.startswith(name)) for name in names)


def _one_or_list(values: Sequence[Any]) -> Any:
    return values[0] if len({_canonical(value) for value in values}) == 1 else list(values)


def _canonical(value: Any) -> str:
    """Equal for equal values: 0 and 0.0 are."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return json.dumps(value, sort_keys=True, default=str)
