"""What a worker does with a piece of the rows: format, tokenize, and write the samples to an Arrow file.

A piece is complete once its record exists, which is written last. Arrow files have one sample per row, `input_ids` and
`labels`; samples without a trained token are left out of them, but not out of the record.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from distft.data.difficulty import difficulty
from distft.data.encode import Sample, encode
from distft.data.files import Row
from distft.data.formats import Formatter
from distft.data.templates import Dropped, Example
from distft.data.tokenize import INSIDE, NOT_SHORTENED
from distft.errors import DataError

Array = np.ndarray[Any, Any]
TRAINED, TRUNCATED, CUT_INSIDE, UNCUTTABLE = 1, 2, 4, 8
EXAMPLE = np.dtype(
    [("text", "<u8"), ("content", "<u8"), ("bytes", "<u4"), ("length", "<i4"), ("flags", "u1")], align=False
)
"""What is known of each example: hashes of its text and of `digest_record`, the size of the latter, its tokens, and
whether it is among the samples (TRAINED), was TRUNCATED, and that inside a turn (CUT_INSIDE), or should have been and
could not be (UNCUTTABLE)."""
SAMPLES_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
PAIRS_SCHEMA = SAMPLES_SCHEMA.append(pa.field("chosen", pa.int32()))
"""Of a pair, the sequence with the chosen answer has the first `chosen` tokens, the one with the rejected the rest.
Of an answer with a label, one has all."""
_AT_ONCE = 1 << 18
"""Characters of text whose tokens are in memory at once."""


class Segment(NamedTuple):
    """Consecutive rows of one part, and the number of the first, counted from 1."""

    part: str
    first: int
    rows: list[Row]


@dataclass(frozen=True)
class Worker:
    """Everything that the pieces of a source have in common. Calling it processes one piece."""

    folder: Path
    apply: Formatter
    tokenizer: Any
    max_length: int | None
    difficulty: str | None = None
    """The column of numbers to keep for each example."""

    def __call__(self, number: int, segments: Sequence[Segment], keeps_texts: bool) -> dict[str, Any]:
        """Write piece `number`, and return its record; `keeps_texts` writes what `digest_record` returns as well.

        Raises:
            DataError: a row does not fit the format; the message says which row.
        """
        path = self.folder / f"{number:06}"
        counts = {"dropped": Counter[str](), "noted": Counter[str]()}
        of_example: dict[str, list[tuple[int, int]]] = defaultdict(list)
        known: list[Array] = []
        difficulties: list[float] = []
        total = samples = 0
        with (
            pa.OSFile(f"{path}.arrow", "wb") as sink,
            pa.ipc.new_stream(sink, PAIRS_SCHEMA if self.apply.form.prefers else SAMPLES_SCHEMA) as writer,
            path.with_suffix(".texts").open("wb") as texts,
        ):
            for examples in _at_once(self._examples(segments, counts, difficulties)):
                found = encode(examples, self.tokenizer, self.max_length)
                records = [digest_record(example) for example in examples]
                known.append(_known(examples, records, found))
                for place, sample in enumerate(found, total):
                    for name, counted in (("marked", sample.marked), ("trained", sample.trained)):
                        for key, value in counted.items():
                            of_example[f"{name}:{key}"].append((place, value))
                total += len(examples)
                if kept := [sample for sample in found if sample.is_trained]:
                    samples += len(kept)
                    writer.write_batch(record_batch(kept))
                if keeps_texts:
                    texts.writelines(records)
        if not keeps_texts:
            path.with_suffix(".texts").unlink()
        arrays: dict[str, Any] = {key: np.array(pairs, np.int64) for key, pairs in of_example.items()}
        if self.difficulty is not None:
            arrays["difficulties"] = np.array(difficulties)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, examples=np.concatenate([np.zeros(0, EXAMPLE), *known]), **arrays)
        temporary.replace(path.with_suffix(".npz"))
        rows = sum(len(segment.rows) for segment in segments)
        record = {"rows": rows, "samples": samples, **counts}
        temporary.write_text(json.dumps(record), encoding="utf-8")  # a kill leaves a file that is written again
        temporary.replace(path.with_suffix(".json"))
        return record

    def _examples(
        self, segments: Sequence[Segment], counts: dict[str, Counter[str]], difficulties: list[float]
    ) -> Iterator[Example]:
        for part, first, rows in segments:
            for number, row in enumerate(rows, first):
                try:
                    example = self.apply(row)
                    hard = 0.0 if self.difficulty is None else difficulty(row, self.difficulty)
                except DataError as error:
                    raise DataError(f"{part}, row {number}: {error}") from None
                counts["noted"].update(example.notes)
                if isinstance(example, Dropped):
                    counts["dropped"][example.reason] += 1
                else:
                    difficulties.append(hard)
                    yield example


def digest_record(example: Example) -> bytes:
    """The text of an example and its trained parts: what a digest of the data consists of."""
    parts = example.trained if example.rendered else [example.first_trained]
    record = json.dumps([example.text, *parts]).encode()
    if example.good is not None:
        return record + (b" good" if example.good else b" bad")
    return record if example.rejected is None else record + digest_record(example.rejected)


def content_of(record: bytes) -> int:
    """A hash of what `digest_record` returns: of 100 million different ones, two are the same once in 3,700 cases."""
    return xxhash.xxh3_64_intdigest(record)


def _known(examples: Sequence[Example], records: Sequence[bytes], samples: Sequence[Sample]) -> Array:
    known = np.zeros(len(examples), dtype=EXAMPLE)
    known["text"] = [xxhash.xxh3_64_intdigest(example.text.encode()) for example in examples]
    known["content"] = [content_of(record) for record in records]
    known["bytes"] = list(map(len, records))
    known["length"] = [len(sample.ids) for sample in samples]
    known["flags"] = [
        TRAINED * each.is_trained
        + TRUNCATED * (each.cut > 0)
        + CUT_INSIDE * (each.cut == INSIDE)
        + UNCUTTABLE * (each.cut == NOT_SHORTENED)
        for each in samples
    ]
    return known


def _at_once(examples: Iterator[Example]) -> Iterator[list[Example]]:
    some: list[Example] = []
    size = 0
    for example in examples:
        some.append(example)
        size += len(example.text)
        if size >= _AT_ONCE:
            yield some
            some, size = [], 0
    if some:
        yield some


def record_batch(samples: Sequence[Sample]) -> pa.RecordBatch:
    """The samples as a record batch; both columns of tokens share their offsets."""
    ids, labels = [sample.ids for sample in samples], [sample.labels for sample in samples]
    offsets = pa.array(np.concatenate([[0], np.cumsum(list(map(len, ids)))]), pa.int32())
    columns: list[Any] = [
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(each), pa.int32())) for each in (ids, labels)
    ]
    if samples[0].chosen is None:
        return pa.record_batch(columns, schema=SAMPLES_SCHEMA)
    return pa.record_batch([*columns, pa.array([sample.chosen for sample in samples], pa.int32())], schema=PAIRS_SCHEMA)
