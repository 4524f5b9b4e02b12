"""Accuracy on the validation split's reviews while a run trains is that of the task `imdb` on the same reviews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from distft.config.recipe import load_recipe
from distft.data import reviews
from distft.data.labelled import prompts_of, read_labelled
from distft.data.prepare import prepare_data
from distft.errors import DataError
from distft.evaluation.likelihood import continuation_log_likelihoods
from distft.models.loading import load_tokenizer
from distft.training.checks import training_faults
from distft.training.reviews import ValidationReviews

from .test_packing import PACKED, PADDED, RECIPE, trainer_of

WORDS = (
    *("data.name=tiny_sentiment", "data.validation_fraction=0.5", "training.metric_for_best_model=imdb_accuracy"),
    *("evaluation.max_samples=15", "evaluation.imdb.balanced=false"),
)


@pytest.mark.parametrize("way", [PADDED, PACKED], ids=["padded", "packed"])
def test_the_metrics_are_those_of_the_task(way: tuple[str, ...], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, *WORDS, *way)
    recipe = load_recipe([*RECIPE, *WORDS, *way])
    tokenizer = load_tokenizer(recipe)
    found = ValidationReviews.of(recipe, tokenizer)
    assert found is not None
    rows = reviews.load_validation(recipe, 2)
    assert len(rows) == 15 and len(found.samples) == 30
    prompts = [reviews.prompt_of(row.text, ["negative", "positive"], tokenizer, 256) for row in rows]
    trainer.model.eval()
    expected = continuation_log_likelihoods(
        trainer.model,
        [prompt.prefix for prompt in prompts],
        [prompt.continuations for prompt in prompts],
        tokenizer.pad_token_id,
        trainer.args.device,
    )
    assert trainer.log_likelihoods(found.samples) == pytest.approx(np.array(expected).flatten().tolist(), rel=1e-4)
    trainer._reviews = found
    metrics = trainer.evaluate()
    labels, predicted = [row.label for row in rows], np.array(expected).argmax(1)
    assert metrics["eval_imdb_accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert metrics["eval_imdb_macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert "test_imdb_accuracy" not in trainer.evaluate(metric_key_prefix="test")


def test_texts_of_a_file_are_classified_as_by_the_task(tmp_path: Path) -> None:
    question = "Is this review positive or negative?\\n\\n{text}"
    words = (
        *("training.metric_for_best_model=classification_accuracy", "evaluation.max_samples=12"),
        *("evaluation.classification.validation=tiny_languages_test", f'evaluation.classification.prompt="{question}"'),
    )
    trainer = trainer_of(tmp_path, *PADDED, *words)
    recipe = load_recipe([*RECIPE, *PADDED, *words])
    tokenizer = load_tokenizer(recipe)
    found = ValidationReviews.of(recipe, tokenizer)
    assert found is not None and len(found.samples) == 24
    labels, rows, _ = read_labelled(recipe.evaluation, "validation")
    prompts = prompts_of(rows[:12], labels, recipe.evaluation.classification.prompt, tokenizer, 256, "instruction")
    assert "### Instruction:\nIs this review" in tokenizer.decode(prompts[0].prefix)
    trainer.model.eval()
    expected = continuation_log_likelihoods(
        trainer.model,
        [prompt.prefix for prompt in prompts],
        [prompt.continuations for prompt in prompts],
        tokenizer.pad_token_id,
        trainer.args.device,
    )
    trainer._reviews = found
    metrics, predicted = trainer.evaluate(), np.array(expected).argmax(1)
    classes = [row.label for row in rows[:12]]
    assert metrics["eval_classification_accuracy"] == pytest.approx(accuracy_score(classes, predicted))
    assert metrics["eval_classification_macro_f1"] == pytest.approx(f1_score(classes, predicted, average="macro"))
    assert "eval_imdb_accuracy" not in metrics


def test_what_decides_is_not_what_is_measured() -> None:
    words = ["recipe=tiny", "training.metric_for_best_model=classification_macro_f1"]

    def problems(*more: str) -> list[str]:
        recipe = load_recipe([*words, "training.load_best_model_at_end=true", *more])
        return [str(fault) for fault in training_faults(recipe, on_gpu=False)]

    (line,) = problems()
    assert "which names no file" in line and "evaluation.classification.validation=FILE" in line
    validation = "evaluation.classification.validation=tiny_languages_test"
    assert problems(validation) == []
    (line,) = problems(validation, "evaluation.classification.path=tiny_languages_test")
    assert "would decide by evaluation.classification.path" in line


def test_the_reviews_are_those_of_the_validation_split(tokenizer: Any) -> None:
    recipe = load_recipe([*RECIPE, *WORDS, "evaluation.max_samples=null"])
    validation = prepare_data(recipe, tokenizer).validation
    assert validation is not None
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in validation["input_ids"]]
    rows = reviews.load_validation(recipe, 2)
    assert len(rows) == len(texts) == 20
    assert all(row.text in text for row, text in zip(rows, texts, strict=True))


def test_a_recipe_that_does_not_ask_classifies_nothing(tokenizer: object) -> None:
    assert ValidationReviews.of(load_recipe([*RECIPE, "data.name=tiny_sentiment"]), tokenizer) is None


def test_a_class_that_is_none_is_refused(tokenizer: object) -> None:
    with pytest.raises(DataError, match=r"evaluation\.imdb\.positive=2 is not a class"):
        ValidationReviews.of(load_recipe([*RECIPE, *WORDS, "evaluation.imdb.positive=2"]), tokenizer)
