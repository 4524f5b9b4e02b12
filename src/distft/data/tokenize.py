"""From formatted text to token ids and labels: tokenize, mask, truncate."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from distft.data.templates import Example

IGNORED = -100
"""Label of a token that the loss ignores."""
_CHUNK = 1_000
"""Texts per call of the tokenizer, which spreads them over all cores."""
Offsets = list[tuple[int, int]]
"""The start and the end of each token's characters in the text, which are equal for a token that was added."""


def tokenize(
    examples: Sequence[Example], tokenizer: Any, max_length: int | None, marked: Counter[str] | None = None
) -> Iterator[tuple[list[int], list[int], bool]]:
    """For each example, its input ids, its labels (same length, at most `max_length`) and whether it was truncated.

    The text is tokenized in one piece, exactly as the model will see it, so a token may straddle the boundary of the
    trained part; such a token is trained. The last token is the end-of-sequence token unless the end was cut off.
    The first label is always -100, because nothing predicts the first token.

    A text that was rendered with the model's template already contains the token that begins or ends a sequence, which
    is then not added again; `marked` counts these texts by the token.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        encoded = tokenizer([example.text for example in chunk], return_offsets_mapping=True, truncation=False)
        for example, ids, offsets in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids, offsets, ended = _without_end(ids, offsets, example.text, eos)
            ids, offsets, begun = _begun_once(ids, offsets, example, bos, eos)
            if marked is not None:
                marked.update([tokenizer.eos_token] * ended + [tokenizer.bos_token] * begun)
            yield _label(example, ids, offsets, eos, max_length)


def _without_end(ids: list[int], offsets: Offsets, text: str, eos: int) -> tuple[list[int], Offsets, bool]:
    """The tokens without an end of sequence, with what follows it if that is blank; and whether it is in the text."""
    tail = len(ids)
    while tail and (ids[tail - 1] == eos or _is_blank(offsets[tail - 1], text)):
        tail -= 1
    ends = [place for place in range(tail, len(ids)) if ids[place] == eos]
    stop = ends[0] if ends else len(ids)
    return ids[:stop], offsets[:stop], any(offsets[place][0] < offsets[place][1] for place in ends)


def _begun_once(
    ids: list[int], offsets: Offsets, example: Example, bos: int | None, eos: int
) -> tuple[list[int], Offsets, bool]:
    """The tokens with a single beginning of sequence, the last one, where a prompt or a completion brings its own; and
    whether one was dropped."""
    before = len(ids)
    if bos is None:
        return ids, offsets, False
    head = 0
    while head < len(ids) and (ids[head] == bos or _is_blank(offsets[head], example.text)):
        head += 1
    begins = [place for place in range(head) if ids[place] == bos]
    if len(begins) > 1:
        ids, offsets = ids[begins[-1] :], offsets[begins[-1] :]
    if example.trained_from and bos != eos:
        first = bisect.bisect_right(offsets, example.trained_from, key=lambda each: each[1])
        while first < len(ids) and _is_blank(offsets[first], example.text):
            first += 1
        if 0 < first < len(ids) and ids[first] == bos and ids[first - 1] != eos:
            ids, offsets = ids[:first] + ids[first + 1 :], offsets[:first] + offsets[first + 1 :]
    return ids, offsets, len(ids) < before


def _is_blank(offsets: tuple[int, int], text: str) -> bool:
    return not text[offsets[0] : offsets[1]].strip()


def _label(
    example: Example, ids: list[int], offsets: Offsets, eos: int, max_length: int | None
) -> tuple[list[int], list[int], bool]:
    labels = [token if end > example.trained_from else IGNORED for token, (_, end) in zip(ids, offsets, strict=True)]
    tail = 0 if example.tail_from is None else sum(end > example.tail_from for _, end in offsets)
    ids, labels, tail = [*ids, eos], [*labels, eos], tail + 1 if tail else 0
    cut = max_length is not None and len(ids) > max_length
    if max_length is not None and cut:
        tail = min(tail, max_length)
        ids = ids[: max_length - tail] + ids[len(ids) - tail :]
        labels = labels[: max_length - tail] + labels[len(labels) - tail :]
    return ids, [IGNORED, *labels[1:]], cut
