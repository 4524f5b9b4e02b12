"""Label words are scored and parsed as they should be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from distft.data.toy import reviews as made
from distft.evaluation.likelihood import continuation_log_likelihoods
from distft.evaluation.tasks.imdb import parse
from distft.evaluation.tasks.reviews import prompt_of
from distft.runs.folder import RunFolder


def reference(model: Any, prefix: list[int], continuation: list[int]) -> float:
    """One forward of one row, and the sum over the continuation's tokens."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prefix, *continuation]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prefix) + step - 1, token]) for step, token in enumerate(continuation))


@pytest.mark.parametrize("words", [["negative", "positive"], ["bad", "absolutely wonderful"], ["a", "b"]])
def test_likelihoods_of_label_words_are_those_of_an_unbatched_reference(
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


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("positive", 1),
        (" Negative.\n\nReview", 0),
        ("**Positive**", 1),
        ("'negative'", 0),
        ("_positive_ indeed", 1),
        ("", None),
        ("positively", None),
        ("The film is positive", None),
        ("not positive", None),
        ("posit", None),
        ("1", None),
    ],
)
def test_only_the_beginning_of_an_answer_counts(text: str, label: int | None) -> None:
    assert parse(text, ["negative", "positive"]) == label
