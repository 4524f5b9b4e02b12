"""From a recipe to tokenized samples: read, format, split, tokenize, and cache the result.

A prepared sample is {"input_ids": [int], "labels": [int]}, both of the same length. Labels are -100 where the loss
ignores the token; the last label of a sample that was not truncated is the end-of-sequence token.
"""

from __future__ import annotations

import array
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from datasets.table import MemoryMappedTable
from datasets.utils.logging import disable_progress_bar

from distft.config.recipe import Recipe
from distft.config.schema import Batching
from distft.data.batch_plan import Lengths, Plan
from distft.data.curriculum import difficulties_of, order_notes
from distft.data.difficulty import check_difficulty_column, difficulty_column
from distft.data.formats import Formatter, check_columns, format_rows, formatter
from distft.data.inference import with_format
from distft.data.mixture import mixed
from distft.data.pieces import CUT_INSIDE, TRUNCATED, UNCUTTABLE, Array, Worker, content_of, digest_record
from distft.data.report import Report
from distft.data.sources import Rows, parts_of, read_data, source_notes
from distft.data.splits import Examples, Members, lengths_of, save_rows, split_members
from distft.data.stream import Stream
from distft.data.templates import Dropped
from distft.data.token_store import Draw, TokenStore, store_of
from distft.data.windowed_plan import StreamedSamples, WindowedPlan
from distft.errors import DataError
from distft.files import build_folder_once
from distft.paths import cache_folder

_VERSION = 7
"""Part of the cache key: raise it whenever the same recipe and rows should give different samples."""


@dataclass(frozen=True)
class Splits:
    """Prepared samples; `validation` and `test` are None if the recipe has no such split. `recipe` names the format of
    the data, also where that was inferred."""

    recipe: Recipe
    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    report: Report
    inferred: str | None = None
    """What was inferred of the format, in words; None if the recipe names it."""
    labels: Mapping[str, Array] = field(default_factory=dict)
    """Of a mixture, the number of each sample's source, for `validation` and `test`."""
    difficulties: Array | None = None
    """Of each training sample, the number in the column that data.order names."""
    stream: Stream | None = None
    """With data.streaming, what is trained on; `train` is its first window."""

    def plan(self, seed: int, batching: Batching, stages: Lengths | None = None) -> Plan:
        """The optimizer steps over the training samples, in stages if there are any."""
        if self.stream is not None:
            return WindowedPlan(self.stream, batching, seed)
        return Plan(lengths_of(self.train), batching, seed, stages)

    @property
    def samples(self) -> Any:
        """The training samples by the numbers that the plan gives them."""
        return self.train if self.stream is None else StreamedSamples(self.stream)

    def by_source(self, split: Literal["validation", "test"], limit: int | None) -> dict[str, Dataset]:
        """The samples of each source among the first `limit` of a split; {} if there is one source."""
        samples, numbers = getattr(self, split), self.labels.get(split)
        if samples is None or numbers is None:
            return {}
        found = {label: np.flatnonzero(numbers[:limit] == at) for at, label in enumerate(self.report.sources)}
        return {label: samples.select(rows) for label, rows in found.items() if len(rows)}


def prepare_data(recipe: Recipe, tokenizer: Any) -> Splits:
    """The recipe's data, tokenized once and cached on disk.

    The first process to arrive does the work. The others wait for its file lock rather than in a collective, which
    could time out.

    Raises:
        DataError: the data is missing, unreadable or empty, lacks a column, or has no rows left to train on.
    """
    disable_progress_bar()
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "the model's tokenizer has no fast version, which distft needs to map tokens to characters; "
            "set model.tokenizer"
        )
    if recipe.data.streaming:
        from distft.data.prepare_stream import prepare_stream  # imports this module

        return prepare_stream(recipe, tokenizer)
    inputs = [
        _input(label, recipe.model_copy(update={"data": data}), tokenizer)
        for label, data in parts_of(recipe.data).items()
    ]
    recipe, inferred = _with_formats(recipe, inputs)
    data = recipe.data
    place = {
        "stores": [[each.label, *(store.folder.name for store in each.stores)] for each in inputs],
        "splits": [data.validation_fraction, data.test_fraction, data.max_samples, data.deduplicate],
        "mixture": [[each.weight, each.samples] for each in data.sources or ()],
        "repeats": data.stopping_strategy,
        "seed": recipe.run.seed,
    }
    folder = cache_folder() / "data" / hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()[:16]
    examples = Examples([store for each in inputs for store in each.stores])

    def build(temporary: Path) -> None:
        samples, arrays, report = _split(recipe, inputs, examples)
        for name, rows in samples.items():
            save_rows(temporary / f"{name}.arrow", rows)
        np.savez(temporary / "labels.npz", **dict[str, Any](arrays))
        (temporary / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")

    build_folder_once(folder, build)
    report = Report(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
    table = examples.samples()
    splits: dict[str, Dataset | None] = {
        name: Dataset(table, indices_table=MemoryMappedTable.from_file(str(file)), fingerprint=f"{folder.name}{name}")
        for name in ("train", "validation", "test")
        if (file := folder / f"{name}.arrow").exists()
    }
    train = splits["train"]
    assert train is not None
    with np.load(folder / "labels.npz") as found:
        labels = dict(found)
    told = "; ".join(inferred) or None
    hard = labels.pop("difficulties", None)
    order = order_notes(data, len(train), difficulties_of(data, lengths_of(train), hard))
    notes = [*inferred, *dict.fromkeys(line for each in inputs for line in each.lines), *source_notes(data)]
    report = replace(report, notes=(*notes, *order, *_batch_notes(recipe, report)))
    return Splits(recipe, train, splits.get("validation"), splits.get("test"), report, told, labels, hard)


@dataclass(frozen=True)
class _Input:
    """One source: its store, and that of its official test split if there is one."""

    label: str
    recipe: Recipe
    """Of this source alone; it names the format."""
    stores: list[TokenStore]
    inferred: str | None
    lines: list[str]


def _input(label: str, recipe: Recipe, tokenizer: Any) -> _Input:
    recipe, inferred = with_format(recipe, tokenizer)
    data, form = recipe.data, formatter(recipe, tokenizer)
    raw, *held_out = read_data(data)
    for rows in (raw, *held_out):
        check_columns(rows, data)
    check_difficulty_column(raw, data)
    key = what_samples_depend_on(recipe, form, tokenizer)
    work = Worker(Path(), form, tokenizer, recipe.training.get("max_length", 1024))
    processes = recipe.training.get("dataset_num_proc")
    orders = replace(work, difficulty=difficulty_column(data))
    stores = [store_of(raw, orders, key, processes, _draw(recipe, tokenizer))]
    stores += [store_of(rows, work, key, processes) for rows in held_out]
    return _Input(label, recipe, stores, inferred, form.lines())


def what_samples_depend_on(recipe: Recipe, form: Formatter, tokenizer: Any) -> dict[str, Any]:
    """All that tokenized samples depend on besides the rows, for JSON."""
    return {
        "version": _VERSION,
        "format": form.key(),
        "max_length": recipe.training.get("max_length", 1024),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "ends": [tokenizer.bos_token_id, tokenizer.eos_token_id],
    }


def _with_formats(recipe: Recipe, inputs: Sequence[_Input]) -> tuple[Recipe, list[str]]:
    """The recipe with the format of each source, and what was inferred of it, in words."""
    data = recipe.data
    if data.sources is None:
        return inputs[0].recipe, [inputs[0].inferred] if inputs[0].inferred else []
    sources = [
        source.model_copy(update={"format": each.recipe.data.format})
        for source, each in zip(data.sources, inputs, strict=True)
    ]
    told = [f"{each.label}: {each.inferred}" for each in inputs if each.inferred]
    return recipe.model_copy(update={"data": data.model_copy(update={"sources": sources})}), told


def _batch_notes(recipe: Recipe, report: Report) -> list[str]:
    """Say so if the training split is smaller than one global batch."""
    sizes = {"global_batch_size": report.rows["train"], "global_batch_tokens": report.tokens["train"]}
    return [
        f"batching.{key}={asked:,} is more than the {have:,} of the training split: every step has {have:,}"
        for key, have in sizes.items()
        if (asked := getattr(recipe.batching, key)) is not None and asked > have
    ]


def _split(
    recipe: Recipe, inputs: Sequence[_Input], examples: Examples
) -> tuple[dict[str, Members], dict[str, Array], Report]:
    """The samples of each split that has any, arrays to keep, and the report. The arrays are the source of each
    held-out sample of a mixture, and the difficulties of the training samples."""
    data, stores = recipe.data, examples.stores
    kept, repeats = _kept(inputs, examples, data.deduplicate)
    of_source: list[dict[str, Members]] = []
    for each, members in zip(inputs, kept, strict=True):
        store, official = each.stores[0], each.stores[1:]
        parts = split_members(store.kept if members is None else len(members), data, recipe.run.seed, not official)
        start = examples.starts[stores.index(store)]
        if members is None:  # the store has only the members of these splits, in the order of the rows
            parts = {name: ranks + start for name, ranks in zip(parts, _ranks(list(parts.values())), strict=True)}
        else:
            parts = {name: members[places] for name, places in parts.items()}
        if official:
            at = stores.index(official[0])
            parts["test"] = np.arange(*examples.starts[at : at + 2])
        _check_kept(each, parts, examples)
        of_source.append(parts)
    parts = {name: np.concatenate([each[name] for each in of_source]) for name in of_source[0]}
    samples = {name: examples.sample_numbers(members) for name, members in parts.items()}
    untrained = {name: len(members) - len(samples[name]) for name, members in parts.items()}
    labels: dict[str, Array] = {}
    sources: dict[str, dict[str, int]] = {}
    if data.sources is not None:
        parts, labels = _mix(
            recipe, {each.label: found for each, found in zip(inputs, of_source, strict=True)}, examples
        )
        samples = {name: examples.sample_numbers(members) for name, members in parts.items()}
        for number, each in enumerate(inputs):
            sources[each.label] = {name: int((found == number).sum()) for name, found in labels.items()}
    dropped, noted = (
        dict(sum((getattr(each, name) for each in stores), Counter[str]())) for name in ("dropped", "noted")
    )
    used = {name: examples.known[members[examples.is_sample(members)]] for name, members in parts.items()}
    everything = np.concatenate(list(parts.values()))
    report = Report(
        rows={name: len(rows) for name, rows in samples.items()},
        dropped=dropped,
        noted=noted,
        dropped_untrained=untrained,
        uncuttable={
            name: int(((examples.known[each]["flags"] & UNCUTTABLE) != 0).sum()) for name, each in parts.items()
        },
        truncated={name: int(((each["flags"] & TRUNCATED) != 0).sum()) for name, each in used.items()},
        cut_inside={name: int(((each["flags"] & CUT_INSIDE) != 0).sum()) for name, each in used.items()},
        tokens={name: int(each["length"].sum(dtype=np.int64)) for name, each in used.items()},
        trained=dict(examples.counted("trained", everything)),
        marked=dict(examples.counted("marked", everything)),
        overlap={
            name: examples.repeated(members, parts["train"])
            for name, members in parts.items()
            if name != "train" and len(members)
        },
        digest=examples.digest(parts["train"]),
        held_out_digest=examples.digest(np.concatenate([parts["validation"], parts["test"]])),
        repeats=repeats,
        sources=sources,
    )
    labels.pop("train", None)
    if (hard := examples.difficulties(parts["train"])) is not None:
        labels["difficulties"] = hard
    return {name: rows for name, rows in samples.items() if len(rows)}, labels, report


def _kept(inputs: Sequence[_Input], examples: Examples, deduplicate: bool) -> tuple[list[Members | None], int]:
    """The examples of each source to split, without repeats if `deduplicate`, and how many rows repeat another; None
    for a store that was drawn from, which has none."""
    starts = {store.folder: start for start, store in zip(examples.starts, examples.stores, strict=False)}
    found: list[Members | None] = []
    seen, repeats = np.zeros(0, np.uint64), 0
    for each in inputs:
        store = each.stores[0]
        if each.recipe.data.max_samples is not None:
            found.append(None)
            repeats += store.repeats
            continue
        members = np.arange(len(store.examples)) + starts[store.folder]
        if deduplicate:
            content, first = np.unique(store.examples["content"], return_index=True)
            first = first[~np.isin(content, seen)]
            seen = np.concatenate([seen, content])
            repeats += len(members) - len(first)
            members = members[np.sort(first)]
        found.append(members)
    return found, repeats


def _check_kept(each: _Input, parts: Mapping[str, Members], examples: Examples) -> None:
    """Raises:
    DataError: nothing is left of a source, of its training split, or of a split that has rows.
    """
    store, what = each.stores[0], f"no row is left to train on{f' of {each.label}' if each.label else ''}"
    if not store.kept:
        reasons = ", ".join(store.dropped)
        raise DataError(f"{what}: {store.rows} of {store.rows} rows have nothing to train on ({reasons})")
    if not len(parts["train"]):
        raise DataError(
            f"{what}: {store.rows - store.kept} of {store.rows} rows are empty, the rest went to the other splits\n"
            "  give more rows, or set data.validation_fraction=0 data.test_fraction=0 training.eval_strategy=no"
        )
    for name, members in parts.items():
        if len(members) and not examples.is_sample(members).any():
            raise DataError(
                f"all {len(members)} samples of the {name} split were dropped: training.max_length="
                f"{each.recipe.training.get('max_length', 1024)} leaves nothing to train on"
            )


def _mix(
    recipe: Recipe, of_source: Mapping[str, Mapping[str, Members]], examples: Examples
) -> tuple[dict[str, Members], dict[str, Array]]:
    """The members of each split over all sources, and the number of the source of each. Held-out members are shuffled,
    so that the first ones are of all sources."""
    parts: dict[str, Members] = {}
    labels: dict[str, Array] = {}
    for name in ("train", "validation", "test"):
        found = {label: each[name][examples.is_sample(each[name])] for label, each in of_source.items()}
        if name == "train":
            found = mixed(found, recipe.data)
        members = np.concatenate(list(found.values()))
        of = np.repeat(np.arange(len(found)), [len(each) for each in found.values()])
        order = np.arange(len(members))
        if name != "train":
            order = np.random.default_rng(recipe.run.seed).permutation(len(members))
        parts[name], labels[name] = members[order], of[order]
    return parts, labels


def _ranks(parts: Sequence[Members]) -> list[Members]:
    """The numbers in `parts`, which differ from each other, by their rank among all of them."""
    ranks = np.argsort(np.argsort(np.concatenate(parts)))
    return np.split(ranks, np.cumsum([len(part) for part in parts])[:-1])


def _draw(recipe: Recipe, tokenizer: Any) -> Draw | None:
    """With data.max_samples: how to find the rows that the splits consist of, so that no other is tokenized."""
    data, seed = recipe.data, recipe.run.seed
    if data.max_samples is None:
        return None

    def rows_of(rows: Rows) -> tuple[Members, dict[str, Any]]:
        tally = {"dropped": Counter[str](), "noted": Counter[str]()}
        kept, contents, number = array.array("q"), array.array("Q"), -1
        for number, (_, example) in enumerate(format_rows(rows, recipe, tokenizer=tokenizer)):
            tally["noted"].update(example.notes)
            if isinstance(example, Dropped):
                tally["dropped"][example.reason] += 1
            else:
                kept.append(number)
                contents.append(content_of(digest_record(example)))
        numbers = np.array(kept)
        if data.deduplicate:
            numbers = numbers[np.sort(np.unique(np.array(contents), return_index=True)[1])]
        parts = split_members(len(numbers), data, seed, True)
        drawn = numbers[np.sort(np.concatenate(list(parts.values())))]
        repeats = len(kept) - len(numbers)
        return drawn, {"rows": number + 1, "kept": len(numbers), "repeats": repeats, **tally}

    return Draw([data.max_samples, seed, data.deduplicate], rows_of)
