"""How many of the evaluated items the model was trained on."""

from __future__ import annotations

import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

from distft.config.recipe import Recipe
from distft.data.conversations import conversation
from distft.data.files import Row
from distft.data.formats import format_of, format_rows
from distft.data.inference import with_format
from distft.data.prepare import prepare_data
from distft.data.sources import Rows, read_data
from distft.data.splits import first_samples, split_members
from distft.data.templates import Example
from distft.distributed.collectives import broadcast, together
from distft.errors import DataError
from distft.evaluation.target import Target

Overlap = dict[str, Any]
"""`count` of `items` that were trained on; None if that is not known, and `why`."""
_CHANGED = "the data of the training have changed since"
_GONE = "the data of the training are not here any more"
_MIXED = "the training mixed or deduplicated its data; held_out_overlap in summary.json counts its held-out rows"
_STREAMED = "the training streamed its data, which are not kept"
_UNKNOWN = "the training is not known"


def overlap(target: Target, texts: Sequence[str] | None = None) -> Overlap | None:
    """How many of `texts` are trained texts or inputs of them (prompts, instructions, reviews); None if nothing was
    trained. Without `texts`, those of the recipe's held-out split count, as evaluated. All ranks call this."""
    if target.result is None:
        return None
    found = together(target.world, lambda: _count(target, texts) if target.world.is_main else {})
    return broadcast(found, target.world)


def _count(target: Target, texts: Sequence[str] | None) -> Overlap:
    if texts is None and (why := _not_counted(target.recipe)):
        samples = first_samples(target.held_out(), target.recipe.evaluation.max_samples)
        return {"count": None, "items": len(samples or ()), "why": why}
    if texts is None:
        found = ((place, example.text) for place, _, example in _split(target.recipe, target.tokenizer, "test"))
        texts = [text for _, text in sorted(found)][: target.recipe.evaluation.max_samples]
    if target.trained is None:
        return {"count": None, "items": len(texts), "why": _UNKNOWN}
    if why := _not_counted(target.trained.recipe):
        return {"count": None, "items": len(texts), "why": why}
    recipe, digest = target.trained.recipe, target.trained.data_digest
    try:
        if digest not in (None, prepare_data(recipe, target.tokenizer).report.digest):
            return {"count": None, "items": len(texts), "why": _CHANGED}
        known = _trained_texts(recipe, target.tokenizer)
    except DataError:
        return {"count": None, "items": len(texts), "why": _GONE}
    return {"count": int(np.isin(np.array(list(map(_hash, texts)), np.uint64), known).sum()), "items": len(texts)}


def _not_counted(recipe: Recipe) -> str | None:
    """Why the texts of a training are not looked at; None if they are."""
    if recipe.data.streaming:
        return _STREAMED
    return _MIXED if recipe.data.sources is not None or recipe.data.deduplicate else None


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.strip().encode())


def _trained_texts(recipe: Recipe, tokenizer: Any) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Hashes of what the model was trained on."""
    form = format_of(recipe.data)
    assert form is not None
    inputs = [column for column in (form.prompt, form.review) if column]
    found = array.array("Q")
    for _, row, example in _split(recipe, tokenizer, "train"):
        texts = [example.text, *(str(row[column]) for column in inputs)]
        if form.messages:
            texts += [str(each["content"]) for each in conversation(row[form.messages], form.messages).messages]
        # With a context, the instruction alone is not what was trained on.
        elif form.instruction and not (form.context and str(row.get(form.context) or "").strip()):
            texts.append(str(row[form.instruction]))
        found.extend(_hash(text) for text in texts if text.strip())
    return np.array(found)


def _split(recipe: Recipe, tokenizer: Any, split: str) -> Iterator[tuple[int, Row, Example]]:
    """The examples of a split with their rows, in the order of the source, each with its place in the split.

    Raises:
        DataError: the data cannot be read.
    """
    recipe, _ = with_format(recipe, tokenizer)
    rows, *official = read_data(recipe.data)

    def examples(rows: Rows) -> Iterator[tuple[Row, Example]]:
        for row, example in format_rows(rows, recipe, tokenizer=tokenizer):
            if isinstance(example, Example):
                yield row, example

    if official and split == "test":
        yield from ((place, *found) for place, found in enumerate(examples(official[0])))
        return
    number = sum(1 for _ in examples(rows))
    members = split_members(number, recipe.data, recipe.run.seed, with_test=not official)[split]
    places = np.full(number, -1)
    places[members] = np.arange(len(members))
    yield from ((place, *found) for place, found in zip(places.tolist(), examples(rows), strict=True) if place >= 0)
