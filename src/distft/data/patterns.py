"""`data.files`: the one key whose values may be patterns, `corpus/part-*.jsonl`. Everywhere else a path is a path."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distft.data.files import READABLE, DataFile, exists, files_at, is_data, path_of, readable
from distft.errors import DataError
from distft.text import shorten


def stem(name: str) -> str:
    """The name of a file or folder without its suffixes."""
    return re.sub(r"(\.\w+)*$", "", Path(name).name)


@dataclass(frozen=True)
class Patterns:
    """The files that patterns match in a folder; absolute patterns are independent of it.

    A pattern has `*`, `?`, `[…]`, and `**` for folders at any depth. One that is the name of something is that file, or
    the data files of that folder.
    """

    folder: Path
    patterns: tuple[str, ...]

    def __str__(self) -> str:
        names = (pattern if self.folder == Path() else str(self.folder / pattern) for pattern in self.patterns)
        return ", ".join(names)

    @property
    def stem(self) -> str:
        """A short name: the last part of the first pattern that is no pattern, `corpus` for `corpus/*.jsonl`."""
        parts = [part for part in path_of(self.patterns[0]).parts if not glob.has_magic(part)]
        return stem(parts[-1] if parts else self.folder.name)

    def files(self) -> list[DataFile]:
        """The data files, each once: in the order of the patterns, those of one pattern by name.

        Raises:
            DataError: a pattern matches none, or one that cannot be read.
        """
        found: dict[Path, None] = {}
        for pattern in self.patterns:
            found |= dict.fromkeys(self._of(pattern))
        return readable(list(found), str(self))

    def left_out(self) -> list[str]:
        """The names of files that match and are not read, because they are no data files."""
        matches = (path for pattern in self.patterns if not self._named(pattern) for path in self._matches(pattern))
        return [str(path) for path in dict.fromkeys(matches) if not is_data(path) and not path.is_dir()]

    def _of(self, pattern: str) -> list[Path]:
        if path := self._named(pattern):
            return [file.path for file in files_at(path)]
        matches = sorted(self._matches(pattern))
        files = [path for path in matches if is_data(path)]
        if files:
            return files
        if others := [str(path) for path in matches if path.is_file()]:
            raise DataError(f"{pattern} matches no {READABLE} file, only {shorten(others, 5)}")
        folder = self._searched(pattern)
        held = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
        raise DataError(f"{pattern} matches no file; {folder.absolute()} holds {shorten(held, 5) or 'nothing'}")

    def _named(self, pattern: str) -> Path | None:
        path = self.folder / path_of(pattern)
        return path if exists(path) else None

    def _matches(self, pattern: str) -> Iterator[Path]:
        found = glob.iglob(str(path_of(pattern)), root_dir=self.folder, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute patterns
        return (self.folder / path for path in found)

    def _searched(self, pattern: str) -> Path:
        """The innermost existing folder above everything that could match."""
        folder = self.folder
        for part in path_of(pattern).parts[:-1]:
            if glob.has_magic(part) or not (folder / part).is_dir():
                break
            folder /= part
        while not folder.is_dir():
            folder = folder.parent
        return folder
