"""Data at addresses that fsspec reads (https://, s3://, gs://, hf://, …): fetched once into distft's cache.

A copy belongs to its address and to what the server says of the content (ETag, time of change, size). If the server
cannot be asked, the last copy is used, so that a node without a connection reads what `distft fetch` has fetched.
Whatever follows user:password@ or `?` in an address may be a secret, and is never shown or recorded.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from distft.console import say
from distft.data.file_systems import ARROW_READS, file_system
from distft.data.files import READABLE, DataFile, is_data, readable, require_one_suffix, suffix_of
from distft.errors import DataError
from distft.files import build_folder_once, write_atomically
from distft.paths import cache_folder
from distft.text import first_line, redacted, shorten

_VERSION = 1
"""Part of the names in the cache: raise it whenever what is there changes."""
_CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS; for a public bucket "
    "FSSPEC_GS_TOKEN=anon",
    "https": "a signed address may have expired",
}
_CREDENTIALS |= {"s3a": _CREDENTIALS["s3"], "gcs": _CREDENTIALS["gs"], "http": _CREDENTIALS["https"]}
_CONTENT = re.compile(
    "etag|.*modified|modify|mtime|updated|generation|md5.*|content-md5|digest|checksum|blob_id|sha|created", re.I
)
"""What file systems call that which changes with the content of a file; the size alone does not say it."""
_ATTEMPTS = 3
"""How often to begin the download of a file whose connection breaks."""


def is_remote(text: str) -> bool:
    """Whether `text` is an address: `protocol://…`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


@dataclass(frozen=True)
class Remote:
    """A file or a folder at an address; or, with `is_pattern`, the files that the address matches."""

    address: str
    is_pattern: bool = False

    def __str__(self) -> str:
        return redacted(self.address)

    @property
    def protocol(self) -> str:
        return self.address.partition("://")[0].lower()

    def missing_package(self) -> tuple[str, str] | None:
        """Why nothing can be read over this protocol, and what to do. Imports its package, and asks no server."""
        import fsspec

        try:
            fsspec.get_filesystem_class(self.protocol)
        except ValueError:
            return (
                f"{self}: {self.protocol}:// is no protocol that fsspec knows",
                "use https://, s3://, gs:// or a path",
            )
        except ImportError as error:
            if self.protocol not in ARROW_READS:
                return f"{self}: reading {self.protocol}:// needs a package that is not installed", first_line(error)
        return None

    def files(self) -> list[DataFile]:
        """Copies of the data files in the cache, in the order of their names.

        The first process to arrive fetches a file, the others on this node wait for it.

        Raises:
            DataError: there is none, or it cannot be fetched.
        """
        if problem := self.missing_package():
            raise DataError("\n  ".join(problem))
        record = self._folder / f"{_key(str(self), self.is_pattern)}.json"
        try:
            found = list(self._fetched())
        except _Unavailable as error:
            files = _copies(record)
            if files is None:
                raise
            day = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.stat().st_mtime))
            _tell(f"{first_line(error)}; its copy of {day} is used")
            return [DataFile(file) for file in files]
        write_atomically(record, json.dumps([str(path.relative_to(self._folder)) for path in found]))
        return readable(found, str(self))

    def parts(self) -> list[RemoteFile]:
        """The data files, each of which is fetched when it is read.

        Raises:
            DataError: there is none, or the server cannot be asked.
        """
        if problem := self.missing_package():
            raise DataError("\n  ".join(problem))
        system, path = file_system(self.address)
        return [
            RemoteFile(self, redacted(system.unstrip_protocol(name)), name, self._told(system, name, about))
            for name, about in self._listed(system, path)
        ]

    def copies(self) -> list[Path] | None:
        """The files of the last time that they were fetched; None if one is not in the cache. Asks no server."""
        return _copies(self._folder / f"{_key(str(self), self.is_pattern)}.json")

    @property
    def _folder(self) -> Path:
        return cache_folder() / "remote"

    def _fetched(self) -> Iterator[Path]:
        """Fetch each file that the cache lacks, and give its copy."""
        system, path = file_system(self.address)
        for name, about in self._listed(system, path):
            yield self.copy_of(system, name, about)

    def _listed(self, system: Any, path: str) -> list[tuple[str, Mapping[str, Any]]]:
        """The data files by name, each with what the server says of it."""
        with _asking(self):
            if self.is_pattern and glob.has_magic(path):
                found = self._matching(system, path)
            else:
                about = system.info(path) if suffix_of(_path(path)) else None  # a folder of objects is no object
                if about is not None and about["type"] != "directory":
                    return [(path, about)]
                found = system.ls(path, detail=True)
        files = {each["name"]: each for each in found if each["type"] == "file"}
        names = [name for name in sorted(files) if is_data(_path(name))]
        if not names:
            held = shorten([_path(each["name"].rstrip("/")).name for each in found], 5) or "nothing"
            raise DataError(f"{self} {'matches' if self.is_pattern else 'has'} no {READABLE} file; found {held}")
        if not self.is_pattern:
            require_one_suffix([_path(name) for name in names], str(self))
        return [(name, files[name]) for name in names]

    def _matching(self, system: Any, path: str) -> list[Mapping[str, Any]]:
        if self.protocol not in ("http", "https"):
            return list(system.glob(path, detail=True).values())
        # fsspec would get every file to see whether it is a folder.
        folder, _, pattern = path.rpartition("/")
        if glob.has_magic(folder):
            raise DataError(f"{self}: over {self.protocol}, only the last part of an address can be a pattern")
        return [each for each in system.ls(folder + "/", detail=True) if fnmatchcase(_path(each["name"]).name, pattern)]

    def _told(self, system: Any, name: str, about: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the server says of a file, with what changes with its content."""
        if not _content(about):
            with _asking(self):
                about = system.info(name)
        if not _content(about):
            raise DataError(
                f"{redacted(system.unstrip_protocol(name))} cannot be told from a later version: the server gives "
                "neither ETag nor Last-Modified\n  download it, and set data.path to the file"
            )
        return about

    def copy_of(self, system: Any, name: str, about: Mapping[str, Any]) -> Path:
        """The copy of one of the files in the cache, fetched now unless it is there."""
        about = self._told(system, name, about)
        shown = redacted(system.unstrip_protocol(name))
        folder = self._folder / _version_key(shown, about)
        place = _path(name).name

        def build(temporary: Path) -> None:
            _download(system, name, temporary / place, shown, about.get("size"), self)

        build_folder_once(folder, build)
        return folder / place


@dataclass(frozen=True)
class RemoteFile:
    """The rows of a file at an address: it is fetched when they are read, and removed when all have been."""

    source: Remote
    name: str
    place: str
    """Its name in the file system."""
    about: Mapping[str, Any] = field(compare=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        copy = self._fetched()
        yield from DataFile(copy)
        shutil.rmtree(copy.parent, ignore_errors=True)

    def columns(self, wanted: Collection[str]) -> list[str]:
        """The names of its columns, as those of a local file."""
        return DataFile(self._fetched()).columns(wanted)

    def digest(self) -> str:
        """A hash of what the server says of the content."""
        return _version_key(self.name, self.about)

    def _fetched(self) -> Path:
        system, _ = file_system(self.source.address)
        return self.source.copy_of(system, self.place, self.about)


class _Unavailable(DataError):
    """The server could not be asked, or did not answer the question."""


def _copies(record: Path) -> list[Path] | None:
    if not record.exists():
        return None
    files = [record.parent / name for name in json.loads(record.read_text(encoding="utf-8"))]
    return files if all(file.exists() for file in files) else None


def _download(system: Any, name: str, to: Path, shown: str, size: int | None, asked: Remote) -> None:
    from fsspec.callbacks import TqdmCallback

    bar = {"desc": shown, "unit": "B", "unit_scale": True, "dynamic_ncols": True, "mininterval": 0.5, "disable": None}
    with _asking(asked):
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                system.get_file(name, str(to), callback=TqdmCallback(tqdm_kwargs=bar))
                if size is not None and to.stat().st_size != size:
                    raise ConnectionError(f"{to.stat().st_size:,} of {size:,} bytes arrived")
                return
            except (FileNotFoundError, PermissionError):
                raise
            except Exception:  # each file system has its own
                if attempt == _ATTEMPTS:
                    raise


@contextmanager
def _asking(asked: Remote) -> Iterator[None]:
    """Turn the many errors of file systems into DataError for what is not there, and _Unavailable for the others."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        # fsspec calls whatever HTTP fails with a file that is not found, and names the cause.
        inner = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
        status, reason = getattr(inner, "status", None), redacted(first_line(inner))
        if status in (404, 410) or (isinstance(error, FileNotFoundError) and inner is error):
            raise DataError(f"there is nothing at {asked}") from error
        denied = re.search("credential|access.?denied|unauthorized|forbidden", reason, re.IGNORECASE)
        told = denied or status in (401, 403) or isinstance(error, PermissionError)
        hint = _CREDENTIALS.get(asked.protocol) if told else None
        raise _Unavailable(f"{asked} cannot be read: {reason}" + (f"\n  {hint}" if hint else "")) from error


@functools.cache
def _tell(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        say(line)


def _content(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    return sorted((key, str(value)) for key, value in about.items() if _CONTENT.fullmatch(key) and value)


def _version_key(shown: str, about: Mapping[str, Any]) -> str:
    return _key(shown, _content(about), about.get("size"))


def _path(name: str) -> Path:
    """The path in an address or in a name of a file system, without its query."""
    return Path(PurePosixPath(unquote(re.sub(r"[?#].*$", "", name)) if re.match("https?://", name) else name))


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_VERSION, *parts]).encode()).hexdigest()[:16]
