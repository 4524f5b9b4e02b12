"""From columns to text: the kinds of formats, and the errors of columns that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.data.tokenize import IGNORED
from distft.errors import DataError
from tests.data.rows import ALL, Prepare, trained, whole, write_rows

MESSAGES = "these are messages; name the column of conversations: data.format.messages=COLUMN"
QA = "data.format={prompt: q, completion: a}"


def test_prompt_and_completion_are_used_verbatim(prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"q": "Q: 1 + 1\nA:", "a": " two"}])
    source = (f"data.name={file}", "data.format={prompt: q, completion: a}", *ALL)
    (row,) = prepare(*source).train
    assert whole(row, tokenizer) == "Q: 1 + 1\nA: two</s>"
    assert trained(row, tokenizer) == " two</s>"
    (row,) = prepare(*source, "training.completion_only_loss=false").train
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


def test_whole_texts_are_used_verbatim(prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"body": "The climate\nis changing."}, {"body": " "}])
    splits = prepare(f"data.name={file}", "data.format.text=body", *ALL)
    (row,) = splits.train
    assert whole(row, tokenizer) == "The climate\nis changing.</s>"
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]
    assert splits.report.dropped == {"an empty response": 1}


def test_label_words_can_be_changed(prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"body": "It rains.", "class": 2}])
    form = "data.format={review: body, label: class, label_words: [sport, money, weather]}"
    (row,) = prepare(f"data.name={file}", form, *ALL).train
    assert whole(row, tokenizer) == "### Review:\nIt rains.\n\n### Sentiment:\nweather</s>"


def test_missing_columns_are_listed_with_the_override_to_use(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"question": "Why?", "answer": "So."}])
    with pytest.raises(DataError) as caught:
        prepare(f"data.path={file}")
    message = str(caught.value)
    assert f"{file}) has no column instruction, response; it has question, answer" in message
    assert "data.format.instruction=COLUMN data.format.response=COLUMN" in message


def test_the_override_suggested_for_a_missing_column_works(prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(
        tmp_path / "rows.jsonl", [{"instruction": "Say where.", "context": "We live here.", "answer": "Here."}]
    )
    with pytest.raises(DataError) as caught:
        prepare(f"data.path={file}", *ALL)
    named = str(caught.value).splitlines()[-1].split("name yours: ")[1]
    (row,) = prepare(f"data.path={file}", *ALL, *named.replace("COLUMN", "answer").split()).train
    assert (
        whole(row, tokenizer)
        == "### Instruction:\nSay where.\n\n### Context:\nWe live here.\n\n### Response:\nHere.</s>"
    )


def test_missing_columns_of_the_test_file_name_the_test_file(prepare: Prepare, dolly: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "held_out.jsonl", [{"question": "Why?", "answer": "So."}])
    with pytest.raises(DataError, match=r"held_out\.jsonl.* has no column instruction"):
        prepare(dolly, f"data.test_path={file}")


def test_a_column_that_does_not_hold_text_is_an_error(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"q": "How many?", "a": 42}])
    with pytest.raises(DataError, match="column 'a' contains int values; expected text"):
        prepare(f"data.name={file}", QA, *ALL)


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (
            [{"role": "user", "content": "Why?"}],
            MESSAGES,
        ),
        (
            [{"from": "human", "value": "Why?"}],
            MESSAGES,
        ),
        (["Why?", "So."], "give each row one text"),
        (4.5, "write it in quotes, as it should be trained"),
    ],
)
def test_what_is_not_text_comes_with_a_remedy_of_its_kind(
    prepare: Prepare, tmp_path: Path, value: Any, remedy: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": value}])
    with pytest.raises(DataError, match=rf"expected text\n  found .*; {remedy}"):
        prepare(f"data.name={file}", "data.format.text=text", *ALL)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_csv_file_with_another_separator_is_said_to_have_it(prepare: Prepare, tmp_path: Path, separator: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"q{separator}a\nWhy?{separator}So.\n", encoding="utf-8")
    with pytest.raises(DataError, match="its cells seem to be separated by") as caught:
        prepare(f"data.name={file}", QA, *ALL)
    assert repr(separator) in str(caught.value) and "COLUMN" not in str(caught.value)


@pytest.mark.parametrize("label", [2, -1, "pos", None])
def test_a_label_that_is_not_a_class_number_is_an_error(prepare: Prepare, tmp_path: Path, label: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "Good.", "label": label}])
    with pytest.raises(
        DataError,
        match=rf"column 'label' contains {label!r}; expected a class number from 0 to 1 \(data\.format\.label_words\)",
    ):
        prepare("data.name=imdb", f"data.path={file}", *ALL)
