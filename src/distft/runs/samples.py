"""The answers to a few held-out prompts, before and after training: `samples.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from distft.files import to_json, write_atomically
from distft.runs.folder import RunFolder

_SHOWN = 240
"""Characters of a text on the console."""


@dataclass(frozen=True)
class Answers:
    """The answer to each prompt by the model of a step: that of an evaluation, or that before or after training."""

    when: Literal["before", "evaluation", "after"]
    step: int
    texts: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"step {self.step:,}" if self.when == "evaluation" else self.when


@dataclass(frozen=True)
class Samples:
    """Prompts of the held-out split with their reference answers, and what the model has answered."""

    prompts: tuple[str, ...]
    references: tuple[str, ...]
    answers: tuple[Answers, ...] = field(default=())

    @classmethod
    def read(cls, folder: RunFolder) -> Samples | None:
        """What the run has answered so far; None if nothing.

        Raises:
            ValueError: the file is damaged.
        """
        if not folder.samples.is_file():
            return None
        found = json.loads(folder.samples.read_text(encoding="utf-8-sig"))
        try:
            answers = (Answers(each["when"], each["step"], tuple(each["texts"])) for each in found["answers"])
            return cls(tuple(found["prompts"]), tuple(found["references"]), tuple(answers))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder.samples} is damaged: {error!r}") from error

    def write(self, folder: RunFolder) -> None:
        write_atomically(folder.samples, to_json(asdict(self)) + "\n")

    def until(self, step: int) -> Samples:
        """Without the answers of later steps, which a run that resumes at `step` gives again."""
        kept = (each for each in self.answers if each.when != "after" and each.step <= step)
        return replace(self, answers=tuple(kept))

    def with_answers(self, answers: Answers) -> Samples:
        return replace(self, answers=(*self.answers, answers))

    def rows(self) -> list[tuple[int, str, str]]:
        """A line for each text: the number of its prompt, what it is, and the text."""
        return [
            (number + 1, label, text)
            for number, prompt in enumerate(self.prompts)
            for label, text in (
                ("prompt", prompt),
                ("reference", self.references[number]),
                *((each.label, each.texts[number]) for each in self.answers),
            )
        ]

    def table(self) -> tuple[list[str], list[list[str | int]]]:
        """Columns, and a row for each answer."""
        rows: list[list[str | int]] = [
            [self.prompts[number], self.references[number], each.label, each.step, text]
            for each in self.answers
            for number, text in enumerate(each.texts)
        ]
        return ["prompt", "reference", "when", "step", "answer"], rows

    def lines(self) -> list[str]:
        """What to print at the end of a run: of each text at most 240 characters, on one line."""
        return [
            f"held-out prompt {number}: {_shown(text, end=True)}" if label == "prompt" else f"  {label}: {_shown(text)}"
            for number, label, text in self.rows()
            if not label.startswith("step ")
        ]


def _shown(text: str, *, end: bool = False) -> str:
    """One line of a text: its beginning or, of a prompt, its `end`."""
    line = " ".join(text.split())
    if len(line) <= _SHOWN:
        return line
    return f"…{line[1 - _SHOWN :]}" if end else f"{line[: _SHOWN - 1]}…"
