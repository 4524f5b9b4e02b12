"""From formatted text to token ids and labels: tokenize, mask, truncate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from distft.data.templates import Example

IGNORED = -100
"""Label of a token that the loss ignores."""
_CHUNK = 1_000
"""Texts per call of the tokenizer, which spreads them over all cores."""


def tokenize(
    examples: Sequence[Example], tokenizer: Any, max_length: int | None
) -> Iterator[tuple[list[int], list[int], bool]]:
    """For each example, its input ids, its labels (same length, at most `max_length`) and whether it was truncated.

    The text is tokenized in one piece, exactly as the model will see it, so a token may straddle the boundary of the
    trained part; such a token is trained. The last token is the end-of-sequence token unless the end was cut off.
    The first label is always -100, because nothing predicts the first token.
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
    if ids and ids[-1] == eos and offsets[-1][0] == offsets[-1][1]:  # added by the tokenizer; we append our own
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
