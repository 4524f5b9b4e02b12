"""The prompt templates, against literal expectations on real rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.data.templates import format_review
from tests.data.rows import ALL, Prepare, read_rows, row_with, whole, write_rows

PINEAPPLES = (
    "### Instruction:\nWhich US state produces the most pineapples?\n\n### Response:\nHawaii###eos_token###</s>"
)

SURF = (
    "### Instruction:\nName five surf spots on the North Shore of Oahu in Hawaii\n\n### Response:\n"
    "Pipeline\nSunset Beach\nVelzyland\nLog Cabins\nChun's Reef###eos_token###</s>"
)

THERIAULT = (
    "### Instruction:\nIn which century was Denis Thériault born?\n\n### Context:\n"
    "Denis Thériault (born August 24, 1959) is a Canadian author, playwright and screenwriter of French-Canadian "
    "descent..\n\n### Response:\nThe 20th century###eos_token###</s>"
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [("pineapples", PINEAPPLES), ("Velzyland", SURF), ("playwright and screenwriter of French", THERIAULT)],
)
def test_a_dolly_row_becomes_this_text(prepare: Prepare, dolly: str, tokenizer: Any, words: str, expected: str) -> None:
    assert whole(row_with(prepare(dolly, *ALL), words, tokenizer), tokenizer) == expected


def test_only_rows_with_a_context_get_a_context_block(prepare: Prepare, dolly: str, tokenizer: Any) -> None:
    texts = [whole(row, tokenizer) for row in prepare(dolly, *ALL).train]
    assert (len(texts), sum("\n\n### Context:\n" in text for text in texts)) == (151, 47)


@pytest.mark.parametrize(
    "context",
    [{}, {"context": None}, {"context": ""}, {"context": " \n\t"}],
    ids=["no column", "null", "empty", "blank"],
)
def test_a_blank_context_gets_no_block(
    prepare: Prepare, tmp_path: Path, tokenizer: Any, context: dict[str, Any]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Add 1 and 1.", "response": "2, say", **context}])
    (row,) = prepare(f"data.path={file}", *ALL).train
    assert whole(row, tokenizer) == "### Instruction:\nAdd 1 and 1.\n\n### Response:\n2, say</s>"


LAUGHTER = (
    "### Review:\nIf you like original gut wrenching laughter you will like this movie. If you are young or old then "
    "you will love this movie, hell even my mom liked it.\nGreat Camp!!!\n\n### Sentiment:\npositive</s>"
)

RATING = (
    '### Review:\nA rating of "1" does not begin to express how dull, depressing and relentlessly bad this movie is.'
    "\n\n### Sentiment:\nnegative</s>"
)


@pytest.mark.parametrize(
    ("words", "expected"), [("gut wrenching laughter", LAUGHTER), ('A rating of "1" does not', RATING)]
)
def test_an_imdb_row_becomes_this_text(
    prepare: Prepare, shared_data: Path, tmp_path: Path, tokenizer: Any, words: str, expected: str
) -> None:
    file = write_rows(
        tmp_path / "rows.jsonl", [row for row in read_rows(shared_data / "imdb_sample.jsonl") if words in row["text"]]
    )
    (row,) = prepare("data.name=imdb", f"data.path={file}", *ALL).train
    assert whole(row, tokenizer) == expected


def test_no_review_keeps_its_line_break_tags(prepare: Prepare, imdb: tuple[str, str], tokenizer: Any) -> None:
    texts = [whole(row, tokenizer) for row in prepare(*imdb, *ALL, "data.max_samples=100").train]
    assert len(texts) == 100
    assert not any("<br" in text for text in texts)


@pytest.mark.parametrize("tag", ["<br />", "<br/>", "<br>", "<br /><br />", "<br /> <br />"])
def test_line_break_tags_become_one_line_break(tag: str) -> None:
    assert format_review(f"{tag}Good.{tag}Very.{tag}", "positive", completion_only=True).text == (
        "### Review:\nGood.\nVery.\n\n### Sentiment:\npositive"
    )
