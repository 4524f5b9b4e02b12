"""From rows to tokens: load, split, format, tokenise, mask, truncate.

A prepared sample is {"input_ids": [int], "labels": [int]}: labels are -100 where the loss does not look, and the last
label of a sample that was not truncated is the end-of-sequence token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset, load_from_disk
from datasets.utils.logging import disable_progress_bar

from distft.config.recipe import Recipe
from distft.config.schema import Data, Format
from distft.data.tokenize import IGNORED, Example, format_dolly, format_review, tokenise
from distft.errors import DataError, Fault
from distft.files import build_folder_once
from distft.models.tiny import tiny_sentiment
from distft.paths import cache_folder, packaged

_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
_VERSION = 3  # of the prepared form; part of the cache's key
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class Known:
    """A data set that distft knows by name."""

    format: Format
    hub: str | None = None
    file: str | None = None
    made: Callable[[], Path] | None = None
    test_split: str | None = None


_DOLLY = Format(instruction="instruction", context="context", response="response")
KNOWN = {
    "tiny": Known(_DOLLY, file="assets/tiny_instructions.jsonl"),
    "tiny_sentiment": Known(Format(review="text", label="label"), made=tiny_sentiment),
    "dolly": Known(_DOLLY, hub="databricks/databricks-dolly-15k"),
    "imdb": Known(Format(review="text", label="label"), hub="stanfordnlp/imdb", test_split="test"),
}


def faults(recipe: Recipe) -> list[Fault]:
    """Faults of the data section that are seen without reading any data."""
    data, found = recipe.data, []
    file = _file(data)
    if data.name not in KNOWN and data.format is None and file is not None and not file.exists():
        found.append(Fault(recipe.source.of("data.name"), "data.name", f"there is no file or folder {file}"))
    elif data.name not in KNOWN and data.format is None:
        found.append(Fault(
            recipe.source.of("data.name"), "data.format", f"is required for {data.name!r}, which is none of {', '.join(KNOWN)}",
            "data.format.text=COLUMN, or data.format.prompt=COLUMN data.format.completion=COLUMN",
        ))  # fmt: skip
    form = format_of(data)
    if form is not None:
        try:
            kind = _kind(form)
        except DataError as error:
            return [*found, Fault(recipe.source.of("data.format"), "data.format", str(error))]
        if kind == "text" and recipe.training.get("completion_only_loss"):
            found.append(Fault(recipe.source.of("training.completion_only_loss"), "training.completion_only_loss",
                               "whole texts have no completion", "set data.format.prompt and data.format.completion"))  # fmt: skip
    if data.validation_fraction + data.test_fraction >= 1:
        found.append(
            Fault(recipe.source.of("data"), "data", "validation_fraction and test_fraction leave nothing to train on")
        )
    return found


@dataclass(frozen=True)
class Report:
    """What preparing the data did, in numbers of samples of the named split."""

    rows: dict[str, int]
    dropped_empty: int
    dropped_untrained: dict[str, int]
    truncated: dict[str, int]
    tokens: dict[str, int]
    digest: str
    """Of the texts to train on, in their order: the same whatever the tokenizer, another where a file of the same name holds other rows."""

    def lines(self) -> list[str]:
        sizes = ", ".join(f"{name} {count:,}" for name, count in self.rows.items())
        found = [f"data: {sizes} samples; {self.tokens['train']:,} training tokens"]
        if self.dropped_empty:
            found.append(f"data: {self.dropped_empty:,} rows with an empty response were dropped")
        if sum(self.dropped_untrained.values()):
            found.append(f"data: {sum(self.dropped_untrained.values()):,} samples were dropped: nothing to learn from is left of them "
                         "within training.max_length")  # fmt: skip
        if sum(self.truncated.values()):
            found.append(f"data: {sum(self.truncated.values()):,} samples were truncated to training.max_length")
        return found


@dataclass(frozen=True)
class Splits:
    """Prepared samples; `validation` and `test` are None where the recipe asks for none."""

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    report: Report


def _kind(form: Format) -> str:
    given = {
        name
        for name in ("text", "prompt", "completion", "instruction", "context", "response", "review", "label")
        if getattr(form, name)
    }
    for kind, needed in (("text", {"text"}), ("prompt", {"prompt", "completion"}), ("dolly", {"instruction", "response"}),
                         ("review", {"review", "label"})):  # fmt: skip
        if given - ({"context"} if kind == "dolly" else set()) == needed:
            return kind
    raise DataError("give text, or prompt and completion, or instruction and response (and context), or review and label; "
                    f"got {', '.join(sorted(given)) or 'none'}")  # fmt: skip


def format_of(data: Data) -> Format | None:
    """The columns: the recipe's, over those that are known of the data set where they are of the same kind."""
    if data.name not in KNOWN:
        return data.format
    known = KNOWN[data.name].format
    given = data.format.model_dump(exclude_none=True, exclude_defaults=True) if data.format else {}
    of_known = known.model_dump(exclude_none=True)
    return known.model_copy(update=given) if set(given) <= set(of_known) else data.format


def formatter(recipe: Recipe) -> Callable[[Mapping[str, Any]], Example | None]:
    """A function from a row to its `Example`, or to None where the response is empty."""
    form = format_of(recipe.data)
    assert form is not None
    kind, wanted = _kind(form), recipe.training.get("completion_only_loss")

    def text(row: Mapping[str, Any], column: str | None) -> str:
        value = row.get(column) if column else None
        if value is not None and not isinstance(value, str):
            raise DataError(f"column {column!r} holds {type(value).__name__} values; text was expected")
        return value or ""

    def apply(row: Mapping[str, Any]) -> Example | None:
        if kind == "text":
            whole = text(row, form.text)
            return Example(whole) if whole.strip() else None
        if kind == "prompt":
            prompt, completion = text(row, form.prompt), text(row, form.completion)
            return Example(prompt + completion, 0 if wanted is False else len(prompt)) if completion.strip() else None
        if kind == "dolly":
            response = text(row, form.response)
            if not response.strip():
                return None
            return format_dolly(
                text(row, form.instruction), text(row, form.context), response, completion_only=bool(wanted)
            )
        label = row[form.label or "label"]
        if not isinstance(label, int) or not 0 <= label < len(form.label_words):
            raise DataError(
                f"column {form.label!r} holds {label!r}; expected 0 … {len(form.label_words) - 1} (data.format.label_words)"
            )
        return format_review(text(row, form.review), form.label_words[label], completion_only=wanted is not False)

    return apply


# ---- loading and splitting -------------------------------------------------------------------------------------------


def prepare(recipe: Recipe, tokenizer: Any) -> Splits:
    """The recipe's data, tokenised once and kept in the user's cache.

    The first process that comes does the work; the others wait at a file lock, in no collective that could time out.

    Raises:
        DataError: missing, unreadable, empty, other columns than the format says, or no row left.
    """
    disable_progress_bar()
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "the model's tokenizer has no fast version, and distft needs the places of tokens in the text; set model.tokenizer"
        )
    raw, *held_out = map(read, sources(recipe.data))
    test = held_out[0] if held_out else None
    max_length = recipe.training.get("max_length", 1024)
    key = {
        "version": _VERSION, "data": recipe.data.model_dump(), "sources": [raw._fingerprint, test._fingerprint if test else None],
        "seed": recipe.run.seed, "max_length": max_length, "completion_only": recipe.training.get("completion_only_loss"),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(), "eos": tokenizer.eos_token_id,
    }  # fmt: skip
    folder = cache_folder() / "data" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def build(temporary: Path) -> None:
        splits, report = _prepare(recipe, tokenizer, raw, test, max_length)
        splits.save_to_disk(temporary)
        (temporary / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")

    build_folder_once(folder, build)
    splits = DatasetDict(load_from_disk(str(folder)))
    report = Report(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
    return Splits(splits["train"], splits.get("validation"), splits.get("test"), report)


def _prepare(
    recipe: Recipe, tokenizer: Any, raw: Dataset, official: Dataset | None, max_length: int | None
) -> tuple[DatasetDict, Report]:
    apply = formatter(recipe)
    data = recipe.data
    check_columns(raw, data, data.path or data.name)
    kept = [example for row in raw if (example := apply(row)) is not None]
    empty = len(raw) - len(kept)
    parts = split(kept, data, recipe.run.seed, with_test=official is None)
    if official is not None:
        check_columns(official, data, data.test_path or f"{data.name}, test split")
        parts["test"] = [example for row in official if (example := apply(row)) is not None]
        empty += len(official) - len(parts["test"])
    if not parts["train"]:
        raise DataError(
            f"no row is left to train on: {empty} of {len(raw)} rows are empty, the rest went to the other splits"
        )
    counts: dict[str, dict[str, int]] = {"rows": {}, "dropped_untrained": {}, "truncated": {}, "tokens": {}}
    splits: dict[str, Dataset] = {}
    for name, examples in parts.items():
        ids, labels, truncated = [], [], 0
        for sample_ids, sample_labels, cut in tokenise(examples, tokenizer, max_length):
            if any(label != IGNORED for label in sample_labels):
                ids.append(np.asarray(sample_ids, dtype=np.int32))
                labels.append(np.asarray(sample_labels, dtype=np.int32))
                truncated += cut
        if examples and not ids:
            raise DataError(f"all {len(examples)} samples of the {name} split were dropped: nothing to learn from is left of them within "
                            f"training.max_length={max_length}")  # fmt: skip
        counts["rows"][name], counts["truncated"][name] = len(ids), truncated
        counts["dropped_untrained"][name] = len(examples) - len(ids)
        counts["tokens"][name] = sum(map(len, ids))
        if ids:
            splits[name] = Dataset.from_dict({"input_ids": ids, "labels": labels}, features=_FEATURES)
    texts = hashlib.sha256()
    for example in parts["train"]:
        texts.update(json.dumps([example.text, example.trained_from]).encode())
    return DatasetDict(splits), Report(dropped_empty=empty, **counts, digest=texts.hexdigest()[:16])


def split(rows: Sequence[Any], data: Data, seed: int, *, with_test: bool) -> dict[str, list[Any]]:
    """train, validation and test from one permutation by `seed`; of 15,011 rows 12,008, 1,501 and 1,502 at 80/10/10."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    order = order[: data.max_samples]
    test_fraction = data.test_fraction if with_test else 0.0
    train = int(len(order) * (1 - data.validation_fraction - test_fraction) + 1e-6)
    validation = len(order) - train if not test_fraction else int(len(order) * data.validation_fraction + 1e-6)
    bounds = {"train": (0, train), "validation": (train, train + validation), "test": (train + validation, len(order))}
    return {name: [rows[i] for i in order[low:high]] for name, (low, high) in bounds.items()}


class HubSplit(NamedTuple):
    """One split of a data set on the hub."""

    name: str
    config: str | None
    split: str


def _file(data: Data) -> Path | None:
    """The file or folder that is named, whether it is there or not; None where the data come from the hub."""
    known = KNOWN.get(data.name)
    own = packaged(known.file) if known and known.file else known.made() if known and known.made else None
    if data.path or own is not None:
        return Path(data.path or str(own)).expanduser()
    named = data.name.startswith((".", "/", "~")) or Path(data.name).suffix in _READERS
    return Path(data.name).expanduser() if named else None


def sources(data: Data) -> list[Path | HubSplit]:
    """Where the rows come from that are split, and after it the held-out split where it has a place of its own.

    Raises:
        DataError: `data.name` is nothing that is known.
    """
    known, file = KNOWN.get(data.name), _file(data)
    test = [Path(data.test_path).expanduser()] if data.test_path else []
    if file is not None:
        return [file, *test]
    hub = known.hub if known else data.name
    if hub is None or (known is None and "/" not in data.name):
        raise DataError(
            f"data.name={data.name} is none of {', '.join(KNOWN)}, no file and no hub id; set data.path to a file or folder"
        )
    test_split = data.test_split or (known.test_split if known else None)
    official = [HubSplit(hub, data.config, test_split)] if test_split and not test else []
    return [HubSplit(hub, data.config, data.train_split), *test, *official]


def read(source: Path | HubSplit) -> Dataset:
    """The rows of a source, which go to the cache of `datasets` as well.

    Raises:
        DataError: they cannot be had, or are none.
    """
    if isinstance(source, Path):
        return _load_local(source)
    try:
        return load_dataset(source.name, source.config, split=source.split)
    except Exception as error:  # datasets and the hub client raise many kinds here; all mean that it cannot be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{source.name} ({source.split} split) is not in the cache and cannot be had from the hub: {reason}\n"
                        "  on a machine with a connection: distft fetch, with the same words; or give a local copy: data.path=FILE.jsonl") from error  # fmt: skip


def _load_local(path: Path) -> Dataset:
    if not path.exists():
        raise DataError(f"there is no data file or folder {path}")
    if path.is_dir():
        if (path / "state.json").exists():
            return load_from_disk(str(path))
        files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
        if not files:
            raise DataError(f"{path} holds no file that ends in {', '.join(_READERS)}")
        if len({file.suffix for file in files}) > 1:
            raise DataError(
                f"{path} holds files of several formats ({', '.join(sorted({f.suffix for f in files}))}); name one file"
            )
    else:
        files = [path]
    reader = _READERS.get(files[0].suffix)
    if reader is None:
        raise DataError(f"{path} is none of {', '.join(_READERS)}")
    if not any(file.stat().st_size for file in files):
        raise DataError(f"{path} is empty")
    options = {"keep_default_na": False} if reader == "csv" else {}  # "None" and "NA" are words a response may be
    try:
        rows: Dataset = load_dataset(reader, data_files=[str(file) for file in files], split="train", **options)
    except Exception as error:  # the readers raise many kinds; the first line of the innermost names the fault
        inner: BaseException = error
        while inner.__cause__ is not None:
            inner = inner.__cause__
        if "corresponds to no data" in str(inner):
            raise DataError(f"{path} is empty") from error
        raise DataError(f"{path} cannot be read as {reader}: {str(inner).strip().splitlines()[0]}") from error
    if len(rows) == 0:
        raise DataError(f"{path} is empty")
    return rows


def check_columns(rows: Dataset, data: Data, where: str) -> None:
    """Raises DataError where `rows` lack a column that the format names."""
    form = format_of(data)
    assert form is not None
    fields = ("text", "prompt", "completion", "instruction", "context", "response", "review", "label")
    wanted = {field: column for field in fields if (column := getattr(form, field))}
    missing = {
        field: column for field, column in wanted.items() if column not in rows.column_names and field != "context"
    }
    if missing:
        raise DataError(
            f"the data ({where}) has no column {', '.join(missing.values())}; it has {', '.join(rows.column_names)}\n"
            "  name yours: " + " ".join(f"data.format.{field}=COLUMN" for field in missing)
        )
