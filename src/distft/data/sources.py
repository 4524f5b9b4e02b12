"""Where the rows come from: data sets known by name, local files and folders, and the Hugging Face Hub."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import xxhash

from distft import upstream_api
from distft.config.schema import Data, DataSource, Format
from distft.connection import cache_if_unreachable
from distft.data.files import DataFile, Row, exists, files_at, left_out, path_of, suffix_of
from distft.data.patterns import Patterns, stem
from distft.data.remote import Remote, is_remote
from distft.data.toy import tiny_preferences, tiny_ratings, tiny_sentiment
from distft.errors import DataError
from distft.paths import packaged
from distft.text import first_line, shorten


@dataclass(frozen=True)
class KnownDataset:
    """A data set that `data.name` may name without a `data.format`. Exactly one of `hub`, `file` and `build` is set."""

    format: Format
    hub: str | None = None
    """Hub id."""
    file: str | None = None
    """Path of a file that ships with the package."""
    build: Callable[[], Path] | None = None
    """Function that creates the file if necessary and returns its path."""
    test_split: str | None = None
    """The official held-out split, if there is one."""


_INSTRUCTIONS = Format(instruction="instruction", context="context", response="response")
_ANSWERS = Format(instruction="instruction", response="response")
_PAIRS = Format(prompt="prompt", chosen="chosen", rejected="rejected")
_RATINGS = Format(prompt="prompt", completion="completion", label="label")
_REVIEWS = Format(review="text", label="label")
KNOWN_DATASETS = {
    "tiny": KnownDataset(_INSTRUCTIONS, file="assets/tiny_instructions.jsonl"),
    "tiny_sentiment": KnownDataset(_REVIEWS, build=tiny_sentiment),
    "tiny_preferences": KnownDataset(_PAIRS, build=tiny_preferences),
    "tiny_ratings": KnownDataset(_RATINGS, build=tiny_ratings),
    "tiny_languages": KnownDataset(_ANSWERS, file="assets/tiny_languages.jsonl"),
    "tiny_languages_test": KnownDataset(_ANSWERS, file="assets/tiny_languages_test.jsonl"),
    "tiny_summaries": KnownDataset(_ANSWERS, file="assets/tiny_summaries.jsonl"),
    "tiny_summaries_test": KnownDataset(_ANSWERS, file="assets/tiny_summaries_test.jsonl"),
    "dolly": KnownDataset(_INSTRUCTIONS, hub="databricks/databricks-dolly-15k"),
    "imdb": KnownDataset(_REVIEWS, hub="stanfordnlp/imdb", test_split="test"),
}


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class HubSplit(NamedTuple):
    """One split of a data set on the hub."""

    name: str
    config: str | None
    split: str


Source = Path | Patterns | Remote | HubSplit


def remotes_of(source: Source) -> list[Remote]:
    """What of a source is at addresses."""
    return [source] if isinstance(source, Remote) else source.addresses() if isinstance(source, Patterns) else []


def on_network(source: Source) -> bool:
    """Whether reading the source may take a connection."""
    return isinstance(source, HubSplit) or bool(remotes_of(source))


class Part(Protocol):
    """Rows that are read one after the other: those of a file, or of a split on the hub."""

    @property
    def name(self) -> str: ...
    def __iter__(self) -> Iterator[Row]: ...
    def columns(self, wanted: Collection[str]) -> list[str]: ...
    def digest(self) -> str: ...


@dataclass(frozen=True)
class HubRows:
    """The rows of a split that `datasets` has downloaded."""

    name: str
    dataset: Any

    def __iter__(self) -> Iterator[Row]:
        return iter(self.dataset)

    def columns(self, wanted: Collection[str]) -> list[str]:
        return list(self.dataset.column_names)

    def digest(self) -> str:
        """The fingerprint, which depends on the commit that was downloaded."""
        return upstream_api.dataset_fingerprint(self.dataset)


@dataclass(frozen=True)
class Rows:
    """The rows of a source, in order; they are read anew by each iteration."""

    name: str
    parts: Sequence[Part]

    def __iter__(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(self.parts)

    def digest(self) -> str:
        """A hash of the content, independent of names, places and times."""
        return xxhash.xxh3_128(" ".join(part.digest() for part in self.parts).encode()).hexdigest()

    @property
    def files(self) -> list[Path]:
        """The files that hold the rows."""
        found: list[Path] = []
        for part in self.parts:
            if isinstance(part, DataFile):
                found.append(part.path)
            elif isinstance(part, HubRows):
                found += [Path(file["filename"]) for file in part.dataset.cache_files]
        return found


def parts_of(data: Data) -> dict[str, Data]:
    """The data of each source of a mixture by its label; those without sources are the only part, without a label."""
    if data.sources is None:
        return {"": data}
    fields = ("name", "path", "files", "config", "train_split", "test_split", "test_path", "format")
    return {
        label_of(source): data.model_copy(
            update={field: getattr(source, field) for field in fields} | {"sources": None}
        )
        for source in data.sources
    }


def label_of(source: DataSource) -> str:
    """What the reports call a source of a mixture."""
    name = stem(source.name) or source.name
    if not name and source.files is not None:
        name = Patterns(source.path or "", _patterns(source.files)).stem
    return source.label or re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "data"


def _patterns(files: str | list[str] | None) -> tuple[str, ...]:
    return () if files is None else (files,) if isinstance(files, str) else tuple(files)


def file_source(data: Data) -> Path | Patterns | Remote | None:
    """The file, folder or files that `data` names, here or at an address, whether or not they exist; None if the rows
    are those of a data set on the hub.

    Whatever exists is local, and so is what looks like a path. Only the known data sets keep their names.
    """
    by_name = data.path is None and (data.files is None or data.name not in ("", *KNOWN_DATASETS))
    place = _by_name(data) if by_name else _place(data.path or "")
    if data.files is None or place is None:
        return place
    folder = place.address if isinstance(place, Remote) else "" if place == Path() else str(place)
    return Patterns(folder, _patterns(data.files))


def _place(text: str) -> Path | Remote:
    return Remote(text) if is_remote(text) else path_of(text)


def _by_name(data: Data) -> Path | Remote | None:
    if is_remote(data.name):
        return Remote(data.name)
    known = KNOWN_DATASETS.get(data.name)
    if known is not None:
        return packaged(known.file) if known.file is not None else known.build() if known.build is not None else None
    path = path_of(data.name)
    return path if data.name.startswith((".", "/", "~")) or suffix_of(path) or exists(path) else None


def data_sources(data: Data) -> list[Source]:
    """The source to split into train, validation and test, followed by the held-out source if it is a separate one;
    of a mixture, those of all its sources.

    Raises:
        DataError: `data.name` is not a known data set, a path or a hub id.
    """
    if data.sources is not None:
        return [source for part in parts_of(data).values() for source in data_sources(part)]
    known, file = KNOWN_DATASETS.get(data.name), file_source(data)
    test = [_place(data.test_path)] if data.test_path else []
    if file is not None:
        return [file, *test]
    hub = known.hub if known else data.name
    if hub is None or (known is None and not _HUB_ID.fullmatch(data.name)):
        raise DataError(
            f"data.name={data.name} is not a known data set ({', '.join(KNOWN_DATASETS)}), a file or a hub id; "
            "set data.path to a file or folder"
        )
    test_split = data.test_split or (known.test_split if known else None)
    official = [HubSplit(hub, data.config, test_split)] if test_split and not test else []
    return [HubSplit(hub, data.config, data.train_split), *test, *official]


def source_notes(data: Data) -> list[str]:
    """What to tell the user about the sources: which meaning of an ambiguous name was taken, and which files of a
    folder are not read."""
    if data.sources is not None:
        return [line for part in parts_of(data).values() for line in source_notes(part)]
    lines = []
    path = path_of(data.name)
    if not data.path and exists(path):
        if data.name in KNOWN_DATASETS:
            lines.append(
                f"data.name={data.name} is distft's data set of that name; to read the local one, set data.path"
            )
        elif _HUB_ID.fullmatch(data.name) and not data.name.startswith(".") and suffix_of(path) is None:
            lines.append(f"data.name={data.name} is the local folder of that name, not the data set on the hub")
    for source in data_sources(data):
        if isinstance(source, Patterns) and (others := source.left_out()):
            lines.append(f"not read: {shorten(others, 5)}")
        elif isinstance(source, Path) and source.is_dir() and (others := left_out(source)):
            lines.append(f"not read in {source}: {shorten(others, 5)}")
    return lines


def read_data(data: Data) -> list[Rows]:
    """Open the sources of `data_sources`; with data.streaming, files to train on at addresses are not fetched yet."""
    return [read_source(source, data.streaming and not at) for at, source in enumerate(data_sources(data))]


def read_source(source: Source, streamed: bool = False) -> Rows:
    """Open a source. `datasets` downloads and caches what is on the hub; local files are read when iterated over, and
    if they are `streamed`, files at addresses are fetched then.

    Raises:
        DataError: the source is missing, unreadable or empty.
    """
    if streamed and isinstance(source, Patterns | Remote):
        return Rows(str(source), source.parts())
    if isinstance(source, Path):
        return Rows(str(source), files_at(source))
    if isinstance(source, Patterns | Remote):
        return Rows(str(source), source.files())
    from datasets import load_dataset

    name = f"{source.name}, {source.split} split"
    if exists(Path(source.name)):
        raise DataError(
            f"a local folder named {source.name} hides the data set on the hub; rename it, or set data.path to read it"
        )
    try:
        with cache_if_unreachable():
            return Rows(name, [HubRows(name, load_dataset(source.name, source.config, split=source.split))])
    except Exception as error:  # datasets and the hub client raise many types here; all mean "unavailable"
        reason = first_line(error)
        known = any(source.name == each.hub for each in KNOWN_DATASETS.values())
        raise DataError(
            ("" if known else f"there is no file or folder {source.name} here, and as a data set of the hub, ")
            + f"{source.name} ({source.split} split) is not in the cache and could not be downloaded: {reason}\n"
            "  run distft fetch with the same arguments on a machine with network access, "
            "or use a local copy: data.path=FILE.jsonl"
        ) from error
