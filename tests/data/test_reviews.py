"""Which reviews are classified, and their prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distft.config.recipe import load_recipe
from distft.data import reviews
from distft.data.labelled import Review, subset
from distft.data.prepare import prepare_data
from distft.data.reviews import prompt_of
from distft.data.templates import format_review
from distft.data.tokenize import tokenize
from distft.data.toy import reviews as made
from distft.errors import DataError


@pytest.mark.parametrize("max_length", [None, 40])
def test_prompt_and_label_word_have_the_tokens_of_training(tokenizer: Any, max_length: int | None) -> None:
    words = ["negative", "positive"]
    for row in made(20):
        text = row["text"] * 2
        prompt = prompt_of(text, words, tokenizer, max_length)
        longest = max(range(2), key=lambda label: len(prompt.continuations[label]))
        ((ids, labels, _),) = tokenize(
            [format_review(text, words[longest], completion_only=True)], tokenizer, max_length
        )
        assert [*prompt.prefix, *prompt.continuations[longest], tokenizer.eos_token_id] == ids
        assert [token for token in labels if token != -100] == [*prompt.continuations[longest], tokenizer.eos_token_id]


def test_a_balanced_subset_has_equal_classes_and_depends_on_the_seed() -> None:
    rows = [Review(number, str(number), int(number % 4 == 0)) for number in range(100)]
    chosen = subset(rows, 31, True, 5, 2)
    assert [sum(row.label == label for row in chosen) for label in (0, 1)] == [15, 15]
    assert (
        chosen
        == sorted(chosen, key=lambda row: row.row)
        == subset(rows, 31, True, 5, 2)
        != subset(rows, 31, True, 6, 2)
    )
    assert len(subset(rows, None, True, 5, 2)) == 50
    assert len(subset(rows, None, False, 5, 2)) == 100
    assert len(subset(rows, 31, False, 5, 2)) == 31


def test_the_held_out_rows_are_those_of_training(tokenizer: Any) -> None:
    recipe = load_recipe(["recipe=tiny_sentiment", "evaluation.imdb.balanced=false"])
    rows = reviews.load(recipe, 2)
    held_out = prepare_data(recipe, tokenizer).test
    assert held_out is not None and len(rows) == len(held_out) == 240
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in held_out["input_ids"]]
    assert all(row.text in text for row, text in zip(rows, texts, strict=True))


def test_reviews_of_a_file_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"body": "x", "stars": n}) + "\n" for n in (0, 1, 2)), encoding="utf-8")
    words = [f"evaluation.imdb.path={file}", "evaluation.tasks=[imdb]"]
    with pytest.raises(
        DataError, match=r"has no column text, label; it has body, stars\n.*evaluation\.imdb\.text=COLUMN"
    ):
        reviews.load(load_recipe(words), 2)
    words += ["evaluation.imdb.text=body", "evaluation.imdb.label=stars"]
    with pytest.raises(
        DataError,
        match=r"row 2 of .* has '2' in column stars, which must hold class numbers: 0 for 'negative', 1 for",
    ):
        reviews.load(load_recipe(words), 2)
    with pytest.raises(DataError, match="no reviews are left"):
        reviews.select(load_recipe(words), [reviews.Review(0, "x", 1)], 2)
    assert [row.label for row in reviews.load(load_recipe([*words, "evaluation.imdb.balanced=false"]), 3)] == [0, 1, 2]
    with pytest.raises(DataError, match="label words"):
        reviews.words_of(load_recipe([*words, "evaluation.imdb.label_words=[good, Good]"]))
