"""What a sample is: from text to token ids and labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

IGNORED = -100
"""Label of a token that the loss does not look at."""
_CHUNK = 1_000  # texts that the tokenizer takes at once, on all cores


@dataclass(frozen=True)
class Example:
    """One formatted row. `trained_from`: first character that the loss looks at; `tail_from`: first character that
    truncation keeps (it cuts before it), or None where truncation cuts at the end."""

    text: str
    trained_from: int = 0
    tail_from: int | None = None


def format_dolly(instruction: str, context: str | None, response: str, *, completion_only: bool) -> Example:
    """Dolly's template; the context block is left out where the context is empty or blank."""
    prompt = f"### Instruction:\n{instruction}\n\n"
    if context and context.strip():
        prompt += f"### Context:\n{context}\n\n"
    prompt += "### Response:\n"
    return Example(prompt + response, len(prompt) if completion_only else 0)


def format_review(review: str, word: str, *, completion_only: bool) -> Example:
    """A review without its HTML line breaks, then its label as a word; truncation cuts the review, never the label."""
    head = f"### Review:\n{re.sub(r'(?:<br */?> *)+', chr(10), review).strip()}"
    prompt = f"{head}\n\n### Sentiment:\n"
    return Example(prompt + word, len(prompt) if completion_only else 0, len(head))


def tokenise(
    examples: Sequence[Example], tokenizer: Any, max_length: int | None
) -> Iterator[tuple[list[int], list[int], bool]]:
    """Of each example its input_ids, labels (of one length, at most `max_length`) and whether something was cut off.

    The text is tokenised in one piece, as the model will meet it; a token that crosses into the trained part is trained.
    The first label is always -100: nothing predicts the first token.
    """
    eos = tokenizer.eos_token_id
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        encoded = tokenizer([example.text for example in chunk], return_offsets_mapping=True, truncation=False)
        for example, ids, offsets in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield _label(example, list(ids), offsets, eos, max_length)


def _label(
    example: Example, ids: list[int], offsets: Sequence[tuple[int, int]], eos: int, max_length: int | None
) -> tuple[list[int], list[int], bool]:
    if ids and ids[-1] == eos and offsets[-1][0] == offsets[-1][1]:  # the tokenizer's own, which ours replaces
        ids, offsets = ids[:-1], offsets[:-1]
    labels = [token if end > example.trained_from else IGNORED for token, (_, end) in zip(ids, offsets, strict=True)]
    tail = 0 if example.tail_from is None else sum(end > example.tail_from for _, end in offsets)
    ids, labels, tail = [*ids, eos], [*labels, eos], tail + 1 if tail else 0
    cut = max_length is not None and len(ids) > max_length
    if max_length is not None and cut:
        tail = min(tail, max_length)
        ids = ids[: max_length - tail] + ids[len(ids) - tail :]
        labels = labels[: max_length - tail] + labels[len(labels) - tail :]
    return ids, [IGNORED, *labels[1:]], cut


def lengths_of(samples: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Number of tokens of each sample, without making Python objects of them."""
    column = samples.with_format("arrow")[:].column("input_ids")
    return np.asarray(column.combine_chunks().value_lengths(), dtype=np.int64)


def at_most(samples: Dataset | None, limit: int | None) -> Dataset | None:
    """The first `limit` samples, or all."""
    return samples if samples is None or limit is None else samples.select(range(min(len(samples), limit)))
