"""Classification of reviews by a causal model: by the likelihood of the label words, and by what it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from distft import hub
from distft.config.evaluation import Evaluation
from distft.config.recipe import Recipe
from distft.console import say
from distft.data import reviews
from distft.data.formats import format_of
from distft.distributed.collectives import together
from distft.errors import DataError
from distft.evaluation.classify import Classified, classify
from distft.evaluation.sets import DataOf
from distft.evaluation.target import Target
from distft.evaluation.tasks import InputFile, Task


class ImdbTask(Task):
    """Classify the reviews with both sides."""

    files = (InputFile("imdb.path", "reviews with classes", required=False),)
    packages: ClassVar = {"sklearn": "scikit-learn"}

    def data(self, recipe: Recipe) -> DataOf:
        source = reviews.source_of(recipe)
        return DataOf.held_out(recipe) if source is None else DataOf.at(source)

    def reads(self, recipe: Recipe) -> Mapping[str, Callable[[], object]]:
        key = "evaluation.imdb" if recipe.evaluation.imdb.path is None else "evaluation.imdb.path"
        return {key: lambda: _check_reviews(recipe)}

    def fetch(self, recipe: Recipe) -> list[str]:
        source = reviews.source_of(recipe)
        return [] if source is None else [hub.fetch_data(source)]

    def not_fetched(self, recipe: Recipe) -> list[str]:
        source = reviews.source_of(recipe)
        return [] if source is None else hub.missing_data(recipe, source)

    def run(self, target: Target, settings: Evaluation, folder: Path) -> dict[str, Any]:
        """Raises:
        DataError: the reviews cannot be loaded.
        """
        section, recipe, world = settings.imdb, target.recipe, target.world
        words = together(world, lambda: reviews.words_of(recipe))
        available = together(world, lambda: reviews.load(recipe, len(words)))
        rows = together(world, lambda: reviews.select(recipe, available, len(words)))
        if section.balanced and section.subset is None and len(rows) < len(available) and world.is_main:
            say(
                f"imdb: {len(rows)} of {len(available)} reviews, the same number of each class "
                "(evaluation.imdb.balanced=false takes all)"
            )
        max_length = section.max_length or recipe.training.get("max_length", 1024)
        prompts = [reviews.prompt_of(row.text, words, target.tokenizer, max_length) for row in rows]
        template = {"name": "review", "why": _why_reviews(target)}
        asked = Classified("imdb", section, words, rows, prompts, section.positive)
        return {"reviews": len(rows)} | classify(asked, target, settings, folder, template)


TASK = ImdbTask()


def _check_reviews(recipe: Recipe) -> None:
    words, positive = reviews.words_of(recipe), recipe.evaluation.imdb.positive
    if positive >= len(words):
        raise DataError(
            f"positive={positive} is not a class: the label words ({', '.join(words)}) are 0 to {len(words) - 1}"
        )
    reviews.select(recipe, reviews.load(recipe, len(words)), len(words))


def _why_reviews(target: Target) -> str:
    form = None if target.trained is None else format_of(target.trained.recipe.data)
    return "as in training" if form is not None and form.review else "the task's own"
