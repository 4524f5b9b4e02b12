from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from distft.config.recipe import load_recipe
from distft.data.prepare import prepare_data
from distft.data.templates import format_review
from distft.data.tokenize import tokenize
from distft.data.toy import reviews as made
from distft.errors import DataError
from distft.evaluation.likelihood import continuation_log_likelihoods
from distft.evaluation.tasks import reviews
from distft.evaluation.tasks.classification import compare, confusion, item_counts, metrics, metrics_of_matrices
from distft.evaluation.tasks.imdb import parse
from distft.evaluation.tasks.reviews import Review, prompt_of, subset
from distft.runs.folder import RunFolder


def reference(model: Any, prefix: list[int], continuation: list[int]) -> float:
    """One forward of one row, and the sum over the continuation's tokens."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prefix, *continuation]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prefix) + step - 1, token]) for step, token in enumerate(continuation))


@pytest.mark.parametrize("words", [["negative", "positive"], ["bad", "absolutely wonderful"], ["a", "b"]])
def test_label_words_have_the_likelihoods_of_an_unbatched_reference(
    words: list[str], learned: RunFolder, load: Callable[..., Any]
) -> None:
    target = load(learned)
    texts = [row["text"] * (1 + number % 3) for number, row in enumerate(made(9))]  # lengths that differ
    prompts = [prompt_of(text, words, target.tokenizer, 128) for text in texts]
    for side in target.sides:
        with target.side(side) as model:
            found = continuation_log_likelihoods(
                model,
                [p.prefix for p in prompts],
                [p.continuations for p in prompts],
                target.tokenizer.pad_token_id,
                target.device,
            )
            expected = [[reference(model, p.prefix, tokens) for tokens in p.continuations] for p in prompts]
        assert np.abs(np.array(found) - np.array(expected)).max() < 1e-5
    if (
        words[0] == "bad"
    ):  # else the case of several tokens, and of words of different lengths, is not the one that is tested
        assert len({len(tokens) for tokens in prompts[0].continuations}) == 2


@pytest.mark.parametrize("max_length", [None, 40])
def test_prompt_and_word_are_the_tokens_that_training_has_seen(tokenizer: Any, max_length: int | None) -> None:
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


def test_accuracy_is_what_counting_gives() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1, 0, 2])  # 2: unparsed
    found = metrics(labels, predicted, 2, positive=1)
    assert found["accuracy"] == 5 / 8
    assert found["precision"] == 3 / 4
    assert found["recall"] == 3 / 5
    assert found["f1"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert found["unparsed"] == 1 / 8
    assert confusion(labels, predicted, 2) == [[2, 1, 0], [1, 3, 1]]


@pytest.mark.parametrize("seed", range(20))
def test_figures_of_bootstrap_samples_agree_with_scikit_learn(seed: int) -> None:
    draws = np.random.default_rng(seed)
    labels, predicted = draws.integers(0, 3, 30), draws.integers(0, 4 if seed % 2 else 2, 30)
    ours = {
        name: values[0]
        for name, values in metrics_of_matrices(np.array([confusion(labels, predicted, 3)], dtype=float), 1).items()
    }
    assert ours == pytest.approx(metrics(labels, predicted, 3, positive=1))
    theirs = sklearn_metrics.precision_recall_fscore_support(labels, predicted, labels=[0, 1, 2], zero_division=0)
    assert (ours["precision"], ours["recall"], ours["f1"]) == pytest.approx(
        tuple(float(column[1]) for column in theirs[:3])
    )
    assert ours["macro_f1"] == pytest.approx(float(theirs[2].mean()))


def test_the_difference_is_taken_over_pairs() -> None:
    labels = np.arange(200) % 2
    base = np.where(np.arange(200) % 5 == 0, 1 - labels, labels)
    better = base.copy()
    better[:50] = labels[:50]  # ten more are right, none is lost
    found = compare(labels, {"base": base, "adapter": better}, 2, 1, seed=0)["accuracy"]
    assert [side.value for side in found] == pytest.approx([0.8, 0.85, 0.05])
    assert found[2].low > 0
    assert found[0].high > found[1].low  # the sides' own intervals overlap


def test_a_share_that_is_all_or_nothing_has_a_width_and_one_of_nothing_none() -> None:
    labels = np.arange(224) % 2
    nothing, all_right = np.full(224, 2), labels.copy()  # no label word at all, and each class right
    found = compare(labels, {"base": nothing, "adapter": all_right}, 2, 1, seed=0)
    base, adapter, difference = found["accuracy"]
    assert (base.value, base.low) == (0, 0) and 0.01 < base.high < 0.02, "0 of 224"
    assert (adapter.value, adapter.high) == (1, 1) and adapter.low < 0.99
    assert difference.value == 1 and 0.9 < difference.low < 0.99
    assert found["recall"][1].low == pytest.approx(wilson_of_all(112))
    assert found["precision"][1].low == pytest.approx(wilson_of_all(112))
    assert np.isnan([found["precision"][0].low, found["precision"][2].low]).all(), "the base said it of none"
    assert item_counts(labels, nothing, 1) == {"accuracy": 224, "precision": 0, "recall": 112, "unparsed": 224}


def wilson_of_all(count: int) -> float:
    return 1 / (1 + 1.959963984540054**2 / count)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("positive", 1), (" Negative.\n\nReview", 0), ("**Positive**", 1), ("'negative'", 0), ("_positive_ indeed", 1),
        ("", None), ("positively", None), ("The film is positive", None), ("not positive", None), ("posit", None), ("1", None),
    ],
)  # fmt: skip
def test_an_answer_is_read_at_its_beginning_alone(text: str, label: int | None) -> None:
    assert parse(text, ["negative", "positive"]) == label


def test_a_balanced_subset_has_as_many_of_each_class_by_its_seed() -> None:
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
