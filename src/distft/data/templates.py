"""The prompt templates: how the columns of a row become the text that the model sees.

These are for training from columns; `distft data preview` uses them too. The chat template that evaluation applies to
questions is in `distft.evaluation.generate`. After changing a template, raise `distft.data.prepare._VERSION`, so
that samples cached with the old one are prepared again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One formatted row: its text, and which part of it is trained and protected from truncation."""

    text: str
    trained_from: int = 0
    """Index of the first character that counts towards the loss."""
    tail_from: int | None = None
    """Truncation cuts just before this character and keeps what follows; None cuts at the end of the text."""


def format_dolly(instruction: str, context: str | None, response: str, *, completion_only: bool) -> Example:
    """Dolly's instruction template; the context block is omitted if the context is blank."""
    prompt = f"### Instruction:\n{instruction}\n\n"
    if context and context.strip():
        prompt += f"### Context:\n{context}\n\n"
    prompt += "### Response:\n"
    return Example(prompt + response, len(prompt) if completion_only else 0)


def format_review(review: str, word: str, *, completion_only: bool) -> Example:
    """A review without HTML line breaks, then its label as a word. Truncation shortens the review, never the label."""
    head = f"### Review:\n{re.sub(r'(?:<br */?> *)+', chr(10), review).strip()}"
    prompt = f"{head}\n\n### Sentiment:\n"
    return Example(prompt + word, len(prompt) if completion_only else 0, len(head))
