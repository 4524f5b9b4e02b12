"""Local data files: which ones can be read, their rows exactly as they are written, and a digest of their bytes.

Nothing is inferred: every cell of a CSV file is text, and the values of JSON keep their own types. Rows are read
lazily, so that a file of any size takes little memory (except for a `.json` file that holds a single list).
"""

from __future__ import annotations

import codecs
import csv
import errno
import gzip
import io
import itertools
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

from distft.errors import DataError
from distft.text import count, first_line

Row = dict[str, Any]

_COMPRESSED = (".gz", ".zst")
_TEXT_FILES = (".jsonl", ".json", ".csv", ".tsv")
_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow"}
READABLE = ", ".join(_KINDS)
"""For messages."""
_BATCH = 1_000
"""Rows of a Parquet or Arrow file that are in memory at once."""
_HEAD = 100_000
"""Rows of a JSON file in which a column has to appear."""
_UNDECIDED = 1 << 24
"""A `.json` file above this many bytes is not read for a quick look if only the whole of it can be parsed."""


def suffix_of(path: Path) -> str | None:
    """The suffix that says how `path` is read, in lower case and without `.gz` or `.zst`; None if it is not a data
    file."""
    name = Path(path.name.lower())
    compressed = name.suffix in _COMPRESSED
    suffix = name.with_suffix("").suffix if compressed else name.suffix
    return suffix if suffix in (_TEXT_FILES if compressed else _KINDS) else None


def path_of(text: str) -> Path:
    """The path that a user means by `text`; `~` is the home folder where there is one."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def exists(path: Path) -> bool:
    """Whether `path` is something on disk, without an error for what cannot be a path."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class DataFile:
    """The rows of one file."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def __iter__(self) -> Iterator[Row]:
        """Raises:
        DataError: the file cannot be read; the message names it and, where possible, the line.
        """
        with _reading(self.path) as kind:
            yield from _READERS[kind](self.path)

    def columns(self, wanted: Collection[str]) -> list[str]:
        """The names of the columns. Those of a JSON file are collected from its first rows, until all the `wanted` are
        among them.

        Raises:
            DataError: the file cannot be read.
        """
        with _reading(self.path) as kind:
            if kind in ("csv", "tsv"):
                with _open_text(self.path) as stream:
                    return _header(_csv_reader(self.path, stream), self.path)
            if kind == "parquet":
                return list(_parquet(self.path).schema_arrow.names)
            if kind == "arrow":
                return _arrow(self.path)[0]
            found: dict[str, None] = {}
            for row in itertools.islice(_json_rows(self.path), _HEAD):
                found |= dict.fromkeys(row)
                if found.keys() >= set(wanted):
                    break
            return list(found)

    def has_quick_head(self) -> bool:
        """Whether the first rows can be read without reading the whole file, or the file is small."""
        return suffix_of(self.path) != ".json" or self.path.stat().st_size < _UNDECIDED

    def digest(self) -> str:
        """A hash of the bytes of the file (128 bits, hex), at the speed of the disk."""
        try:
            found = xxhash.xxh3_128()
            with self.path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    found.update(block)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from error
        return found.hexdigest()


def files_at(path: Path) -> list[DataFile]:
    """The data files at `path`: itself, or those in the folder, sorted by name.

    Raises:
        DataError: there is none, it cannot be read or is empty, or the folder mixes formats.
    """
    try:
        mode = path.stat().st_mode
        found = _files_in(path) if stat.S_ISDIR(mode) else [path]
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EIO):
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        raise DataError(f"there is no data file or folder {path}") from error
    if found == [path] and suffix_of(path) is None:
        raise DataError(f"{path} is not a {READABLE} file (text files may be compressed: .jsonl.gz, .jsonl.zst)")
    return readable(found, str(path))


def readable(files: Sequence[Path], name: str) -> list[DataFile]:
    """The data files at paths that exist; together they are called `name`.

    Raises:
        DataError: one cannot be read, or all are empty.
    """
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is neither a file nor a folder")
        if not os.access(file, os.R_OK):
            raise DataError(f"{file} cannot be read: {os.strerror(errno.EACCES)}")
    if not any(file.stat().st_size for file in files):
        raise DataError(f"{name} is empty")
    return [DataFile(file) for file in files]


def left_out(folder: Path) -> list[str]:
    """The names in `folder` that are not read: folders, files with other suffixes, hidden data files."""
    if (folder / "state.json").exists():
        return []
    names = (f"{path.name}/" if path.is_dir() else path.name for path in sorted(folder.iterdir()) if not is_data(path))
    return [name for name in names if not name.startswith(".") or suffix_of(Path(name))]


def is_data(path: Path) -> bool:
    """Whether `path` is read where it is found in a folder, by its name."""
    return suffix_of(path) is not None and not path.name.startswith(".") and not path.is_dir()


def _files_in(folder: Path) -> list[Path]:
    saved = folder / "state.json"  # written by Dataset.save_to_disk
    if saved.exists():
        try:
            return [folder / file["filename"] for file in json.loads(saved.read_text(encoding="utf-8"))["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{saved} is not what Dataset.save_to_disk writes") from error
    if (folder / "dataset_dict.json").exists():
        raise DataError(f"{folder} holds several splits ({', '.join(left_out(folder))}); name the folder of one")
    files = sorted(path for path in folder.iterdir() if is_data(path))
    if not files:
        others = ", ".join(left_out(folder)[:5])
        raise DataError(f"{folder} contains no {READABLE} files" + (f"; it contains {others}" if others else ""))
    require_one_suffix(files, str(folder))
    return files


def require_one_suffix(files: Iterable[Path], folder: str) -> None:
    """Raises:
    DataError: the data files of a folder have several formats.
    """
    suffixes = sorted({suffix_of(file) or "" for file in files})
    if len(suffixes) > 1:
        raise DataError(f"{folder} mixes file formats ({', '.join(suffixes)}); name a single file")


@contextmanager
def _reading(path: Path) -> Iterator[str]:
    """Give the block the kind of file that `path` is, and turn the many errors of the readers into DataError."""
    import pyarrow as pa

    kind = _KINDS[suffix_of(path) or ""]
    try:
        yield kind
    except UnicodeDecodeError as error:
        before = error.object[max(0, error.start - 20) : error.start].decode("utf-8", "replace")
        marked = error.start == 0 and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        raise DataError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} after {before!r}\n"
            f"  convert it{'' if marked else ', for example'}: iconv -f {'UTF-16' if marked else 'LATIN1'} -t UTF-8"
        ) from error
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error, pa.ArrowException) as error:
        reason = first_line(error)
        raise DataError(f"{path} cannot be read as {kind}: {reason}") from error


def _open_text(path: Path, newline: str = "") -> IO[str]:
    """Lines end with `newline`, or as in any system; a byte order mark is skipped."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        content: Any = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
        return io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline)
    opener = gzip.open if suffix == ".gz" else open
    stream: IO[str] = opener(path, "rt", encoding="utf-8-sig", newline=newline)
    return stream


def _json_rows(path: Path) -> Iterator[Row]:
    """JSON Lines; or, in a `.json` file, a list of objects (or of texts, as the column `text`), or one object."""
    with _open_text(path, "\n") as stream:
        lines = ((number, line) for number, line in enumerate(stream, 1) if not line.isspace())
        number, line = next(lines, (0, ""))
        if suffix_of(path) == ".json" and not _is_object(line):
            content = _parsed(line + stream.read(), number) if line else []
            rows = content if isinstance(content, list) else [content]
            for position, row in enumerate(rows, 1):
                yield _row({"text": row} if isinstance(row, str) else row, f"element {position}")
        elif line:
            for at, text in itertools.chain([(number, line)], lines):
                yield _row(_parsed(text.rstrip(), at, whole=False), f"line {at}")


def _is_object(text: str) -> bool:
    try:
        return text.lstrip().startswith("{") and isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _parsed(text: str, line: int, *, whole: bool = True) -> Any:
    """`text`, which starts in this line, as JSON: the `whole` of what follows, or this line alone."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        ends = not whole and (error.pos >= len(text) or error.msg.startswith("Unterminated"))
        hint = "; the line ends too early, and each must be a whole object" if ends else ""
        raise ValueError(f"JSON parse error in {where}: {error.msg}{hint}") from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f'{where} is not an object like {{"column": "text"}}')
    return value


def _csv_rows(path: Path) -> Iterator[Row]:
    """Cells exactly as written. Raises an error at quotes and at numbers of cells that do not fit, with their line."""
    with _open_text(path) as stream:
        reader = _csv_reader(path, stream)
        header = _header(reader, path)
        try:
            for cells in reader:
                if header and cells:  # the reader gives no cells for an empty line
                    if len(cells) != len(header):
                        raise ValueError(f"it has {count(len(cells), 'cell')}, and the header has {len(header)}")
                    yield dict(zip(header, cells, strict=True))
        except (csv.Error, ValueError) as error:
            if isinstance(error, UnicodeDecodeError):
                raise
            raise ValueError(f"line {reader.line_num}: {error}") from None


def _csv_reader(path: Path, stream: IO[str]) -> Any:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 KiB
    return csv.reader(stream, delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True)


def _header(reader: Iterable[list[str]], path: Path) -> list[str]:
    header = next((cells for cells in reader if cells), [])
    twice = [name for name, times in Counter(header).items() if name and times > 1]
    if twice:
        raise DataError(f"{path} has more than one column named {', '.join(twice)}")
    return header


def _parquet_rows(path: Path) -> Iterator[Row]:
    for batch in _parquet(path).iter_batches(_BATCH):
        yield from batch.to_pylist()


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet

    return pa.parquet.ParquetFile(pa.OSFile(str(path)), buffer_size=1 << 20)


def _arrow_rows(path: Path) -> Iterator[Row]:
    for batch in _arrow(path)[1]:
        for start in range(0, len(batch), _BATCH):
            yield from batch.slice(start, _BATCH).to_pylist()


def _arrow(path: Path) -> tuple[list[str], Iterable[Any]]:
    """The names of the columns, and the batches, of an Arrow stream (as `datasets` writes it) or file."""
    import pyarrow as pa

    content = pa.memory_map(str(path))
    try:
        stream = pa.ipc.open_stream(content)
        return stream.schema.names, stream
    except pa.ArrowInvalid:
        content.seek(0)
        file = pa.ipc.open_file(content)
        return file.schema.names, (file.get_batch(number) for number in range(file.num_record_batches))


_READERS = {"json": _json_rows, "csv": _csv_rows, "tsv": _csv_rows, "parquet": _parquet_rows, "arrow": _arrow_rows}
