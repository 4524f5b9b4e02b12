"""The prompt templates: how the columns of a row become the text that the model sees.

These are for training from columns without a chat template; `distft data preview` uses them too. Chat templates are in
`distft.data.chat_template`, and which one evaluation uses, in `distft.evaluation.template`. After changing a template,
raise `distft.data.prepare._VERSION`, so that samples cached with the old one are prepared again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

SYSTEM = ("system", "developer")
"""The roles of system prompts."""


class Turn(NamedTuple):
    """Who speaks from which character of a text on, up to the next turn or the end."""

    role: str
    start: int


@dataclass(frozen=True)
class Example:
    """One formatted row: its text, which parts of it are trained, and where truncation may cut it."""

    text: str
    trained: tuple[tuple[int, int], ...]
    """The parts that count towards the loss: the first character of each, and the one after its last."""
    tail_from: int | None = None
    """Truncation cuts just before this character and keeps what follows; None cuts at the end of the text."""
    rendered: bool = False
    """The text holds every special token that the model is to see: nothing is added, neither at its beginning nor at
    its end."""
    turns: tuple[Turn, ...] = ()
    """The turns of a conversation, which cover the text. Truncation leaves out whole turns, if that leaves any."""
    cut: Literal["end", "beginning", "nowhere"] = "end"
    """Which turns of a long conversation truncation leaves out. A system prompt at the beginning stays. `nowhere`: it
    cannot be shortened."""
    end: str = ""
    """What ends a turn of the assistant. A cut inside a turn leaves no half of it."""
    notes: tuple[str, ...] = ()
    """What the report counts about this row, such as `null prompt`."""
    rejected: Example | None = None
    """Of a pair, the example with the worse answer; this one has the better."""
    good: bool | None = None
    """Of an answer with a label, what the label says."""

    @classmethod
    def trained_from(cls, text: str, start: int = 0, **fields: Any) -> Example:
        """An example that is trained from the character `start` to its end."""
        return cls(text, ((start, len(text)),), **fields)

    @property
    def first_trained(self) -> int:
        """Index of the first character that counts towards the loss."""
        return self.trained[0][0] if self.trained else len(self.text)


class Dropped(NamedTuple):
    """A row that is not trained on, and why: `an empty response`. `notes` as in `Example`."""

    reason: str
    notes: tuple[str, ...] = ()


def format_dolly(instruction: str, context: str | None, response: str, *, completion_only: bool) -> Example:
    """Dolly's instruction template; the context block is omitted if the context is blank."""
    prompt = f"### Instruction:\n{instruction}\n\n"
    if context and context.strip():
        prompt += f"### Context:\n{context}\n\n"
    prompt += "### Response:\n"
    return Example.trained_from(prompt + response, len(prompt) if completion_only else 0)


def format_review(review: str, word: str, *, completion_only: bool) -> Example:
    """A review without HTML line breaks, then its label as a word. Truncation shortens the review, never the label."""
    head = f"### Review:\n{re.sub(r'(?:<br */?> *)+', chr(10), review).strip()}"
    prompt = f"{head}\n\n### Sentiment:\n"
    return Example.trained_from(prompt + word, len(prompt) if completion_only else 0, tail_from=len(head))
