"""`data.streaming`: data that need not fit on disk, tokenized window by window as they are read.

The stream is the rows of all files in order, without the first `held_out` rows, again and again. A window is its next
`size` samples (`data.window`, rounded down to whole global batches): rows that give no sample are passed over, so every
window has the same number of optimizer steps, every step has the exact global batch, and nothing is carried over.
Window w is a folder of the cache, made once by whichever process needs it first (`build_folder_once`), or ahead of time
by `distft.data.prefetch`. Its record says at which row it ends and so where w + 1 begins; records are small and stay.
The folders of windows that were trained on are removed, except for the first: on disk are that one, the current one,
those next to it, and, of files at addresses, the one that is being read.

A window is an epoch of the trainer (`distft.data.windowed_plan`): its samples are shuffled with the seed and the number
of the window, whatever the number of processes. A resumed run therefore needs nothing but its step: it opens the window
of that step, from its folder, or again from the rows after the record of the window before. Only if the cache has lost
the records, too, are all windows before made again.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from filelock import FileLock

from distft.data.encode import Sample, encode
from distft.data.files import Row
from distft.data.formats import Formatter
from distft.data.pieces import SAMPLES_SCHEMA, Array, record_batch
from distft.data.sources import Rows
from distft.data.templates import Dropped, Example
from distft.data.tokenize import INSIDE, NOT_SHORTENED
from distft.errors import DataError
from distft.files import build_folder_once, write_atomically

_AT_ONCE = 500
"""Rows that are tokenized together."""


class Position(NamedTuple):
    """The place after a row: how often the stream has begun again, the number of the file, and the rows read of it."""

    passes: int = 0
    part: int = 0
    row: int = 0


@dataclass(frozen=True)
class Window:
    """The samples of a window on disk, and the tokens of each, [samples]."""

    file: Path
    lengths: Array


@dataclass
class Stream:
    """The windows of a stream of rows. It can be sent to another process."""

    folder: Path
    rows: Rows
    form: Formatter
    tokenizer: Any
    max_length: int | None
    size: int
    """Samples of a window."""
    held_out: int
    """Rows at the beginning that are not part of the stream."""
    _reading: tuple[Position, Iterator[tuple[Position, Row]]] | None = field(default=None, init=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reading": None}

    def window(self, number: int) -> Window:
        """Window `number`, counted from 0, made now unless it exists.

        Raises:
            DataError: a row cannot be read or does not fit the format, or there are too few samples.
        """
        folder = self._folder(number)
        if not self._is_whole(number):
            with self._lock():
                self._make_up_to(number)
        return Window(folder / "samples.arrow", np.load(folder / "lengths.npy"))

    def make_ahead(self, number: int) -> None:
        """Make a window that never was: one that was made and is gone lies behind."""
        with self._lock():
            if not self._record(number).exists():
                self._make_up_to(number)

    def _lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / "lock")

    def _make_up_to(self, number: int) -> None:
        """Make a window, and those before it whose records are missing."""
        while not self._is_whole(number):
            following = next((n for n in range(number, 0, -1) if self._record(n - 1).exists()), 0)
            if not self._record(following).exists():
                shutil.rmtree(self._folder(following), ignore_errors=True)
            build_folder_once(self._folder(following), functools.partial(self._make, following), resumes=True)
            if following < number:  # it was made for its record
                self.remove(following)

    def remove(self, number: int) -> None:
        """Remove the samples of a window, but not its record; the first stays, because every start looks at it."""
        if number > 0:
            shutil.rmtree(self._folder(number), ignore_errors=True)

    def record(self, number: int) -> dict[str, Any]:
        """What is known of a window that was made: `end`, its position, `tokens`, those up to its end, and counts."""
        found: dict[str, Any] = json.loads(self._record(number).read_text(encoding="utf-8"))
        return found

    def _is_whole(self, number: int) -> bool:
        return self._record(number).exists() and self._folder(number).exists()

    def _folder(self, number: int) -> Path:
        return self.folder / f"{number:06}"

    def _record(self, number: int) -> Path:
        return self.folder / f"{number:06}.json"

    def _make(self, number: int, temporary: Path) -> None:
        before: dict[str, Any] = self.record(number - 1) if number else {"end": Position(), "tokens": 0}
        start = Position(*before["end"])
        rows = self._rows_after(start)
        lengths: list[int] = []
        counts: dict[str, Any] = {name: Counter[str]() for name in ("dropped", "noted", "trained", "marked", "samples")}
        end = start
        with (
            pa.OSFile(str(temporary / "samples.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, SAMPLES_SCHEMA) as writer,
        ):
            while len(lengths) < self.size:
                some = list(itertools.islice(rows, _AT_ONCE))
                taken, kept = self._samples(some, self.size - len(lengths), counts)
                end = some[taken - 1][0]
                rows = itertools.chain(some[taken:], rows)
                if kept:
                    writer.write_batch(record_batch(kept))
                    lengths += [len(sample.ids) for sample in kept]
                self._check(number, end)
        self._reading = end, rows
        np.save(temporary / "lengths.npy", np.array(lengths, dtype=np.int64))
        record = {"end": end, "tokens": before["tokens"] + sum(lengths), **counts}
        write_atomically(self._record(number), json.dumps(record))

    def _samples(self, rows: list[tuple[Position, Row]], wanted: int, counts: Any) -> tuple[int, list[Sample]]:
        """How many of the rows give the `wanted` samples, all if they give fewer; and these samples."""
        made = [self._example(at, row) for at, row in rows]
        encoded = iter(encode([each for each in made if isinstance(each, Example)], self.tokenizer, self.max_length))
        kept: list[Sample] = []
        for taken, example in enumerate(made, 1):
            counts["noted"].update(example.notes)
            if isinstance(example, Dropped):
                counts["dropped"][example.reason] += 1
                continue
            sample = next(encoded)
            counts["trained"].update(sample.trained)
            counts["marked"].update(sample.marked)
            counts["samples"] += Counter(
                truncated=sample.is_trained and sample.cut > 0,
                cut_inside=sample.is_trained and sample.cut == INSIDE,
                uncuttable=sample.cut == NOT_SHORTENED,
                untrained=not sample.is_trained,
            )
            kept += [sample] * sample.is_trained
            if len(kept) == wanted:
                return taken, kept
        return len(made), kept

    def _example(self, at: Position, row: Row) -> Example | Dropped:
        try:
            return self.form(row)
        except DataError as error:
            raise DataError(f"{self.rows.parts[at.part].name}, row {at.row}: {error}") from None

    def _rows_after(self, start: Position) -> Iterator[tuple[Position, Row]]:
        """The rows after a position, without end; from where the last window ended, if that is it."""
        if self._reading is not None and self._reading[0] == start:
            rows, self._reading = self._reading[1], None
            return rows
        return self._rows(start)

    def _rows(self, start: Position) -> Iterator[tuple[Position, Row]]:
        first, skipped = start.part, start.row
        for passes in itertools.count(start.passes):
            whole, some = (first, skipped) == (0, 0), False
            held = self.held_out if whole else 0
            for part in range(first, len(self.rows.parts)):
                for row, content in enumerate(itertools.islice(self.rows.parts[part], skipped, None), skipped + 1):
                    held -= 1
                    if held < 0:
                        some = True
                        yield Position(passes, part, row), content
                skipped = 0
            if whole and not some:
                raise DataError(f"{self.rows.name} has no rows beyond the {self.held_out:,} that are held out")
            first = 0

    def _check(self, number: int, end: Position) -> None:
        """Raises:
        DataError: the stream has fewer samples than a window.
        """
        if number == 0 and end.passes > 0:
            raise DataError(
                f"the data ({self.rows.name}) end before the first window of {self.size:,} samples is full\n"
                "  set data.window to fewer samples, or data.streaming=false: the data may well fit on disk"
            )
