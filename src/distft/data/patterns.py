"""`data.files`: the one key whose values may be patterns, `corpus/part-*.jsonl`. Everywhere else a path is a path."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distft.data.files import READABLE, DataFile, exists, files_at, is_data, path_of, readable
from distft.data.remote import Remote, RemoteFile, is_remote
from distft.errors import DataError
from distft.text import redacted, shorten


def stem(name: str) -> str:
    """The name of a file or folder without its suffixes."""
    return re.sub(r"(\.\w+)*$", "", Path(name).name)


@dataclass(frozen=True)
class Patterns:
    """The files that patterns match in a folder; absolute patterns are independent of it.

    A pattern has `*`, `?`, `[…]`, and `**` for folders at any depth. One that is the name of something is that file, or
    the data files of that folder.
    """

    folder: str
    """Path or address; "" for the working folder."""
    patterns: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(redacted(self._joined(pattern)) for pattern in self.patterns)

    @property
    def stem(self) -> str:
        """A short name: the last part of the first pattern that is no pattern, `corpus` for `corpus/*.jsonl`."""
        parts = [part for part in path_of(self.patterns[0]).parts if not glob.has_magic(part)]
        return stem(parts[-1] if parts else Path(self.folder).name)

    def files(self) -> list[DataFile]:
        """The data files, each once: in the order of the patterns, those of one pattern by name.

        Raises:
            DataError: a pattern matches none, or one that cannot be read.
        """
        found: dict[Path, None] = {}
        for pattern in self.patterns:
            found |= dict.fromkeys(self._of(pattern))
        return readable(list(found), str(self))

    def parts(self) -> list[DataFile | RemoteFile]:
        """The files as `files` returns them, except that those at addresses are fetched when they are read."""
        found: list[DataFile | RemoteFile] = []
        for pattern in self.patterns:
            remote = self._at(pattern)
            found += remote.parts() if remote else readable(self._of(pattern), pattern)
        return list(dict.fromkeys(found))

    def addresses(self) -> list[Remote]:
        """The patterns that are searched at addresses."""
        return [remote for pattern in self.patterns if (remote := self._at(pattern))]

    def left_out(self) -> list[str]:
        """The names of files that match and are not read, because they are no data files."""
        local = (pattern for pattern in self.patterns if not self._at(pattern) and not self._named(pattern))
        matches = (path for pattern in local for path in self._matches(pattern))
        return [str(path) for path in dict.fromkeys(matches) if not is_data(path) and not path.is_dir()]

    def _joined(self, pattern: str) -> str:
        return pattern if is_remote(pattern) or not self.folder else f"{self.folder.rstrip('/')}/{pattern}"

    def _at(self, pattern: str) -> Remote | None:
        address = self._joined(pattern)
        return Remote(address, is_pattern=True) if is_remote(address) else None

    def _of(self, pattern: str) -> list[Path]:
        if remote := self._at(pattern):
            return [file.path for file in remote.files()]
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

    @property
    def _local(self) -> Path:
        return path_of(self.folder)

    def _named(self, pattern: str) -> Path | None:
        path = self._local / path_of(pattern)
        return path if exists(path) else None

    def _matches(self, pattern: str) -> Iterator[Path]:
        # Path.glob takes no absolute patterns.
        found = glob.iglob(str(path_of(pattern)), root_dir=self._local, recursive=True)  # noqa: PTH207
        return (self._local / path for path in found)

    def _searched(self, pattern: str) -> Path:
        """The innermost existing folder above everything that could match."""
        folder = self._local
        for part in path_of(pattern).parts[:-1]:
            if glob.has_magic(part) or not (folder / part).is_dir():
                break
            folder /= part
        while not folder.is_dir():
            folder = folder.parent
        return folder
