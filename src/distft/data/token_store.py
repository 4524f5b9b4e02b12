"""The tokenized examples of one source on disk: made once, in pieces, by as many processes as there are cores.

A store depends on the rows and on how they are formatted and tokenized, but not on how they are split or mixed. What it
holds does not depend on the number of processes. Pieces that were complete when the work was interrupted are kept.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from distft.data.files import Row
from distft.data.pieces import EXAMPLE, Array, Segment, Worker
from distft.data.sources import Rows
from distft.errors import DataError, WorkerError
from distft.files import build_folder_once, to_json
from distft.paths import cache_folder

_FORM = 4
"""Part of the key of a store: raise it whenever its files change."""
_PIECE = 4 << 20
"""Characters of a piece at most: what a worker gets at once."""
_FIRST, _SHARE = 1 << 19, 8
"""Characters of the first pieces; later ones have this part of what comes before, so that of little data, too, all
processes get about as much."""
TEXTS_KEPT = 256 << 20
"""Up to this many bytes of text, digests of the data are those of the texts; above, those of their hashes."""


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The examples of a source in the order of its rows, and its samples: the examples with a trained token. Two that
    are of the same rows are two."""

    folder: Path
    rows: int
    kept: int
    """Rows that gave an example; `examples` has fewer if only some were drawn."""
    repeats: int
    """Of rows that were drawn from: those that repeat another and were left out."""
    dropped: Counter[str]
    """Rows that gave no example, by the reason."""
    noted: Counter[str]
    examples: Array
    """[examples] of EXAMPLE."""
    marked: dict[str, Array]
    """For each token, the examples that bring it, [n, 2]: their place and 1."""
    trained: dict[str, Array]
    """For each role, [n, 2]: the place of each example in which it is trained, and the number of its trained tokens."""
    difficulties: Array | None = None
    """[examples]: the numbers in the column that data.order names."""

    @property
    def arrow_files(self) -> list[Path]:
        return sorted(self.folder.glob("*.arrow"))

    def texts(self) -> Array | None:
        """What `digest_record` returned for all examples, one after the other, [bytes]; None if that is too much."""
        file = self.folder / "texts"
        if not file.exists():
            return None
        return np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8)

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        with np.load(folder / "of_examples.npz") as found:
            by_name: dict[str, Any] = {
                name: {key: found[f"{name}:{key}"] for key in about[name]} for name in ("marked", "trained")
            }
        examples = np.load(folder / "examples.npy", mmap_mode="r")
        dropped, noted = Counter(about["dropped"]), Counter(about["noted"])
        hard = folder / "difficulties.npy"
        return cls(
            folder,
            about["rows"],
            about["kept"],
            about["repeats"],
            dropped,
            noted,
            examples,
            difficulties=np.load(hard) if hard.exists() else None,
            **by_name,
        )


_Piece = tuple[list[Segment], int]


class Draw(NamedTuple):
    """Which rows of a source are tokenized: `rows` returns their numbers in ascending order, counted from 0, and what
    else the store has to know of all rows. `key` identifies the choice."""

    key: Any
    rows: Callable[[Rows], tuple[Array, dict[str, Any]]]


def store_of(
    rows: Rows, worker: Worker, key: dict[str, Any], processes: int | None, draw: Draw | None = None
) -> TokenStore:
    """The store of `rows`, from the cache or made now. `key` is everything that it depends on besides the rows.

    Raises:
        DataError: the source is empty, cannot be read, or has a row that does not fit the format.
    """
    key = key | {"form": _FORM, "rows": rows.digest(), "draw": None if draw is None else draw.key}
    if worker.difficulty is not None:
        key["difficulty"] = worker.difficulty
    folder = cache_folder() / "tokens" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def build(temporary: Path) -> None:
        drawn, whole = (None, {}) if draw is None else draw.rows(rows)
        pieces = _make_pieces(rows, drawn, replace(worker, folder=temporary), processes)
        _join(temporary, pieces, whole)

    build_folder_once(folder, build, resumes=True)
    return TokenStore.open(folder)


def _make_pieces(rows: Rows, drawn: Array | None, worker: Worker, processes: int | None) -> int:
    """Make all pieces of the rows, or of those with the numbers `drawn`, and return their number."""
    workers, waiting = processes or len(os.sched_getaffinity(0)), deque[Future[dict[str, Any]]]()
    pool: ProcessPoolExecutor | None = None
    pieces = size = 0
    with tqdm(desc="data", unit=" rows", unit_scale=True, dynamic_ncols=True, mininterval=0.5, disable=None) as bar:

        def settle(leave: int) -> None:
            while len(waiting) > leave:
                bar.update(waiting.popleft().result()["rows"])

        try:
            taken = _segments(rows, drawn)
            following = next(taken, None)
            while following is not None:
                (segments, characters), number = following, pieces
                pieces += 1
                size += characters
                following = _next(taken, lambda: settle(0))
                record = worker.folder / f"{number:06}.json"
                if record.exists():  # from before an interruption
                    bar.update(json.loads(record.read_text(encoding="utf-8"))["rows"])
                elif pool is None and (following is None or workers == 1):
                    bar.update(worker(number, segments, size <= TEXTS_KEPT)["rows"])
                else:
                    pool = pool or _pool(workers, worker)
                    waiting.append(pool.submit(_work, number, segments, size <= TEXTS_KEPT))
                    settle(workers + 1)
            settle(0)
        except BrokenProcessPool as error:
            raise WorkerError(
                "a process that prepared the data was killed, most likely for memory; run the same command again, "
                "which goes on from there, or set training.dataset_num_proc to fewer processes"
            ) from error
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)
    if not pieces and drawn is None:
        raise DataError(f"{rows.name} is empty")
    return pieces


def _next(pieces: Iterator[_Piece], before_failing: Callable[[], None]) -> _Piece | None:
    """The next piece. If it cannot be read, what is wrong with the rows before it comes first."""
    try:
        return next(pieces, None)
    except DataError:
        before_failing()
        raise


def _segments(rows: Rows, drawn: Array | None) -> Iterator[_Piece]:
    """The rows in pieces of whole rows, with the characters of each: at least as many as `_room` says, except for the
    last piece."""
    piece: list[Segment] = []
    before = size = 0
    numbers, wanted = itertools.count(), None if drawn is None else set(drawn.tolist())
    for part in rows.parts:
        held: list[Row] = []
        first = 1
        for number, row in enumerate(part, 1):
            if wanted is not None and next(numbers) not in wanted:
                continue
            held.append(row)
            size += _size(row)
            if size >= _room(before):
                yield [*piece, Segment(part.name, first, held)], size
                before += size
                piece, held, first, size = [], [], number + 1, 0
        if held:
            piece.append(Segment(part.name, first, held))
    if piece:
        yield piece, size


def _room(before: int) -> int:
    """Characters of a piece that comes after `before` characters."""
    return min(max(before // _SHARE, _FIRST), _PIECE)


def _size(value: Any) -> int:
    """The characters of a row, roughly."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values())) + 8
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 8


_WORKER: list[Worker] = []
"""In a worker process, what it works with."""


def _pool(workers: int, worker: Worker) -> ProcessPoolExecutor:
    # A fork needs neither a new import of the libraries nor a copy of the tokenizer. It uses no device.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    return ProcessPoolExecutor(workers, context, _begin, (worker, os.getpid()))


def _begin(worker: Worker, parent: int) -> None:
    """Set up a worker process: it ends with its parent, and leaves signals to it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    gc.freeze()  # a collection would write to, and so copy, every object that the processes share
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
    _WORKER.append(worker)


def end_with_parent() -> None:
    """Have the kernel end this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _work(number: int, segments: list[Segment], keeps_texts: bool) -> dict[str, Any]:
    return _WORKER[0](number, segments, keeps_texts)


def _join(folder: Path, pieces: int, whole: dict[str, Any]) -> None:
    """Collect what the records of the pieces say in one file each; `whole` replaces what they say of the rows."""
    paths = [folder / f"{number:06}" for number in range(pieces)]
    records = [json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) for path in paths]
    counts = {name: dict(sum((Counter(r[name]) for r in records), Counter())) for name in ("dropped", "noted")}
    examples: list[Array] = []
    difficulties: list[Array] = []
    of_example: dict[str, Any] = {}
    before = 0
    for path in paths:
        with np.load(path.with_suffix(".npz")) as found:
            examples.append(found["examples"])
            for name in found.files:
                if name == "difficulties":
                    difficulties.append(found[name])
                elif name != "examples":
                    of_example.setdefault(name, []).append(found[name] + [before, 0])
        before += len(examples[-1])
    np.save(folder / "examples.npy", np.concatenate(examples) if examples else np.zeros(0, EXAMPLE))
    if difficulties:
        np.save(folder / "difficulties.npy", np.concatenate(difficulties))
    of_example = {name: np.concatenate(parts) for name, parts in of_example.items()}
    np.savez(folder / "of_examples.npz", **of_example)
    if all(path.with_suffix(".texts").exists() for path in paths):
        with (folder / "texts").open("wb") as joined:
            for path in paths:
                with path.with_suffix(".texts").open("rb") as part:
                    shutil.copyfileobj(part, joined)
    for path, record in zip(paths, records, strict=True):
        for suffix in (".json", ".npz", ".texts", *([] if record["samples"] else [".arrow"])):
            path.with_suffix(suffix).unlink(missing_ok=True)
    about = {"rows": sum(record["rows"] for record in records), "kept": before, "repeats": 0, **counts} | whole
    about |= {
        name: [key.partition(":")[2] for key in of_example if key.startswith(name)] for name in ("marked", "trained")
    }
    (folder / "about.json").write_text(to_json(about), encoding="utf-8")
