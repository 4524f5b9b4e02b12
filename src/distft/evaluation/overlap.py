"""How many of the evaluated items the model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distft.config.recipe import Recipe
from distft.data.conversations import conversation
from distft.data.files import Row
from distft.data.formats import format_of, format_rows
from distft.data.inference import with_format
from distft.data.prepare import split_rows, texts_digest
from distft.data.sources import data_sources, read_source
from distft.data.templates import Example
from distft.distributed.collectives import broadcast, together
from distft.errors import DataError
from distft.evaluation.target import Target

Overlap = dict[str, Any]
"""`count` of `items` that were trained on; None if that is not known, and `why`."""
_CHANGED = "the data of the training have changed since"
_GONE = "the data of the training are not here any more"
_UNKNOWN = "the training is not known"


def overlap(target: Target, texts: Sequence[str] | None = None) -> Overlap | None:
    """How many of `texts` are trained texts or inputs of them (prompts, instructions, reviews); None if nothing was
    trained. Without `texts`, those of the recipe's held-out split count, as evaluated. All ranks call this."""
    if target.result is None:
        return None
    found = together(target.world, lambda: _count(target, texts) if target.world.is_main else {})
    return broadcast(found, target.world)


def _count(target: Target, texts: Sequence[str] | None) -> Overlap:
    if texts is None:
        limit = target.recipe.evaluation.max_samples
        texts = [example.text for _, example in _splits(target.recipe, target.tokenizer)["test"][:limit]]
    if target.trained is None:
        return {"count": None, "items": len(texts), "why": _UNKNOWN}
    try:
        train = _splits(target.trained.recipe, target.tokenizer)["train"]
    except DataError:
        return {"count": None, "items": len(texts), "why": _GONE}
    if target.trained.data_digest not in (None, texts_digest(example for _, example in train)):
        return {"count": None, "items": len(texts), "why": _CHANGED}
    known = _trained_texts(target.trained.recipe, train)
    return {"count": sum(text.strip() in known for text in texts), "items": len(texts)}


def _trained_texts(recipe: Recipe, train: Sequence[tuple[Row, Example]]) -> set[str]:
    form = format_of(recipe.data)
    assert form is not None
    inputs = [column for column in (form.prompt, form.review) if column]
    found = {example.text.strip() for _, example in train}
    if form.messages:
        said = (message for row, _ in train for message in conversation(row[form.messages], form.messages).messages)
        return found | {str(message["content"]).strip() for message in said} - {""}
    found |= {str(row[column]).strip() for row, _ in train for column in inputs}
    if form.instruction:  # with a context, the instruction alone is not what was trained on
        alone = (row for row, _ in train if not (form.context and str(row.get(form.context) or "").strip()))
        found |= {str(row[form.instruction]).strip() for row in alone}
    return found - {""}


def _splits(recipe: Recipe, tokenizer: Any) -> dict[str, list[tuple[Row, Example]]]:
    """The rows of each split with their examples, without those that have nothing to train on.

    Raises:
        DataError: the data cannot be read.
    """
    recipe, _ = with_format(recipe, tokenizer)
    kept = [
        [
            (row, example)
            for row, example in format_rows(read_source(source), recipe, tokenizer=tokenizer)
            if isinstance(example, Example)
        ]
        for source in data_sources(recipe.data)
    ]
    parts: dict[str, list[tuple[Row, Example]]] = split_rows(
        kept[0], recipe.data, recipe.run.seed, with_test=len(kept) == 1
    )
    return parts if len(kept) == 1 else parts | {"test": kept[1]}
