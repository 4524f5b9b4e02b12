"""Splits, dropped rows, the digest and the cache of prepared data."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from distft.data.prepare import prepare_data
from distft.data.splits import first_samples, lengths_of, split_rows
from distft.errors import DataError
from tests.data.rows import ALL, RESPONSE_ONLY, Prepare, recipe_of, trained, whole, write_rows

QA = "data.format={prompt: q, completion: a}"


def test_rows_with_an_empty_response_are_dropped_and_reported(prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    responses = ["yes", "", " \n", "no", None]
    file = write_rows(
        tmp_path / "rows.jsonl", [{"instruction": "Say.", "context": "", "response": text} for text in responses]
    )
    splits = prepare(f"data.path={file}", *ALL)
    assert sorted(whole(row, tokenizer).split("### Response:\n")[1] for row in splits.train) == ["no</s>", "yes</s>"]
    assert (splits.report.dropped, splits.report.rows["train"]) == ({"an empty response": 3}, 2)
    assert "data: dropped 3 rows with an empty response" in splits.report.lines()


def test_samples_without_a_trained_token_after_truncation_are_dropped_and_counted(
    prepare: Prepare, dolly: str, tokenizer: Any
) -> None:
    splits = prepare(dolly, *ALL, RESPONSE_ONLY, "training.max_length=64")
    dropped = splits.report.dropped_untrained["train"]
    assert 0 < dropped == 151 - len(splits.train)
    assert all(trained(row, tokenizer) for row in splits.train)
    assert any(
        line.startswith(f"data: dropped {dropped} samples: training.max_length leaves nothing")
        for line in splits.report.lines()
    )


def test_the_default_max_length_is_that_of_trl(prepare: Prepare, tmp_path: Path) -> None:
    from trl import SFTConfig

    tiny = recipe_of().model_dump()
    del tiny["training"]["max_length"]
    (tmp_path / "mine.yaml").write_text(json.dumps(tiny), encoding="utf-8")  # JSON is YAML
    file = write_rows(tmp_path / "rows.jsonl", [{"body": "many words " * 2_000}])
    (row,) = prepare(f"recipe={tmp_path / 'mine.yaml'}", f"data.name={file}", "data.format.text=body", *ALL[:3]).train
    assert len(row["input_ids"]) == SFTConfig.__dataclass_fields__["max_length"].default == 1024


def test_all_rows_empty_is_an_error(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"q": "Why?", "a": ""}, {"q": "How?", "a": " "}])
    with pytest.raises(DataError, match="no row is left to train on: 2 of 2 rows have nothing to train on"):
        prepare(f"data.name={file}", QA)


def test_too_few_rows_for_the_splits_is_an_error(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"q": "Why?", "a": "So."}])
    with pytest.raises(DataError, match="no row is left to train on"):
        prepare(f"data.name={file}", QA)


def test_truncating_every_sample_to_nothing_is_an_error_that_names_max_length(prepare: Prepare, dolly: str) -> None:
    with pytest.raises(DataError, match=r"all 151 samples of the train split were dropped: training\.max_length=4"):
        prepare(dolly, *ALL, RESPONSE_ONLY, "training.max_length=4")


# ---- splits ---------------------------------------------------------------------------------------------------------


def sizes(rows: int, *overrides: str, with_test: bool = True) -> tuple[int, int, int]:
    parts = split_rows(range(rows), recipe_of(*overrides).data, 42, with_test=with_test)
    # Each row is in one split, once.
    assert sorted(row for part in parts.values() for row in part) == list(range(rows))
    return len(parts["train"]), len(parts["validation"]), len(parts["test"])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(151, (120, 15, 16)), (15_011, (12_008, 1_501, 1_502)), (10, (8, 1, 1)), (1_000, (800, 100, 100))],
)
def test_rows_are_split_80_10_10(rows: int, expected: tuple[int, int, int]) -> None:
    assert sizes(rows) == expected


@pytest.mark.parametrize(
    ("fractions", "expected"),
    [((0.0, 0.1), (90, 0, 10)), ((0.1, 0.0), (90, 10, 0)), ((0.0, 0.0), (100, 0, 0)), ((0.3, 0.3), (40, 30, 30))],
)
def test_the_split_fractions_come_from_the_recipe(
    fractions: tuple[float, float], expected: tuple[int, int, int]
) -> None:
    validation, test = fractions
    overrides = (f"data.validation_fraction={validation}", f"data.test_fraction={test}", "training.eval_strategy=no")
    assert sizes(100, *overrides) == expected


def test_with_an_official_test_split_no_other_row_is_held_out() -> None:
    assert sizes(100, with_test=False) == (90, 10, 0)


def test_the_split_depends_on_the_seed_alone() -> None:
    first, same, other = (split_rows(range(151), recipe_of().data, seed, with_test=True) for seed in (42, 42, 43))
    assert first == same
    assert all(set(first[name]) != set(other[name]) for name in ("train", "validation", "test"))


def test_max_samples_is_applied_after_shuffling() -> None:
    parts = split_rows(range(1_000), recipe_of("data.max_samples=100").data, 42, with_test=True)
    taken = [row for part in parts.values() for row in part]
    assert (len(parts["train"]), len(parts["validation"]), len(parts["test"])) == (80, 10, 10)
    assert len(set(taken)) == 100 and max(taken) > 500


def test_the_sample_of_dolly_is_split_into_120_15_and_16(prepare: Prepare, dolly: str) -> None:
    splits = prepare(dolly)
    assert splits.validation is not None and splits.test is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (120, 15, 16)
    assert splits.report.rows == {"train": 120, "validation": 15, "test": 16}
    assert splits.report.tokens["train"] == sum(len(ids) for ids in splits.train["input_ids"])


def test_the_seed_of_the_run_decides_which_rows_are_held_out(prepare: Prepare, dolly: str) -> None:
    first, again, other = (prepare(dolly, f"run.seed={seed}", "training.max_length=null").test for seed in (1, 1, 2))
    assert first is not None and again is not None and other is not None
    assert first.to_list() == again.to_list()
    assert first.to_list() != other.to_list()


def test_without_fractions_there_are_no_held_out_splits(prepare: Prepare, dolly: str) -> None:
    splits = prepare(dolly, *ALL)
    assert (len(splits.train), splits.validation, splits.test) == (151, None, None)


def test_a_test_file_becomes_the_held_out_split(prepare: Prepare, dolly: str, tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(
        tmp_path / "held_out.jsonl",
        [{"instruction": "Say.", "context": "", "response": text} for text in ("yes", "no", "")],
    )
    splits = prepare(dolly, f"data.test_path={file}")
    assert splits.validation is not None and splits.test is not None
    assert (len(splits.train), len(splits.validation)) == (135, 16)
    assert [whole(row, tokenizer).split("### Response:\n")[1] for row in splits.test] == ["yes</s>", "no</s>"]
    assert splits.report.dropped == {"an empty response": 1}


# ---- the cache ------------------------------------------------------------------------------------------------------


def prepared_folders(tmp_path: Path) -> dict[str, int]:
    """Each folder of the cache with the time of its report."""
    return {
        report.parent.name: report.stat().st_mtime_ns for report in (tmp_path / "cache" / "data").glob("*/report.json")
    }


def test_a_second_preparation_reads_the_cache(prepare: Prepare, dolly: str, tmp_path: Path) -> None:
    first = prepare(dolly)
    folders = prepared_folders(tmp_path)
    second = prepare(dolly)
    assert len(folders) == 1
    assert prepared_folders(tmp_path) == folders
    assert second.train._fingerprint == first.train._fingerprint
    assert second.report == first.report


@pytest.mark.parametrize("folder", [False, True], ids=["file", "arrow folder"])
def test_changed_data_is_prepared_again(prepare: Prepare, tmp_path: Path, tokenizer: Any, folder: bool) -> None:
    for number, text in enumerate(("It rains.", "It snows.")):  # of one length
        source = tmp_path / ("saved" if folder else "rows.jsonl")
        if folder:
            Dataset.from_list([{"body": text}]).save_to_disk(source)
        else:
            write_rows(source, [{"body": text}])
        (row,) = prepare(f"data.name={source}", "data.format.text=body", *ALL).train
        assert whole(row, tokenizer) == f"{text}</s>"
        assert len(prepared_folders(tmp_path)) == number + 1


@pytest.mark.parametrize(
    "change", ["training.max_length=32", "run.seed=7", RESPONSE_ONLY, "data.test_fraction=0.2", "data.max_samples=50"]
)
def test_each_recipe_has_its_own_cache_entry(prepare: Prepare, dolly: str, tmp_path: Path, change: str) -> None:
    first, second = prepare(dolly), prepare(dolly, change)
    assert len(prepared_folders(tmp_path)) == 2
    assert first.train.to_list() != second.train.to_list()


def test_each_tokenizer_has_its_own_cache_entry(prepare: Prepare, dolly: str, tmp_path: Path, tokenizer: Any) -> None:
    prepare(dolly)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["###eos_token###"])
    splits = prepare_data(recipe_of(dolly), other)
    assert len(prepared_folders(tmp_path)) == 2
    assert any(len(tokenizer) in ids for ids in splits.train["input_ids"])


def test_each_end_of_sequence_token_has_its_own_cache_entry(
    prepare: Prepare, dolly: str, tmp_path: Path, tokenizer: Any
) -> None:
    """The token is no part of the tokenizer's own file, so two tokenizers may differ in nothing else."""
    first, other = prepare(dolly, *ALL), copy.deepcopy(tokenizer)
    other.eos_token = other.bos_token
    assert other.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    second = prepare_data(recipe_of(dolly, *ALL), other)
    assert len(prepared_folders(tmp_path)) == 2
    assert {labels[-1] for labels in first.train["labels"]} == {tokenizer.eos_token_id}
    assert {labels[-1] for labels in second.train["labels"]} == {other.eos_token_id}


def test_a_failed_preparation_leaves_the_cache_empty(prepare: Prepare, dolly: str, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        prepare(dolly, *ALL, RESPONSE_ONLY, "training.max_length=4")
    assert [path for path in (tmp_path / "cache" / "data").iterdir() if path.suffix != ".lock"] == []


def test_the_digest_depends_on_the_training_texts_and_their_order(prepare: Prepare, tmp_path: Path) -> None:
    rows = [{"body": f"Row {number}."} for number in range(4)]
    file = write_rows(tmp_path / "rows.jsonl", rows)

    def digest(*words: str) -> str:
        return prepare(f"data.name={file}", "data.format.text=body", *ALL, *words).report.digest

    first = digest()
    assert digest("training.max_length=2") == first, "how a text is cut into tokens does not matter"
    assert digest("run.seed=1") != first
    write_rows(file, reversed(rows))
    assert digest() != first
    write_rows(file, rows)
    assert digest() == first


# ---- lengths and limits ---------------------------------------------------------------------------------------------


def samples(count: int) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [[5] * (i + 1) for i in range(count)], "labels": [[5] * (i + 1) for i in range(count)]}
    )


def test_lengths_are_token_counts_also_after_a_selection() -> None:
    assert lengths_of(samples(5)).tolist() == [1, 2, 3, 4, 5]
    assert lengths_of(samples(5).select([3, 0])).tolist() == [4, 1]


@pytest.mark.parametrize(("limit", "kept"), [(None, 13), (5, 5), (99, 13)])
def test_first_samples_are_the_first(limit: int | None, kept: int) -> None:
    found = first_samples(samples(13), limit)
    assert found is not None and found.to_list() == samples(13).to_list()[:kept]


def test_first_samples_of_no_split_is_none() -> None:
    assert first_samples(None, 5) is None
