"""The proof of an export: held-out rows are replayed through it, and each stage is compared with the one before.

template → tokenizer → merge → quantise → engine. The first stage that broke is named; those after it are still
measured, each against the stage before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from distft.export.distance import Distance, Predictions, distance
from distft.export.replay import Replay, Replays
from distft.export.sides import Side

Name = Literal["template", "tokenizer", "merge", "quantise", "engine"]
ORDER: tuple[Name, ...] = ("template", "tokenizer", "merge", "quantise", "engine")
NEW_TOKENS = 24
"""Tokens of a greedy continuation."""
NO_ENGINE = "none"
_AROUND = 24
"""Characters or tokens that are shown of a difference."""


@dataclass(frozen=True)
class Stage:
    """What was found of a stage. `passed` is None where it does not apply or could not be checked."""

    name: Name
    passed: bool | None
    found: str
    distance: Distance | None = None
    limit: float | None = None

    def record(self) -> dict[str, Any]:
        measured = {} if self.distance is None else self.distance.record() | {"limit": self.limit}
        return {"passed": self.passed, "found": self.found, **measured}


@dataclass(frozen=True)
class Proof:
    """The stages in their order, and the whole: the trained model against what is handed over."""

    stages: list[Stage]
    whole: Distance | None
    continuations: Mapping[str, float] | None
    rows: int
    split: str
    engine: str
    notes: Sequence[str] = field(default_factory=list)

    @property
    def broken(self) -> Stage | None:
        """The first stage that broke."""
        return next((stage for stage in self.stages if stage.passed is False), None)

    @property
    def passed(self) -> bool | None:
        """None if nothing broke, but a program that reads the files was not there to check them."""
        if self.broken is not None:
            return False
        return None if self.engine == NO_ENGINE else True

    def record(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "broken": None if self.broken is None else self.broken.name,
            "engine": self.engine,
            "rows": self.rows,
            "split": self.split,
            "stages": {stage.name: stage.record() for stage in self.stages},
            "trained_to_export": None if self.whole is None else self.whole.record(),
            "continuations": self.continuations,
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """For the console."""
        words = {True: "passed", False: "BROKEN", None: "–"}
        rows = [f"  {stage.name:<10} {words[stage.passed]:<7} {stage.found}" for stage in self.stages]
        if self.whole is not None:
            rows.append(f"  {'whole':<10} {'':<7} {self.whole}")
        if self.continuations is not None:
            same, prefix = self.continuations["same"], self.continuations["common_prefix"]
            rows.append(f"  {'greedy':<10} {'':<7} {same:.0%} of continuations the same, {prefix:.0%} of their tokens")
        return [*rows, *(f"  note: {note}" for note in self.notes)]


def template_stage(side: Side, replays: Replays) -> Stage:
    """Whether conversations become the prompts of the training."""
    if not replays.is_chat:
        return Stage("template", None, "prompts have no chat template")
    checked = 0
    for number, item in enumerate(replays.items):
        if item.messages is None or item.prompt is None or (rendered := side.render(item)) is None:
            continue
        checked += 1
        rendered = side.begins + rendered
        if rendered != item.prompt:
            return Stage("template", False, f"row {number + 1}: {_text_difference(rendered, item.prompt)}")
    if not checked:
        return Stage("template", None, "the program does not say how it renders a conversation")
    return Stage("template", True, f"equal in {checked} prompts")


def tokenizer_stage(side: Side, trained: Side, replays: Replays) -> Stage:
    """Whether prompts become the tokens of the training, and answers end where they did."""
    checked = 0
    for number, item in enumerate(replays.items):
        text = item.prompt or item.text
        if text is None:
            continue
        chat = item.messages is not None
        expected = trained.ids(text, chat=chat)
        found = side.ids(text.removeprefix(side.begins) if chat else text, chat=chat)
        checked += 1
        if found != expected:
            return Stage("tokenizer", False, f"row {number + 1}: {_ids_difference(found, expected)}")
    stops = side.stops()
    if stops is not None and (lost := sorted(replays.ends - stops)):
        return Stage(
            "tokenizer", False, f"answers ended with token {lost[0]} in training, and do not end there any more"
        )
    return Stage("tokenizer", True, f"equal in {checked} prompts") if checked else _unknown("tokenizer")


def no_end(token: int) -> str:
    return f"answers ended with token {token} in training, and do not end there any more"


def _unknown(name: Name) -> Stage:
    return Stage(name, None, "the rows of the run were not found again")


def measured_stage(
    name: Name,
    one: Sequence[Predictions],
    other: Sequence[Predictions],
    limit: float,
    cause: str | None = None,
) -> Stage:
    """A stage that may change predictions by a KL divergence of `limit` nats per token. A known `cause` of other
    predictions breaks it in any case."""
    found = distance(one, other)
    passed = cause is None and found.kl.value <= limit
    said = str(found) if cause is None else f"{cause} ({found})"
    return Stage(name, passed, said if passed or cause else f"{said}; at most {limit:g} expected", found, limit)


def compare_continuations(one: Sequence[list[int]], other: Sequence[list[int]]) -> dict[str, float]:
    """The share of greedy continuations that are the same, and of their tokens before the first difference."""
    common = [_common(first, second) for first, second in zip(one, other, strict=True)]
    longest = [max(len(first), len(second), 1) for first, second in zip(one, other, strict=True)]
    same = [first == second for first, second in zip(one, other, strict=True)]
    return {"same": sum(same) / len(same), "common_prefix": sum(common) / sum(longest), "tokens": NEW_TOKENS}


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    short = min(len(one), len(other))
    return next((at for at in range(short) if one[at] != other[at]), short)


def _text_difference(found: str, expected: str) -> str:
    at = _common(found, expected)
    here, there = (repr(text[max(0, at - 8) : at + _AROUND]) for text in (found, expected))
    return f"from character {at} on the prompt is {here}, in training {there}"


def _ids_difference(found: Sequence[int], expected: Sequence[int]) -> str:
    at = _common(found, expected)
    if at < 2 and list(found[1:]) == list(expected):
        return f"token {found[0]} comes before the prompt, which begins with {expected[0]} in training"
    return f"from token {at} on the prompt is {list(found[at : at + 6])}, in training {list(expected[at : at + 6])}"


def in_order(stages: Sequence[Stage]) -> list[Stage]:
    return sorted(stages, key=lambda stage: ORDER.index(stage.name))


def openings_only(items: Sequence[Replay], number: int) -> list[Replay]:
    """The rows of which continuations are compared: generating takes longer than reading."""
    return list(items[:number])
