"""Texts to measure a model on that was trained on pairs of answers: those held out of the fine-tune that it began with.

Whether alignment has cost knowledge shows on what was learned before, on the same rows for all three models.
"""

from __future__ import annotations

from pathlib import Path

from distft.config.adapter import run_of
from distft.config.recipe import Recipe, load_recipe
from distft.errors import RecipeError

_OF_SAMPLES = ("max_length", "completion_only_loss")
"""Keys of `training` that decide what of a text counts."""


def with_texts(recipe: Recipe) -> Recipe:
    """`recipe`, if it is about pairs, with the data and the splits of the fine-tune that it started from in their
    place; as it is if that is not known."""
    texts = _fine_tune(recipe) if recipe.prefers else None
    if texts is None:
        return recipe
    training = {key: value for key, value in recipe.training.items() if key not in _OF_SAMPLES}
    training |= {key: texts.training[key] for key in _OF_SAMPLES if key in texts.training}
    run = recipe.run.model_copy(update={"seed": texts.run.seed})
    changes = {"objective": "sft", "preference": None, "data": texts.data, "training": training, "run": run}
    return recipe.model_copy(update=changes)


def _fine_tune(recipe: Recipe) -> Recipe | None:
    """The recipe of the last run before this one that was trained on texts."""
    while recipe.prefers:
        run = None if recipe.adapter is None else run_of(Path(recipe.adapter))
        if run is None:
            return None
        try:
            recipe = load_recipe([f"recipe={run}"])
        except RecipeError:
            return None
    return recipe
