"""The reviews to classify: which rows, how they become prompts, and the label words that may follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from distft.config.recipe import Recipe
from distft.data.formats import class_number, format_of, formatter
from distft.data.labelled import Prompt, Review, continued, subset
from distft.data.sources import KNOWN_DATASETS, HubSplit, read_data, read_source
from distft.data.splits import split_rows
from distft.data.templates import Example, format_review
from distft.errors import DataError


def words_of(recipe: Recipe) -> list[str]:
    """The label word of each class number.

    Raises:
        DataError: they are not two or more different words.
    """
    form = format_of(recipe.data)
    known = form if form is not None and form.review else KNOWN_DATASETS["imdb"].format
    words = recipe.evaluation.imdb.label_words or known.label_words
    if len({word.strip().lower() for word in words}) < max(len(words), 2):
        raise DataError(f"the label words {words} are not two or more different words; set evaluation.imdb.label_words")
    return words


def source_of(recipe: Recipe) -> Path | HubSplit | None:
    """Where the reviews come from; None if they are the recipe's own held-out rows."""
    settings, form = recipe.evaluation.imdb, format_of(recipe.data)
    if settings.path is not None:
        return Path(settings.path).expanduser()
    if form is not None and form.review:
        return None
    return HubSplit(KNOWN_DATASETS["imdb"].hub or "", None, settings.split)


def load(recipe: Recipe, classes: int) -> list[Review]:
    """The rows to classify, in the order of their source.

    They come from the file that the settings name; without one, from the recipe's held-out rows if its data are
    reviews, and otherwise from IMDB's split on the hub.

    Raises:
        DataError: they cannot be loaded, or are not reviews with classes below `classes`.
    """
    settings, source = recipe.evaluation.imdb, source_of(recipe)
    if source is None:
        return _of_split(recipe, "test", classes)
    where = source.name if isinstance(source, HubSplit) else str(settings.path)
    return _checked(recipe, list(read_source(source)), where, settings.text, settings.label, classes)


def load_validation(recipe: Recipe, classes: int) -> list[Review]:
    """The validation split of a recipe whose data are reviews, drawn as the settings say for the test split, and at
    most `evaluation.max_samples` of it.

    Raises:
        DataError: it cannot be loaded, has other classes, or nothing of it is left.
    """
    settings, found = recipe.evaluation.imdb, _of_split(recipe, "validation", classes)
    sizes = [size for size in (recipe.evaluation.max_samples, settings.subset) if size is not None]
    rows = subset(found, min(sizes, default=None), settings.balanced, recipe.evaluation.seed, classes)
    return _some(rows)


def _of_split(recipe: Recipe, split: Literal["validation", "test"], classes: int) -> list[Review]:
    """The rows of the prepared split of a recipe whose data are reviews."""
    form = format_of(recipe.data)
    assert form is not None and form.review is not None
    raw, *official = read_data(recipe.data)
    whole, apply = bool(official) and split == "test", formatter(recipe)
    rows: list[Mapping[str, Any]] = [row for row in (official[0] if whole else raw) if isinstance(apply(row), Example)]
    if not whole:
        rows = split_rows(rows, recipe.data, recipe.run.seed, with_test=not official)[split]
    where = f"the {'held-out' if split == 'test' else split} rows of {recipe.data.name or raw.name}"
    return _checked(recipe, rows, where, form.review, form.label or recipe.evaluation.imdb.label, classes)


def _checked(
    recipe: Recipe, rows: Sequence[Mapping[str, Any]], where: str, text: str, label: str, classes: int
) -> list[Review]:
    """`rows` as reviews."""
    if rows and (missing := [column for column in (text, label) if column not in rows[0]]):
        raise DataError(
            f"{where} has no column {', '.join(missing)}; it has {', '.join(rows[0])}\n"
            "  name yours: evaluation.imdb.text=COLUMN evaluation.imdb.label=COLUMN"
        )
    found = []
    for number, row in enumerate(rows):
        if not isinstance(row.get(text), str):
            raise DataError(f"row {number} of {where} has no text in column {text}: {str(row)[:200]}")
        number_of_class = class_number(row.get(label), classes)
        if number_of_class is None:
            words = ", ".join(f"{number} for {word!r}" for number, word in enumerate(words_of(recipe)))
            raise DataError(
                f"row {number} of {where} has {str(row.get(label))[:40]!r} in column {label}, which must hold class "
                f"numbers: {words}\n  for other classes: evaluation.imdb.label_words=[WORD,WORD]"
            )
        found.append(Review(number, row[text], number_of_class))
    return found


def select(recipe: Recipe, found: Sequence[Review], classes: int) -> list[Review]:
    """The subset of the loaded rows that the settings ask for.

    Raises:
        DataError: it is empty.
    """
    settings = recipe.evaluation.imdb
    return _some(subset(found, settings.subset, settings.balanced, recipe.evaluation.seed, classes))


def _some(rows: list[Review]) -> list[Review]:
    if not rows:
        raise DataError("no reviews are left to classify; a class may have no rows (evaluation.imdb.balanced=false)")
    return rows


def prompt_of(review: str, words: Sequence[str], tokenizer: Any, max_length: int | None) -> Prompt:
    """The review in IMDB's template before each word. Reviews are truncated at their end."""
    example = format_review(review, "", completion_only=True)
    return continued(example.text, example.tail_from or 0, words, tokenizer, max_length)
