"""Reading rows from every file format, and the errors of files that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import Dataset

from distft.data.sources import KNOWN_DATASETS
from distft.errors import DataError
from tests.data.rows import ALL, Prepare, read_rows, whole, write_rows

QA = "data.format={prompt: q, completion: a}"


def as_jsonl(frame: pandas.DataFrame, folder: Path) -> Path:
    return write_rows(folder / "rows.jsonl", frame.to_dict("records"))


def as_json(frame: pandas.DataFrame, folder: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps(frame.to_dict("records")), encoding="utf-8")
    return folder / "rows.json"


def as_csv(frame: pandas.DataFrame, folder: Path) -> Path:
    frame.to_csv(folder / "rows.csv", index=False)
    return folder / "rows.csv"


def as_parquet(frame: pandas.DataFrame, folder: Path) -> Path:
    frame.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def as_arrow_folder(frame: pandas.DataFrame, folder: Path) -> Path:
    Dataset.from_pandas(frame, preserve_index=False).save_to_disk(folder / "saved")
    return folder / "saved"


def as_arrow_file(frame: pandas.DataFrame, folder: Path) -> Path:
    return next(as_arrow_folder(frame, folder).glob("*.arrow"))


def as_folder_of_two(frame: pandas.DataFrame, folder: Path) -> Path:
    (folder / "parts").mkdir()
    frame[:80].to_parquet(folder / "parts" / "0.parquet")
    frame[80:].to_parquet(folder / "parts" / "1.parquet")
    return folder / "parts"


WRITERS = [as_jsonl, as_json, as_csv, as_parquet, as_arrow_folder, as_arrow_file, as_folder_of_two]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__.removeprefix("as_"))
def test_every_file_format_gives_the_same_samples(
    prepare: Prepare, dolly: str, shared_data: Path, tmp_path: Path, writer: Callable[[pandas.DataFrame, Path], Path]
) -> None:
    expected = prepare(dolly)
    found = prepare(f"data.path={writer(pandas.DataFrame(read_rows(shared_data / 'dolly_sample.jsonl')), tmp_path)}")
    assert found.report == expected.report
    for name in ("train", "validation", "test"):
        assert getattr(found, name).to_list() == getattr(expected, name).to_list()


@pytest.mark.parametrize("word", ["None", "null", "NA", "N/A", "nan"])
def test_words_that_look_like_missing_values_in_a_csv_file_are_kept(
    prepare: Prepare, tmp_path: Path, tokenizer: Any, word: str
) -> None:
    # "None" is an answer; a reader that takes it for a missing value loses the row, and calls it empty.
    (tmp_path / "rows.csv").write_text(
        f"instruction,context,response\nHow many are left?,,{word}\nAnd now?,,Some\n", encoding="utf-8"
    )
    splits = prepare(f"data.path={tmp_path / 'rows.csv'}", *ALL)
    assert sorted(whole(row, tokenizer).split("### Response:\n")[1] for row in splits.train) == sorted(
        [f"{word}</s>", "Some</s>"]
    )


def test_data_name_and_data_path_can_both_name_a_local_file(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"body": "It rains."}])
    by_name = prepare(f"data.name={file}", "data.format.text=body", *ALL)
    by_path = prepare("data.name=weather", f"data.path={file}", "data.format.text=body", *ALL)
    assert by_name.train.to_list() == by_path.train.to_list()


def test_a_missing_file_is_an_error(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"there is no data file or folder {tmp_path}/rows\.jsonl"):
        prepare(f"data.path={tmp_path / 'rows.jsonl'}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("rows.jsonl", "", id="no byte"),
        pytest.param("rows.jsonl", "\n\n", id="blank lines"),
        pytest.param("rows.csv", "q,a\n", id="only a header"),
        pytest.param("rows.json", "[]", id="an empty list"),
    ],
)
def test_a_file_without_rows_is_reported_as_empty(prepare: Prepare, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name} is empty"):
        prepare(f"data.name={tmp_path / name}", QA)


def test_a_folder_without_data_files_is_an_error_that_lists_the_formats(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    with pytest.raises(DataError, match=r"rows contains no \.jsonl, \.json, \.csv, \.tsv, \.parquet, \.arrow files"):
        prepare(f"data.name={tmp_path / 'rows'}", QA)


def test_a_folder_of_mixed_formats_is_refused(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("a.csv", "b.jsonl"):
        (tmp_path / "rows" / name).write_text("q,a\nx,y\n")
    with pytest.raises(DataError, match=r"mixes file formats \(\.csv, \.jsonl\)"):
        prepare(f"data.name={tmp_path / 'rows'}", QA)


def test_a_file_of_unknown_format_is_an_error_that_lists_the_formats(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "rows.xml").write_text("<rows/>")
    with pytest.raises(DataError, match=r"rows\.xml is not a \.jsonl, \.json, \.csv, \.tsv, \.parquet, \.arrow file"):
        prepare(f"data.path={tmp_path / 'rows.xml'}")


def test_a_malformed_file_is_an_error_with_the_reason_of_the_reader(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "x", "a": "y"}\nnot json\n')
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read as json: JSON parse error"):
        prepare(f"data.name={tmp_path / 'rows.jsonl'}", QA)


def test_an_unknown_data_set_is_an_error_that_lists_the_known_ones(prepare: Prepare) -> None:
    known = ", ".join(KNOWN_DATASETS)
    problem = rf"data\.name=climate is not a known data set \({known}\), a file or a hub id"
    with pytest.raises(DataError, match=f"{problem}; set data.path"):
        prepare("data.name=climate", "data.format.text=text")
