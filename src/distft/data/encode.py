"""Tokenize examples into arrays: what `distft.data.tokenize` returns, without a Python object for each token.

Where the tokenizer is known to `distft.data.words`, that does it. Of the other texts, the fast way covers those without
a chat template that bring no token which begins or ends a sequence; what is left goes through `tokenize`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distft.data.templates import Example
from distft.data.tokenize import IGNORED, tokenize
from distft.data.words import Ids, Tokens, Words


class Sample(NamedTuple):
    """The ids and labels of an example [tokens], and what the report counts."""

    ids: Ids
    labels: Ids
    cut: int
    """Truncated: 0, 1, or INSIDE."""
    is_trained: bool
    """Has a trained token."""
    marked: Mapping[str, int] = {}
    trained: Mapping[str, int] = {}


def encode(
    examples: Sequence[Example], tokenizer: Any, max_length: int | None, words: Words | None = None
) -> list[Sample]:
    """The sample of each example, as `tokenize` defines it; `words` are those of the tokenizer."""
    found: dict[int, Sample] = {}
    if words is not None:
        for example in examples:
            tokens = words(example.text, not example.rendered)
            sample = None if tokens is None else _of_words(example, tokens, tokenizer, max_length)
            if sample is not None:
                found[id(example)] = sample
    found |= _fast([example for example in examples if id(example) not in found], tokenizer, max_length)
    slow = _slow([example for example in examples if id(example) not in found], tokenizer, max_length)
    return [found.get(id(example)) or next(slow) for example in examples]


def _of_words(example: Example, tokens: Tokens, tokenizer: Any, max_length: int | None) -> Sample | None:
    """None if a conversation is too long, a text without a chat template brings special tokens, or a part is empty or
    begins within a word."""
    if example.rendered:
        return _conversation(example, tokens, max_length)
    if not _is_plain(example) or not example.text.strip() or _has_ends(tokens.ids, tokenizer):
        return None
    if example.tail_from == len(example.text):
        return None
    covered = tokens.covers(example.first_trained, len(example.text))
    tail = None if example.tail_from is None else tokens.first_from(example.tail_from)
    if covered is None or (tail is None) != (example.tail_from is None):
        return None
    return _cut(tokens.ids, covered[0], tail, tokenizer.eos_token_id, max_length)


def _conversation(example: Example, tokens: Tokens, max_length: int | None) -> Sample | None:
    ids, labels = tokens.ids, np.full_like(tokens.ids, IGNORED)
    if max_length is not None and len(ids) > max_length:
        return None
    for start, end in example.trained:
        covered = tokens.covers(start, end)
        if covered is None:
            return None
        labels[slice(*covered)] = ids[slice(*covered)]
    labels[:1] = IGNORED
    is_trained = labels != IGNORED
    starts = [tokens.first_from(turn.start) for turn in example.turns]
    counted = Counter[str]()
    for turn, low, high in zip(example.turns, starts, [*starts[1:], len(ids)], strict=True):
        if low is None or high is None:
            return None
        if number := int(np.count_nonzero(is_trained[low:high])):
            counted[turn.role] += number
    return Sample(ids, labels, 0, bool(is_trained.any()), trained=counted)


def _is_plain(example: Example) -> bool:
    """Whether it is trained up to its end, and has no chat template."""
    return not example.rendered and example.trained == ((example.first_trained, len(example.text)),)


def _has_ends(ids: Ids, tokenizer: Any) -> bool:
    """Whether there is a token that begins or ends a sequence, other than one that begins the text."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    special = (ids == eos) | (ids == bos)
    return bool(not len(ids) or special[1:].any() or bos != eos == ids[0])


def _fast(examples: Sequence[Example], tokenizer: Any, max_length: int | None) -> dict[int, Sample]:
    """The samples of the examples that need nothing else, by their `id`."""
    plain = [example for example in examples if _is_plain(example)]
    if not plain:
        return {}
    tokenizer([""], truncation=False)  # tells the backend not to truncate or pad
    encodings = tokenizer.backend_tokenizer.encode_batch([example.text for example in plain])
    samples = {
        id(example): _sample(example, encoding, tokenizer, max_length)
        for example, encoding in zip(plain, encodings, strict=True)
    }
    return {key: sample for key, sample in samples.items() if sample is not None}


def _sample(example: Example, encoding: Any, tokenizer: Any, max_length: int | None) -> Sample | None:
    """None if the text brings special tokens, or characters that no token has."""
    ids = np.array(encoding.ids, dtype=np.int32)
    if _has_ends(ids, tokenizer):
        return None
    first = encoding.char_to_token(example.first_trained)
    tail = None if example.tail_from is None else encoding.char_to_token(example.tail_from)
    last = encoding.token_to_chars(len(ids) - 1)  # a token that was added at the end has no characters
    if first is None or (tail is None) != (example.tail_from is None) or last is None or last[1] < len(example.text):
        return None
    return _cut(ids, first, tail, tokenizer.eos_token_id, max_length)


def _cut(ids: Ids, first: int, tail: int | None, eos: int, max_length: int | None) -> Sample:
    """The sample of a text that is trained from the token `first` on; truncation keeps the tokens from `tail` on."""
    ids = np.append(ids, np.int32(eos))
    labels = ids.copy()
    labels[:first] = IGNORED
    cut = max_length is not None and len(ids) > max_length
    if max_length is not None and cut:
        kept = 0 if tail is None else min(len(ids) - tail, max_length)
        ids, labels = (np.concatenate([x[: max_length - kept], x[len(x) - kept :]]) for x in (ids, labels))
    labels[:1] = IGNORED
    return Sample(ids, labels, cut, bool((labels != IGNORED).any()))


def _slow(examples: Sequence[Example], tokenizer: Any, max_length: int | None) -> Iterator[Sample]:
    marked, trained = Counter[str](), Counter[str]()
    for ids, labels, cut in tokenize(examples, tokenizer, max_length, marked, trained):
        array = np.array(labels, dtype=np.int32)
        yield Sample(
            np.array(ids, dtype=np.int32), array, cut, bool((array != IGNORED).any()), dict(marked), dict(trained)
        )
        marked.clear()
        trained.clear()
