"""Tokenize examples into arrays: what `distft.data.tokenize` returns, without a Python object for each token.

The fast way covers texts without a chat template that bring no token which begins or ends a sequence; the others go
through `tokenize`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distft.data.templates import Example
from distft.data.tokenize import IGNORED, tokenize

Ids = np.ndarray[Any, np.dtype[np.int32]]


class Sample(NamedTuple):
    """The ids and labels of an example [tokens], and what the report counts."""

    ids: Ids
    labels: Ids
    cut: int
    """Truncated: 0, 1, INSIDE or NOT_SHORTENED."""
    is_trained: bool
    """Has a trained token."""
    marked: Mapping[str, int] = {}
    trained: Mapping[str, int] = {}


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int | None) -> list[Sample]:
    """The sample of each example, as `tokenize` defines it."""
    found = _fast(examples, tokenizer, max_length)
    slow = _slow([example for example in examples if id(example) not in found], tokenizer, max_length)
    return [found.get(id(example)) or next(slow) for example in examples]


def _fast(examples: Sequence[Example], tokenizer: Any, max_length: int | None) -> dict[int, Sample]:
    """The samples of the examples that need nothing else, by their `id`."""
    plain = [each for each in examples if each.trained == ((each.first_trained, len(each.text)),) and not each.rendered]
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
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    special = (ids == eos) | (ids == bos)
    if not len(ids) or special[1:].any() or bos != eos == ids[0]:
        return None
    first = encoding.char_to_token(example.first_trained)
    tail = None if example.tail_from is None else encoding.char_to_token(example.tail_from)
    last = encoding.token_to_chars(len(ids) - 1)  # a token that was added at the end has no characters
    if first is None or (tail is None) != (example.tail_from is None) or last is None or last[1] < len(example.text):
        return None
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
