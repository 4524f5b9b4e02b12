"""Label words are scored and parsed as they should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distft.config.recipe import load_recipe
from distft.data.reviews import prompt_of
from distft.data.toy import reviews as made
from distft.distributed.world import World
from distft.errors import DataError, ModelError
from distft.evaluation.classify import parse
from distft.evaluation.likelihood import continuation_log_likelihoods, trained_log_likelihoods
from distft.evaluation.target import Target
from distft.evaluation.tasks.imdb import ImdbTask
from distft.runs.folder import RunFolder


def reference(model: Any, prefix: list[int], continuation: list[int]) -> float:
    """One forward of one row, and the sum over the continuation's tokens."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prefix, *continuation]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prefix) + step - 1, token]) for step, token in enumerate(continuation))


@pytest.mark.parametrize(
    "words", [["negative", "positive"], ["bad", "absolutely wonderful"], ["a", "b"], ["good", "good not"]]
)
def test_likelihoods_of_label_words_are_those_of_an_unbatched_reference(
    words: list[str], learned: RunFolder, load: Callable[..., Any]
) -> None:
    target = load(learned)
    texts = [row["text"] * (1 + number % 3) for number, row in enumerate(made(9))]  # lengths that differ
    prompts = [prompt_of(text, words, target.tokenizer, 128) for text in texts]
    if prompts[0].nested:
        prompts = [prompt.ended(target.tokenizer.eos_token_id) for prompt in prompts]
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


def test_of_nested_label_words_the_longer_one_can_win(tokenizer: Any, tmp_path: Path) -> None:
    """A small model that has learned `good` and `good not` is as accurate by likelihood as by generation."""
    words = ["good", "good not"]
    texts = [("so dull", 0), ("boring", 0), ("slow", 0), ("fun", 1), ("long", 1)]
    rows = [{"text": f"It was {text}.", "label": label} for text, label in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prompts = [prompt_of(row["text"], words, tokenizer, None) for row in rows]
    assert prompts[0].nested and not prompt_of("a", ["good", "not good"], tokenizer, None).nested
    for _ in range(20):
        for row, prompt in zip(rows, prompts, strict=True):
            answer = [*prompt.continuations[row["label"]], tokenizer.eos_token_id]
            ids = torch.tensor([[*prompt.prefix, *answer]])
            labels = ids.clone()
            labels[:, : len(prompt.prefix)] = -100
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    changes = {"model.name": tmp_path / "model", "model.dtype": "float32", "quantization": "null"} | {
        f"evaluation.imdb.{key}": value
        for key, value in {"path": tmp_path / "rows.jsonl", "label_words": "[good,good not]", "balanced": False}.items()
    }
    recipe = load_recipe(["recipe=tiny", *(f"{key}={value}" for key, value in changes.items())])
    found = ImdbTask().run(Target.load(recipe, None, World()), recipe.evaluation, tmp_path / "out")
    matrix = [[3, 0, 0], [0, 2, 0]]
    assert found["confusion"]["logprob"]["base"] == found["confusion"]["generation"]["base"] == matrix
    assert found["end_scored"] is True
    tight = recipe.evaluation.model_copy(
        update={"imdb": recipe.evaluation.imdb.model_copy(update={"max_new_tokens": 1})}
    )
    with pytest.raises(DataError, match=r"'good not' \(3 tokens\): longer than an answer may be"):
        ImdbTask().run(Target.load(recipe, None, World()), tight, tmp_path / "out")


def test_likelihoods_that_are_nan_are_an_error_and_no_class(target: Target) -> None:
    with target.side("base") as model:
        weight = model.get_input_embeddings().weight
        kept = weight[5].clone()
        weight[5] = torch.nan
        for words in ([[3], [4]], [[3, 6], [4]]):
            with pytest.raises(ModelError, match="NaN or infinite"):
                continuation_log_likelihoods(model, [[1, 5]], [words], 0, target.device)
        with pytest.raises(ModelError, match="NaN or infinite"):
            trained_log_likelihoods(model, [[1, 5, 6]], [[-100, -100, 6]], 0, target.device)
        weight[5] = kept


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
