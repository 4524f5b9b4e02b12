"""From formatted text to token ids and labels: tokenize, mask, truncate."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from distft.data.templates import SYSTEM, Example

IGNORED = -100
"""Label of a token that the loss ignores."""
INSIDE = 2
"""How a sample was cut: inside a turn, none of which fits whole. 1: elsewhere; 0: not at all."""
NOT_SHORTENED = 3
"""Of a sample that is too long: nothing is left of it, because it cannot be cut (`Example.cut`)."""
_CHUNK = 1_000
"""Texts per call of the tokenizer, which spreads them over all cores."""
Offsets = list[tuple[int, int]]
"""The start and the end of each token's characters in the text, which are equal for a token that was added."""


def tokenize(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int | None,
    marked: Counter[str] | None = None,
    trained: Counter[str] | None = None,
) -> Iterator[tuple[list[int], list[int], int]]:
    """For each example, its input ids, its labels (same length, at most `max_length`) and whether it was truncated: 0,
    1, INSIDE or NOT_SHORTENED.

    The text is tokenized in one piece, exactly as the model will see it, so a token may straddle the boundary of the
    trained part; such a token is trained. The first label is always -100, because nothing predicts the first token.

    A text without a chat template ends in the end-of-sequence token, unless its end was cut off. It may have been
    rendered elsewhere, and already contain the token that begins or ends a sequence, which is then not added again;
    `marked` counts these texts by the token. A text that distft rendered is tokenized as it is; `trained` counts its
    trained tokens by the role of their turn.
    """
    for rendered, group in itertools.groupby(examples, key=lambda example: example.rendered):
        same = list(group)
        for start in range(0, len(same), _CHUNK):
            chunk = same[start : start + _CHUNK]
            encoded = tokenizer(
                [example.text for example in chunk],
                return_offsets_mapping=True,
                truncation=False,
                add_special_tokens=not rendered,
            )
            for example, ids, offsets in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                if rendered:
                    yield _turns(example, ids, offsets, tokenizer.bos_token_id, max_length, trained)
                else:
                    yield _text(example, ids, offsets, tokenizer, max_length, marked)


def _text(
    example: Example, ids: list[int], offsets: Offsets, tokenizer: Any, max_length: int | None, marked: Any
) -> tuple[list[int], list[int], bool]:
    """The sample of a text without a chat template, of which `_label` cuts tokens."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    ids, offsets, ended = _without_end(ids, offsets, example.text, eos)
    ids, offsets, begun = _begun_once(ids, offsets, example, bos, eos)
    if marked is not None:
        marked.update([tokenizer.eos_token] * ended + [tokenizer.bos_token] * begun)
    return _label(example, ids, offsets, eos, max_length)


def _turns(
    example: Example,
    ids: list[int],
    offsets: Offsets,
    bos: int | None,
    max_length: int | None,
    trained: Counter[str] | None,
) -> tuple[list[int], list[int], int]:
    """The sample of a conversation, from which whole turns are left out where it is too long."""
    labels = _labels(ids, offsets, example.trained)
    starts = [bisect.bisect_right(offsets, turn.start, key=lambda each: each[1]) for turn in example.turns]
    turns = list(zip(starts, [*starts[1:], len(ids)], [turn.role for turn in example.turns], strict=True))
    kept, cut = [(0, len(ids))], 0
    if max_length is not None and len(ids) > max_length:
        kept, cut = _shortened(example, turns, labels, offsets, max_length, begins=ids[0] == bos)
    if trained is not None:
        for start, end, role in turns:
            within = [labels[max(low, start, 1) : min(high, end)] for low, high in kept]
            if number := sum(label != IGNORED for part in within for label in part):
                trained[role] += number
    ids = [token for low, high in kept for token in ids[low:high]]
    labels = [label for low, high in kept for label in labels[low:high]]
    return ids, [IGNORED, *labels[1:]][: len(ids)], cut


def _shortened(
    example: Example,
    turns: Sequence[tuple[int, int, str]],
    labels: list[int],
    offsets: Offsets,
    room: int,
    *,
    begins: bool,
) -> tuple[list[tuple[int, int]], int]:
    """The tokens to keep of a conversation that is too long, as ranges, and how it was cut.

    `turns` have the first token, the one after the last, and the role. From the end, turns are left out up to one that
    is trained. From the beginning, they are left out down to a question; the system prompt stays, or at least the token
    that `begins` a sequence. If that leaves nothing, the first or the last trained turn is cut inside.
    """
    head = first = 0
    if example.cut == "nowhere":
        return [], NOT_SHORTENED
    if example.cut == "beginning":
        head = next((start for start, _, role in turns if role not in SYSTEM), len(labels)) or int(begins)
        questions = [start for start, _, role in turns if role == "user"]
        if fits := [start for start in questions if head + len(labels) - start <= room]:
            return [(0, head), (min(fits), len(labels))], True
        first = max(questions, default=head)
    stop = first + room - head
    ends = [end for start, end, _ in turns if start >= first and end <= stop and _any_trained(labels[start:end])]
    if ends:
        return [(0, head), (first, max(ends))], True
    stop = _before_end(stop, example, offsets)
    return ([(0, head), (first, stop)], INSIDE) if _any_trained(labels[first:stop]) else ([], True)


def _before_end(stop: int, example: Example, offsets: Offsets) -> int:
    """`stop`, or an earlier token, so that a cut before it does not halve what ends a turn, where that is text."""
    size, place = len(example.end), offsets[stop][0]
    begin = example.text.find(example.end, max(0, place - size + 1), place + size - 1) if size else -1
    return stop if begin < 0 else bisect.bisect_right(offsets, begin, key=lambda each: each[1])


def _any_trained(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels)


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
    if example.first_trained and bos != eos:
        first = bisect.bisect_right(offsets, example.first_trained, key=lambda each: each[1])
        while first < len(ids) and _is_blank(offsets[first], example.text):
            first += 1
        if 0 < first < len(ids) and ids[first] == bos and ids[first - 1] != eos:
            ids, offsets = ids[:first] + ids[first + 1 :], offsets[:first] + offsets[first + 1 :]
    return ids, offsets, len(ids) < before


def _is_blank(offsets: tuple[int, int], text: str) -> bool:
    return not text[offsets[0] : offsets[1]].strip()


def _labels(ids: list[int], offsets: Offsets, trained: Sequence[tuple[int, int]]) -> list[int]:
    """The tokens with a character in one of the parts that are `trained`, which are in order; the others are -100."""
    labels, place = [], 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        while place < len(trained) and trained[place][1] <= start:
            place += 1
        labels.append(token if place < len(trained) and end > trained[place][0] else IGNORED)
    return labels


def _label(
    example: Example, ids: list[int], offsets: Offsets, eos: int, max_length: int | None
) -> tuple[list[int], list[int], bool]:
    labels = _labels(ids, offsets, example.trained)
    tail = 0 if example.tail_from is None else sum(end > example.tail_from for _, end in offsets)
    ids, labels, tail = [*ids, eos], [*labels, eos], tail + 1 if tail else 0
    cut = max_length is not None and len(ids) > max_length
    if max_length is not None and cut:
        tail = min(tail, max_length)
        ids = ids[: max_length - tail] + ids[len(ids) - tail :]
        labels = labels[: max_length - tail] + labels[len(labels) - tail :]
    return ids, [IGNORED, *labels[1:]], cut
