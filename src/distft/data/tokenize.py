"""From formatted text to token ids and labels: tokenize, mask, truncate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from distft.data.templates import Example

IGNORED = -100
"""Label of a token that the loss ignores."""
_CHUNK = 1_000
"""Texts per call of the tokenizer, which spreads them over all cores."""
Tokens = list[tuple[int, tuple[int, int]]]
"""Token ids, each with the start and the end of its characters in the text, which are equal for an added token."""


def tokenize(
    examples: Sequence[Example], tokenizer: Any, max_length: int | None, marked: Counter[str] | None = None
) -> Iterator[tuple[list[int], list[int], bool]]:
    """For each example, its input ids, its labels (same length, at most `max_length`) and whether it was truncated.

    The text is tokenized in one piece, exactly as the model will see it, so a token may straddle the boundary of the
    trained part; such a token is trained. The last token is the end-of-sequence token unless the end was cut off.
    The first label is always -100, because nothing predicts the first token.

    A text that was rendered with the model's template brings its own beginning or end of sequence, which then stands
    there once; `marked` counts these texts by the token.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        encoded = tokenizer([example.text for example in chunk], return_offsets_mapping=True, truncation=False)
        for example, ids, offsets in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            tokens, ended = _without_end(list(zip(ids, offsets, strict=True)), example.text, eos)
            tokens, begun = _begun_once(tokens, example, bos, eos)
            if marked is not None:
                marked.update([tokenizer.eos_token] * ended + [tokenizer.bos_token] * begun)
            yield _label(example, tokens, eos, max_length)


def _without_end(tokens: Tokens, text: str, eos: int) -> tuple[Tokens, bool]:
    """`tokens` without an end of sequence, with what follows it if that is blank; and whether it is in the text."""
    tail = len(tokens)
    while tail and (tokens[tail - 1][0] == eos or _is_blank(tokens[tail - 1], text)):
        tail -= 1
    ends = [place for place in range(tail, len(tokens)) if tokens[place][0] == eos]
    return tokens[: ends[0]] if ends else tokens, any(tokens[place][1][0] < tokens[place][1][1] for place in ends)


def _begun_once(tokens: Tokens, example: Example, bos: int | None, eos: int) -> tuple[Tokens, bool]:
    """`tokens` with a single beginning of sequence, the last one, where a prompt or a completion brings its own; and
    whether one was dropped."""
    if bos is None:
        return tokens, False
    head = 0
    while head < len(tokens) and (tokens[head][0] == bos or _is_blank(tokens[head], example.text)):
        head += 1
    begins = [place for place in range(head) if tokens[place][0] == bos]
    kept = tokens[begins[-1] :] if len(begins) > 1 else tokens
    if example.trained_from and bos != eos:
        inside = (place for place, token in enumerate(kept) if token[1][1] > example.trained_from)
        first = next((place for place in inside if not _is_blank(kept[place], example.text)), 0)
        if first and kept[first][0] == bos and kept[first - 1][0] != eos:
            kept = kept[:first] + kept[first + 1 :]
    return kept, len(kept) < len(tokens)


def _is_blank(token: tuple[int, tuple[int, int]], text: str) -> bool:
    _, (start, end) = token
    return not text[start:end].strip()


def _label(example: Example, tokens: Tokens, eos: int, max_length: int | None) -> tuple[list[int], list[int], bool]:
    """The ids and labels of `tokens` and of the end of sequence."""
    ids = [token for token, _ in tokens]
    labels = [token if end > example.trained_from else IGNORED for token, (_, end) in tokens]
    tail = 0 if example.tail_from is None else sum(end > example.tail_from for _, (_, end) in tokens)
    ids, labels, tail = [*ids, eos], [*labels, eos], tail + 1 if tail else 0
    cut = max_length is not None and len(ids) > max_length
    if max_length is not None and cut:
        tail = min(tail, max_length)
        ids = ids[: max_length - tail] + ids[len(ids) - tail :]
        labels = labels[: max_length - tail] + labels[len(labels) - tail :]
    return ids, [IGNORED, *labels[1:]], cut
