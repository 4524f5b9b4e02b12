"""Where the rows come from: data sets known by name, local files and folders, and the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distft.config.schema import Data, Format
from distft.data.toy import tiny_sentiment
from distft.errors import DataError
from distft.paths import packaged

if TYPE_CHECKING:
    from datasets import Dataset

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
"""File suffix to the name of the `datasets` builder that reads it."""


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
_REVIEWS = Format(review="text", label="label")
KNOWN_DATASETS = {
    "tiny": KnownDataset(_INSTRUCTIONS, file="assets/tiny_instructions.jsonl"),
    "tiny_sentiment": KnownDataset(_REVIEWS, build=tiny_sentiment),
    "dolly": KnownDataset(_INSTRUCTIONS, hub="databricks/databricks-dolly-15k"),
    "imdb": KnownDataset(_REVIEWS, hub="stanfordnlp/imdb", test_split="test"),
}


class HubSplit(NamedTuple):
    """One split of a data set on the hub."""

    name: str
    config: str | None
    split: str


def local_source(data: Data) -> Path | None:
    """The local file or folder that `data` names, whether or not it exists; None if the rows come from the hub."""
    if data.path:
        return Path(data.path).expanduser()
    known = KNOWN_DATASETS.get(data.name)
    if known is not None and known.file is not None:
        return packaged(known.file)
    if known is not None and known.build is not None:
        return known.build()
    is_path = data.name.startswith((".", "/", "~")) or Path(data.name).suffix in _READERS
    return Path(data.name).expanduser() if is_path else None


def data_sources(data: Data) -> list[Path | HubSplit]:
    """The source to split into train, validation and test, followed by the held-out source if it is a separate one.

    Raises:
        DataError: `data.name` is not a known data set, a path or a hub id.
    """
    known, file = KNOWN_DATASETS.get(data.name), local_source(data)
    test = [Path(data.test_path).expanduser()] if data.test_path else []
    if file is not None:
        return [file, *test]
    hub = known.hub if known else data.name
    if hub is None or (known is None and "/" not in data.name):
        raise DataError(
            f"data.name={data.name} is not a known data set ({', '.join(KNOWN_DATASETS)}), a file or a hub id; "
            "set data.path to a file or folder"
        )
    test_split = data.test_split or (known.test_split if known else None)
    official = [HubSplit(hub, data.config, test_split)] if test_split and not test else []
    return [HubSplit(hub, data.config, data.train_split), *test, *official]


def require_files(data: Data) -> None:
    """Check that the local files exist, before anything slow is done for them, such as loading a tokenizer.

    Raises:
        DataError: a file or folder is missing.
    """
    for source in data_sources(data):
        if isinstance(source, Path):
            _require(source)


def read_source(source: Path | HubSplit) -> Dataset:
    """Read the rows of a source. `datasets` caches them.

    Raises:
        DataError: the source is missing, unreadable or empty.
    """
    from datasets import load_dataset

    if isinstance(source, Path):
        return _read_local(source)
    try:
        return load_dataset(source.name, source.config, split=source.split)
    except Exception as error:  # datasets and the hub client raise many types here; all mean "unavailable"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{source.name} ({source.split} split) is not in the cache and could not be downloaded: {reason}\n"
            "  run distft fetch with the same arguments on a machine with network access, "
            "or use a local copy: data.path=FILE.jsonl"
        ) from error


def _require(path: Path) -> None:
    if not path.exists():
        raise DataError(f"there is no data file or folder {path}")


def _read_local(path: Path) -> Dataset:
    from datasets import load_dataset, load_from_disk

    _require(path)
    if path.is_dir() and (path / "state.json").exists():
        return load_from_disk(str(path))
    files = _files_in(path) if path.is_dir() else [path]
    reader = _READERS.get(files[0].suffix)
    if reader is None:
        raise DataError(f"{path} is not a {', '.join(_READERS)} file")
    if not any(file.stat().st_size for file in files):
        raise DataError(f"{path} is empty")
    # "None" and "NA" are legitimate responses, not missing values.
    options: dict[str, Any] = {"keep_default_na": False} if reader == "csv" else {}
    try:
        rows: Dataset = load_dataset(reader, data_files=[str(file) for file in files], split="train", **options)
    except Exception as error:  # the readers raise many types; the innermost error says what is wrong
        inner: BaseException = error
        while inner.__cause__ is not None:
            inner = inner.__cause__
        if "corresponds to no data" in str(inner):
            raise DataError(f"{path} is empty") from error
        raise DataError(f"{path} cannot be read as {reader}: {str(inner).strip().splitlines()[0]}") from error
    if len(rows) == 0:
        raise DataError(f"{path} is empty")
    return rows


def _files_in(folder: Path) -> list[Path]:
    """The data files in `folder`, sorted by name; all must have the same suffix."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _READERS)
    if not files:
        raise DataError(f"{folder} contains no {', '.join(_READERS)} files")
    suffixes = sorted({file.suffix for file in files})
    if len(suffixes) > 1:
        raise DataError(f"{folder} mixes file formats ({', '.join(suffixes)}); name a single file")
    return files
