"""Token ids and labels: what is trained, and where truncation cuts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from distft.data.templates import Example, format_review
from distft.data.tokenize import IGNORED
from tests.data.rows import ALL, RESPONSE_ONLY, Prepare, read_rows, row_with, tokenize_one, trained, whole, write_rows


def test_every_token_but_the_first_is_trained_by_default(prepare: Prepare, dolly: str) -> None:
    rows = list(prepare(dolly, *ALL).train)
    assert len(rows) == 151
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in rows)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pineapples", "Hawaii###eos_token###</s>"),
        ("playwright and screenwriter of French", "The 20th century###eos_token###</s>"),
    ],
)
def test_only_the_response_is_trained_if_completion_only_loss_is_set(
    prepare: Prepare, dolly: str, tokenizer: Any, words: str, expected: str
) -> None:
    row = row_with(prepare(dolly, *ALL, RESPONSE_ONLY), words, tokenizer)
    assert trained(row, tokenizer) == expected


def test_the_trained_part_is_the_end_of_every_sample(prepare: Prepare, dolly: str, tokenizer: Any) -> None:
    for row in prepare(dolly, *ALL, RESPONSE_ONLY).train:
        text = whole(row, tokenizer)
        assert trained(row, tokenizer) == text.split("\n\n### Response:\n", 1)[1]
        first = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
        assert row["labels"] == [IGNORED] * first + row["input_ids"][first:]


def test_the_whole_review_is_trained_if_completion_only_loss_is_off(prepare: Prepare, imdb: tuple[str, str]) -> None:
    splits = prepare(*imdb, *ALL, "training.completion_only_loss=false", "data.max_samples=5")
    assert len(splits.train) == 5
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in splits.train)


@pytest.mark.parametrize("loss", ["false", "true"], ids=["whole text", "response only"])
def test_a_sample_ends_in_eos_unless_truncated_and_never_exceeds_max_length(
    prepare: Prepare, dolly: str, tokenizer: Any, loss: str
) -> None:
    completion_only = f"training.completion_only_loss={loss}"
    full = {tuple(row["input_ids"]): row["labels"] for row in prepare(dolly, *ALL, completion_only).train}
    splits = prepare(dolly, *ALL, "training.max_length=64", completion_only)
    cut = 0
    for row in splits.train:
        assert row["labels"][0] == IGNORED
        assert len(row["input_ids"]) == len(row["labels"]) <= 64
        if tuple(row["input_ids"]) in full:
            assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id
        else:
            # It has the beginning of a whole sample, its loss where that has it, and no end of sequence.
            cut += 1
            (labels,) = (labels for ids, labels in full.items() if list(ids[:64]) == row["input_ids"])
            assert row["labels"] == labels[:64]
            assert tokenizer.eos_token_id not in row["input_ids"]
    assert 0 < cut < len(splits.train)
    assert splits.report.truncated["train"] == cut
    assert f"data: truncated {cut} samples to training.max_length" in splits.report.lines()


def test_a_sample_that_fits_exactly_is_not_truncated(tokenizer: Any) -> None:
    example = Example.trained_from("One of the rows.")
    ids, _, _ = tokenize_one(example, tokenizer, None)
    assert tokenize_one(example, tokenizer, len(ids)) == (ids, [IGNORED, *ids[1:]], False)
    assert tokenize_one(example, tokenizer, len(ids) - 1) == (ids[:-1], [IGNORED, *ids[1:-1]], True)


@pytest.mark.parametrize("length", ["64", "512", "null"])
def test_a_review_keeps_its_label_at_any_length_and_only_the_label_is_trained(
    prepare: Prepare, shared_data: Path, tmp_path: Path, tokenizer: Any, length: str
) -> None:
    rows = read_rows(shared_data / "imdb_sample.jsonl")[:150]
    # Numbered, so that a sample is known again after the shuffling.
    file = write_rows(tmp_path / "rows.jsonl", [{**row, "text": f"{n}: {row['text']}"} for n, row in enumerate(rows)])
    splits = prepare("data.name=imdb", f"data.path={file}", *ALL, f"training.max_length={length}")
    words = []
    for row in splits.train:
        text = whole(row, tokenizer)
        number = int(text.removeprefix("### Review:\n").split(":")[0])
        words.append("positive" if rows[number]["label"] == 1 else "negative")
        assert text.endswith(f"\n\n### Sentiment:\n{words[-1]}</s>")
        assert trained(row, tokenizer) == f"{words[-1]}</s>"
        assert row["labels"][-1] == tokenizer.eos_token_id
        assert len(row["input_ids"]) <= float(length.replace("null", "inf"))
    assert len(words) == 150 and set(words) == {"negative", "positive"}
    # Hardly any review has fewer than 64 tokens, and some have more than 512.
    truncated = splits.report.truncated["train"]
    assert {"64": 100 < truncated <= 150, "512": 0 < truncated < 100, "null": truncated == 0}[length]


def test_truncating_a_review_shortens_only_the_review(tokenizer: Any) -> None:
    example = format_review("One two three four five six seven eight nine ten.", "negative", completion_only=True)
    ids, _, _ = tokenize_one(example, tokenizer, None)
    shorter, labels, cut = tokenize_one(example, tokenizer, len(ids) - 3)
    head, tail = tokenizer.decode(ids).split("\n\n### Sentiment:\n")
    assert cut and len(shorter) == len(labels) == len(ids) - 3
    kept, label = tokenizer.decode(shorter).split("\n\n### Sentiment:\n")
    assert (label, tail) == ("negative</s>", "negative</s>")
    assert head.startswith(kept) and 0 < len(head) - len(kept) < 15


def test_a_tokenizer_that_adds_bos_and_eos_adds_each_once(tokenizer: Any) -> None:
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids, labels, _ = tokenize_one(Example.trained_from("Yes, it is.", 5), adding, None)
    assert adding.decode(ids) == "<s>Yes, it is.</s>"
    assert adding.decode([label for label in labels if label != IGNORED]) == " it is.</s>"
    # Whole text: the beginning of a sequence is nothing to learn.
    assert tokenize_one(Example.trained_from("Yes, it is."), adding, None)[1] == [IGNORED, *ids[1:]]


def test_a_token_that_straddles_the_trained_part_is_trained(tokenizer: Any) -> None:
    (the,) = tokenizer(" the")["input_ids"]  # one token, and the boundary is in the middle of it
    ids, labels, _ = tokenize_one(Example.trained_from("So the", 4), tokenizer, None)
    assert ids[-2:] == [the, tokenizer.eos_token_id]
    assert labels == [IGNORED] * (len(ids) - 2) + ids[-2:]
