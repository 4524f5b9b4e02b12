"""Mixtures: exact proportions, their own splits, repeats, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from distft.data.batch_plan import Plan
from distft.data.checks import data_file_faults
from distft.data.mixture import counts
from distft.data.prepare import Splits
from distft.data.splits import lengths_of
from distft.errors import DataError, RecipeError
from tests.data.rows import Prepare, recipe_of, whole, write_rows

NO_SPLITS = ("data.validation_fraction=0", "data.test_fraction=0", "training.eval_strategy=no")


def mixture(tmp_path: Path, *sources: str) -> str:
    """Files `a` (100 rows) and `b` (40 rows) of different formats; `sources` are more keys of each."""
    a = write_rows(tmp_path / "a.jsonl", [{"body": f"First {number}."} for number in range(100)])
    b = write_rows(tmp_path / "b.jsonl", [{"q": f"Second {number}?", "a": " Yes."} for number in range(40)])
    more = [*sources, "", ""]
    return (
        f"data={{name: null, sources: [{{name: {a}, format: {{text: body}}{more[0]}}}, "
        f"{{name: {b}, format: {{prompt: q, completion: a}}{more[1]}}}]}}"
    )


def kinds(splits: Splits, tokenizer: Any, rows: list[int] | None = None) -> Counter[str]:
    samples = splits.train if rows is None else splits.train.select(rows)
    return Counter(whole(row, tokenizer).split()[0] for row in samples)


@pytest.mark.parametrize(
    ("a", "b", "more", "expected"),
    [
        ("", "", (), {"First": 100, "Second": 40}),
        (", samples: 30", "", (), {"First": 30, "Second": 40}),
        (", weight: 3", ", weight: 1", (), {"First": 100, "Second": 33}),
        (", weight: 1", ", weight: 1", (), {"First": 40, "Second": 40}),
        (", weight: 1", ", weight: 1", ("data.stopping_strategy=all_exhausted",), {"First": 100, "Second": 100}),
        (", samples: 10", ", samples: 90", ("data.stopping_strategy=all_exhausted",), {"First": 10, "Second": 90}),
    ],
)
def test_an_epoch_has_each_source_in_its_proportion(
    prepare: Prepare, tmp_path: Path, tokenizer: Any, a: str, b: str, more: tuple[str, ...], expected: dict[str, int]
) -> None:
    splits = prepare(mixture(tmp_path, a, b), *NO_SPLITS, *more)
    assert kinds(splits, tokenizer) == expected
    assert {label: rows["train"] for label, rows in splits.report.sources.items()} == {
        "a": expected["First"],
        "b": expected["Second"],
    }
    times = Counter(whole(row, tokenizer) for row in splits.train if "Second" in whole(row, tokenizer))
    assert max(times.values()) - min([*times.values()]) <= 1, "repeats are even"


def test_every_epoch_has_the_mixture_on_any_number_of_processes(
    prepare: Prepare, tmp_path: Path, tokenizer: Any
) -> None:
    words = (mixture(tmp_path, ", weight: 1", ", weight: 1"), *NO_SPLITS, "batching.global_batch_size=8")
    splits = prepare(*words)
    plan = Plan(lengths_of(splits.train), recipe_of(*words, "batching.micro_batch=1").batching, seed=1)
    for epoch in range(2):
        for world_size in (1, 2, 4):
            steps = range(epoch * plan.steps, (epoch + 1) * plan.steps)
            rounds = [ranks for step in steps for ranks in plan.micro_batches(step, world_size)]
            seen = [row for ranks in rounds for rows in ranks for row in rows]
            assert kinds(splits, tokenizer, seen) == {"First": 40, "Second": 40}


def test_each_source_has_its_own_splits(prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    splits = prepare(mixture(tmp_path, ", label: texts"), "data.validation_fraction=0.2", "data.test_fraction=0.1")
    assert splits.report.sources == {
        "texts": {"train": 70, "validation": 20, "test": 10},
        "b": {"train": 28, "validation": 8, "test": 4},
    }
    assert splits.validation is not None
    parts = splits.by_source("validation", None)
    assert [len(part) for part in parts.values()] == [20, 8]
    assert all(whole(row, tokenizer).startswith("First") for row in parts["texts"])
    first = splits.by_source("validation", 10)
    assert sum(len(part) for part in first.values()) == 10 and len(first["b"]) > 0, "the first ones are of both"
    lines = splits.report.lines()
    assert "data: texts: train 70, validation 20, test 10; 71.4% of an epoch" in lines


def test_a_mixture_of_one_is_that_source(prepare: Prepare, dolly: str) -> None:
    path = dolly.partition("=")[2]
    alone = prepare(dolly)
    mixed = prepare(f"data={{name: null, sources: [{{name: dolly, path: {path}}}]}}")
    assert mixed.train.to_list() == alone.train.to_list()
    assert (mixed.report.digest, mixed.report.tokens) == (alone.report.digest, alone.report.tokens)
    assert mixed.report.sources == {"dolly": alone.report.rows}


def test_counts_are_exact() -> None:
    data = recipe_of("data={name: null, sources: [{name: dolly, weight: 0.7}, {name: imdb, weight: 0.3}]}").data
    assert counts({"dolly": 700, "imdb": 10_000}, data) == {"dolly": 700, "imdb": 300}
    data = data.model_copy(update={"stopping_strategy": "all_exhausted"})
    assert counts({"dolly": 700, "imdb": 10_000}, data) == {"dolly": 23_333, "imdb": 10_000}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((", weight: 1",), "has weights, but none for b"),
        ((", weight: 1, samples: 3", ", weight: 1"), "has both a weight and samples for a"),
        ((", label: b",), "has two sources called b"),
        ((", format: {text: nobody}",), ""),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, sources: tuple[str, ...], message: str) -> None:
    if message:
        with pytest.raises(RecipeError, match=message):
            recipe_of(mixture(tmp_path, *sources))
    with pytest.raises(RecipeError, match=r"data\.max_samples: and data\.sources both say"):
        recipe_of(mixture(tmp_path), "data.max_samples=5")
    with pytest.raises(RecipeError, match=r"data\.name: and data\.sources both say"):
        recipe_of(mixture(tmp_path), "data.name=dolly")


def test_a_fault_of_a_source_has_its_key(tmp_path: Path) -> None:
    recipe = recipe_of(mixture(tmp_path).replace("text: body", "text: nobody"))
    (fault,) = data_file_faults(recipe)
    assert fault.key == "data.sources.0.name" and "has no column nobody" in fault.problem
    with pytest.raises(RecipeError, match=r"data\.sources\.1\.config: is for data on the hub"):
        recipe_of(mixture(tmp_path, "", ", config: x"))


def test_more_samples_than_there_are(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"asks for 50 samples of b, and its training split has 40\n.*all_exhausted"):
        prepare(mixture(tmp_path, "", ", samples: 50"), *NO_SPLITS)


# ---- exact repeats ---------------------------------------------------------------------------------------------------


def test_repeats_are_dropped_and_counted(prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"q": f"Question {number % 30}?", "a": " So."} for number in range(100)]
    file = write_rows(tmp_path / "rows.jsonl", [*rows, {"q": "Question 1? So", "a": "."}])
    source = (f"data.name={file}", "data.format={prompt: q, completion: a}", "data.deduplicate=true")
    whole_data = prepare(*source, *NO_SPLITS)
    assert whole_data.report.repeats == 70 and len(whole_data.train) == 31, "the last has another trained part"
    assert "data: dropped 70 rows that repeat another" in whole_data.report.lines()
    splits = prepare(*source, "data.validation_fraction=0.2", "data.test_fraction=0.2")
    assert sum(splits.report.rows.values()) == 31
    drawn = prepare(*source, *NO_SPLITS, "data.max_samples=25")
    assert drawn.report.repeats == 70
    assert len({whole(row, tokenizer) for row in drawn.train}) >= 24
    assert prepare(*source[:2], *NO_SPLITS).report.rows["train"] == 101


def test_repeats_across_sources_are_dropped_from_the_later_one(prepare: Prepare, tmp_path: Path) -> None:
    for name, numbers in (("a", range(20)), ("b", range(10, 40))):
        write_rows(tmp_path / f"{name}.jsonl", [{"body": f"Row {number}."} for number in numbers])
    names = [f"{{name: {tmp_path / name}.jsonl, format: {{text: body}}}}" for name in ("a", "b")]
    splits = prepare(f"data={{name: null, deduplicate: true, sources: [{', '.join(names)}]}}", *NO_SPLITS)
    assert splits.report.repeats == 10
    assert {label: rows["train"] for label, rows in splits.report.sources.items()} == {"a": 20, "b": 20}
