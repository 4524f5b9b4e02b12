"""Classification while a run trains: of the validation split's reviews for `metric_for_best_model: imdb_accuracy`, and
of the texts in `evaluation.classification.validation` for `classification_accuracy`.

Every review is a sample with each label word after it, and the word is scored as trained tokens are. So it takes the
way of the evaluation loss, which is exact under every strategy, and needs neither generation nor a key-value cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from distft.config.evaluation import Labels
from distft.config.recipe import Recipe
from distft.data.labelled import Prompt, Review, prompts_of, read_labelled
from distft.data.prompts import template_of, trained_template
from distft.data.reviews import load_validation, prompt_of, words_of
from distft.data.tokenize import IGNORED
from distft.errors import DataError
from distft.stats import metrics_of_matrices
from distft.training.selection import CLASSES, HIGHER_IS_BETTER, IMDB, metric_of, scores_reviews


@dataclass(frozen=True)
class ValidationReviews:
    """Reviews with their classes, [reviews], and the samples to score, [reviews × label words]."""

    samples: Dataset
    classes: NDArray[np.int64]
    words: int
    positive: int
    prefix: str = IMDB
    """The beginning of its metrics."""

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: Any) -> ValidationReviews | None:
        """Those that the recipe's metric needs: prompts, words and truncation are those of the task.

        Raises:
            DataError: the reviews cannot be loaded, or the settings of the task do not fit them.
        """
        if not scores_reviews(recipe):
            return None
        return (
            cls._of_texts(recipe, tokenizer) if metric_of(recipe).startswith(CLASSES) else cls._imdb(recipe, tokenizer)
        )

    @classmethod
    def _imdb(cls, recipe: Recipe, tokenizer: Any) -> ValidationReviews:
        words, section = words_of(recipe), recipe.evaluation.imdb
        if section.positive >= len(words):
            raise DataError(f"evaluation.imdb.positive={section.positive} is not a class: there are {len(words)}")
        rows = load_validation(recipe, len(words))
        prompts = [prompt_of(row.text, words, tokenizer, _longest(recipe, section)) for row in rows]
        return cls._scored(prompts, rows, words, section.positive, IMDB, tokenizer)

    @classmethod
    def _of_texts(cls, recipe: Recipe, tokenizer: Any) -> ValidationReviews:
        words, rows, positive = read_labelled(recipe.evaluation, "validation")
        rows, section = rows[: recipe.evaluation.max_samples], recipe.evaluation.classification
        wanted = recipe.evaluation.generation.template
        template = wanted if wanted != "auto" else trained_template(recipe, tokenizer)
        template = template or template_of(tokenizer, "instruction")
        prompts = prompts_of(rows, words, section.prompt, tokenizer, _longest(recipe, section), template)
        return cls._scored(prompts, rows, words, positive or 0, CLASSES, tokenizer)

    @classmethod
    def _scored(
        cls,
        prompts: list[Prompt],
        rows: Sequence[Review],
        words: Sequence[str],
        positive: int,
        prefix: str,
        tokenizer: Any,
    ) -> ValidationReviews:
        if any(prompt.nested for prompt in prompts):
            prompts = [prompt.ended(tokenizer.eos_token_id) for prompt in prompts]
        pairs = [(prompt.prefix, word) for prompt in prompts for word in prompt.continuations]
        samples = Dataset.from_dict(
            {
                "input_ids": [[*prefix, *word] for prefix, word in pairs],
                "labels": [[*([IGNORED] * len(prefix)), *word] for prefix, word in pairs],
            }
        )
        return cls(samples, np.array([row.label for row in rows]), len(words), positive, prefix)

    def metrics(self, log_likelihoods: Sequence[float]) -> dict[str, float]:
        """The metrics by their keys in metrics.jsonl, from the log-likelihood of each sample's label word."""
        keys = [key for key in HIGHER_IS_BETTER if key.startswith(self.prefix)]
        if not all(map(math.isfinite, log_likelihoods)):
            return dict.fromkeys(keys, math.nan)
        likeliest = np.array(log_likelihoods).reshape(-1, self.words).argmax(1)
        matrix = np.zeros((1, self.words, self.words + 1))
        np.add.at(matrix[0], (self.classes, likeliest), 1)
        found = metrics_of_matrices(matrix, self.positive)
        return {key: float(found[key.removeprefix(self.prefix)][0]) for key in keys}


def _longest(recipe: Recipe, section: Labels) -> int | None:
    """Tokens of the longest prompt with its label word."""
    found: int | None = section.max_length or recipe.training.get("max_length", 1024)
    return found
