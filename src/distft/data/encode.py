"""Tokenize examples into arrays: what `distft.data.tokenize` returns, without a Python object for each token.

The fast way covers texts without a chat template that bring no token which begins or ends a sequence; the others go
through `tokenize`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distft.data.segments import Characters, Encoded, Ids, SegmentEncoder, encode_whole
from distft.data.templates import Example
from distft.data.tokenize import IGNORED, tokenize


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
    chosen: int | None = None
    """Of a pair, the tokens of the better sequence, which the other follows in `ids` and `labels`. Of an answer with a
    label, all tokens if it is good, or none."""


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int | None) -> list[Sample]:
    """The sample of each example, as `tokenize` defines it; of a pair, both sequences, one after the other."""
    if pairs := [(example, example.rejected) for example in examples if example.rejected is not None]:
        assert len(pairs) == len(examples)
        chosen, rejected = (_encode(each, tokenizer, max_length) for each in zip(*pairs, strict=True))
        return list(map(_joined, chosen, rejected))
    found = _encode(examples, tokenizer, max_length)
    return [
        each if example.good is None else Sample(*each[:-1], chosen=len(each.ids) if example.good else 0)
        for example, each in zip(examples, found, strict=True)
    ]


def _joined(chosen: Sample, rejected: Sample) -> Sample:
    """A pair is trained if a token of both answers is left, and was cut as the one that was cut more."""
    return Sample(
        np.concatenate([chosen.ids, rejected.ids]),
        np.concatenate([chosen.labels, rejected.labels]),
        max(chosen.cut, rejected.cut),
        chosen.is_trained and rejected.is_trained,
        Counter(chosen.marked) + Counter(rejected.marked),
        Counter(chosen.trained) + Counter(rejected.trained),
        len(chosen.ids),
    )


def _encode(examples: Sequence[Example], tokenizer: Any, max_length: int | None) -> list[Sample]:
    found = _fast(examples, tokenizer, max_length)
    slow = _slow([example for example in examples if id(example) not in found], tokenizer, max_length)
    return [found.get(id(example)) or next(slow) for example in examples]


def _fast(examples: Sequence[Example], tokenizer: Any, max_length: int | None) -> dict[int, Sample]:
    """The samples of the examples that need nothing else, by their `id`."""
    plain = [each for each in examples if each.trained == ((each.first_trained, len(each.text)),) and not each.rendered]
    if not plain:
        return {}
    encode_texts = _encoder(tokenizer, len(tokenizer))
    encoded = encode_texts([each.text for each in plain], [(each.first_trained, each.tail_from) for each in plain])
    samples = {
        id(example): _sample(example, found, tokenizer, max_length)
        for example, found in zip(plain, encoded, strict=True)
    }
    return {key: sample for key, sample in samples.items() if sample is not None}


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer: Any, size: int) -> Callable[[Sequence[str], Sequence[Characters]], list[Encoded]]:
    """What encodes texts for a tokenizer of `size` entries."""
    tokenizer([""], truncation=False)  # tells the backend not to truncate or pad
    backend = tokenizer.backend_tokenizer
    segments = SegmentEncoder(backend)
    return segments if segments.can_encode else functools.partial(encode_whole, backend)


def _sample(example: Example, encoded: Encoded, tokenizer: Any, max_length: int | None) -> Sample | None:
    """None if the text brings special tokens, or characters that no token has."""
    ids, (first, tail) = encoded.ids, encoded.places
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    special = (ids == eos) | (ids == bos)
    if not len(ids) or special[1:].any() or bos != eos == ids[0]:
        return None
    if first is None or (tail is None) != (example.tail_from is None) or not encoded.ends:
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
