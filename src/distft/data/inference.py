"""Infer the format of the data from the columns and values of its first rows, if the recipe does not name one.

A format is inferred only if exactly one fits. It is printed, and `data.format` overrides it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distft.config.recipe import Recipe
from distft.config.schema import Data, Format
from distft.data.conversations import has_messages
from distft.data.formats import format_of
from distft.data.named_templates import OWN
from distft.data.pairs import is_answer, is_truth
from distft.data.sources import read_data
from distft.errors import DataError
from distft.text import shorten

_ROWS = 20
"""Rows that are looked at."""
_CONVERSATIONS = ("messages", "conversations", "conversation")
_PROMPTS = ("prompt", "question", "instruction", *_CONVERSATIONS)
"""Columns that may hold the prompt of a chosen and a rejected answer."""
_RESPONSES, _CONTEXTS = ("output", "response"), ("input", "context")
_HINT = (
    "say which columns to read: data.format.messages=COLUMN for conversations; data.format.text=COLUMN; "
    "data.format.prompt=COLUMN data.format.completion=COLUMN; or data.format.instruction=COLUMN "
    "data.format.response=COLUMN"
)


class Inferred(NamedTuple):
    """A format, and a sentence on it for the user."""

    form: Format
    what: str


def with_format(recipe: Recipe, tokenizer: Any = None) -> tuple[Recipe, str | None]:
    """The recipe with the format of its data, and what was inferred for that; None if the recipe names it.

    Instructions become conversations if the tokenizer has a chat template, as its model expects them.

    Raises:
        DataError: the data cannot be read, or no format or several fit their columns.
    """
    data = recipe.data
    if format_of(data) is not None:
        return recipe, None
    form, what = infer(data, rated=recipe.rates)
    if recipe.rates and form.chosen is not None:
        raise DataError(
            "preference.loss_type needs answers with a label, and the data have pairs of preferences, "
            f"{form.chosen} and {form.rejected}\n  set preference.loss_type=sigmoid, or write each answer into a row"
        )
    if recipe.pairs and form.chosen is None:
        raise DataError(
            f"objective=dpo needs pairs of answers, and the data are {what.split('; ')[0].removeprefix('read as ')}\n"
            "  name the columns: data.format.chosen=COLUMN data.format.rejected=COLUMN, and data.format.prompt=COLUMN "
            "if there is one; or set objective=sft"
        )
    if form.chosen is not None and not recipe.prefers:
        raise DataError(
            f"the data have pairs of preferences, {form.chosen} and {form.rejected}, and objective=sft trains on "
            "single answers\n  set objective=dpo (recipe=dpo has it); to train on chosen alone, write a file without "
            "the column rejected"
        )
    changes: dict[str, Any] = {"format": form}
    if form.instruction and data.chat_template is None:
        if tokenizer is not None and tokenizer.chat_template:
            changes["chat_template"] = OWN
            what += ", as conversations through the tokenizer's chat template"
        else:
            what += ", through Dolly's template"
    return recipe.model_copy(update={"data": data.model_copy(update=changes)}), what


def infer(data: Data, *, rated: bool = False) -> Inferred:
    """The format of the rows that `data` names; `rated`, of answers with a label.

    Raises:
        DataError: they cannot be read, or no format or several fit their columns.
    """
    source = read_data(data)[0]
    rows = list(itertools.islice(source, _ROWS))
    if not rows:
        raise DataError(f"{source.name} is empty")
    try:
        return format_of_rows(rows, rated=rated)
    except DataError as error:
        raise DataError(f"the data ({source.name}) {error}") from None


def format_of_rows(rows: Sequence[Mapping[str, Any]], *, rated: bool = False) -> Inferred:
    """The format of these rows; `rated`, of answers with a label.

    Raises:
        DataError: none or several fit; the message follows the name of the data.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    first = {column: _first(rows, column) for column in columns}
    if not rated:
        _refuse_marked_answers(first)
    found = _pairs(first) or (_rated(first) if rated else _candidates(first))
    if len(found) > 1:
        kinds = "; or ".join(what for _, what in found)
        raise DataError(f"can be read in several ways: {kinds}. The columns are {', '.join(columns)}\n  {_HINT}")
    if not found:
        raise DataError(f"have no columns that say what to train on; they have {', '.join(columns)}\n  {_HINT}")
    form, what = found[0]
    read = set(form.model_dump(exclude_none=True, exclude={"label_words"}).values())
    others = [column for column in columns if column not in read]
    rest = f" (not read: {shorten(others, 5)})" if others else ""
    return Inferred(form, f"read as {what}{rest}; data.format overrides this")


def _candidates(first: Mapping[str, Any]) -> list[Inferred]:
    """The formats that fit. Whole texts beside a structured format are taken for a rendering of it."""
    found = [
        Inferred(_conversations(first, column), f"conversations in {column}")
        for column, value in first.items()
        if column not in ("prompt", "completion") and has_messages(value)
    ]
    if len(found) > 1 and (known := [one for one in found if one.form.messages in _CONVERSATIONS]):
        found = known
    if "prompt" in first and "completion" in first:
        as_messages = has_messages(first["prompt"]) and has_messages(first["completion"])
        if as_messages or (isinstance(first["prompt"], str) and isinstance(first["completion"], str)):
            tools = "tools" if as_messages and "tools" in first else None
            what = "prompts and completions" + (" that are messages" if as_messages else "")
            found.append(Inferred(Format(prompt="prompt", completion="completion", tools=tools), what))
    for response in (name for name in _RESPONSES if "instruction" in first and _is_text(first.get(name))):
        context = next((name for name in _CONTEXTS if isinstance(first.get(name, 0), str | None)), None)
        system = "system" if isinstance(first.get("system"), str) else None
        form = Format(instruction="instruction", context=context, response=response, system=system)
        what = ", ".join(["instruction", *([context] if context else []), response])
        found.append(Inferred(form, f"instructions in {what}"))
    if not found and _is_text(first.get("text")):
        found.append(Inferred(Format(text="text"), "whole texts in text"))
        if "label" in first:
            found.append(Inferred(Format(review="text", label="label"), "texts with a class number in label"))
    return found


def _conversations(first: Mapping[str, Any], column: str) -> Format:
    system = "system" if isinstance(first.get("system"), str) else None
    return Format(messages=column, tools="tools" if "tools" in first else None, system=system)


def _pairs(first: Mapping[str, Any]) -> list[Inferred]:
    """The format of a chosen and a rejected answer, if there are such columns."""
    if not ("chosen" in first and "rejected" in first):
        return []
    if not (is_answer(first["chosen"]) and is_answer(first["rejected"])):
        raise DataError(
            "have the columns chosen and rejected, which hold neither texts nor messages\n  write each answer as a "
            "text, as a message with role and content, or as a list of messages"
        )
    prompts = [name for name in _PROMPTS if is_answer(first.get(name))]
    if prompts[:1] == ["instruction"] and any(first.get(name) for name in _CONTEXTS):
        raise DataError(
            "have pairs of preferences whose prompts are in two columns, instruction and its context\n  write both "
            "into one column, prompt"
        )
    system = "system" if isinstance(first.get("system"), str) else None
    tools = "tools" if "tools" in first and not _is_text(first["chosen"]) else None
    prompt = prompts[0] if prompts else None
    form = Format(prompt=prompt, chosen="chosen", rejected="rejected", tools=tools, system=system)
    asked = f"with their prompt in {prompt}" if prompt else "without a column of prompts: what both begin with"
    return [Inferred(form, f"pairs of preferences, chosen and rejected, {asked}")]


def _rated(first: Mapping[str, Any]) -> list[Inferred]:
    """The formats of answers with a label that fit."""
    if not is_truth(first.get("label")):
        raise DataError(
            "have no column label that says of each answer, with true or false, whether it is good\n  name yours with "
            "data.format.label=COLUMN, and the answers with data.format.messages=COLUMN, or data.format.prompt=COLUMN "
            "data.format.completion=COLUMN"
        )
    return [
        Inferred(form.model_copy(update={"label": "label"}), f"{what}, with a label")
        for form, what in _candidates(first)
        if form.messages or form.completion
    ]


def _refuse_marked_answers(first: Mapping[str, Any]) -> None:
    answers = any(has_messages(value) or column == "completion" for column, value in first.items())
    if answers and isinstance(first.get("label"), bool):
        raise DataError(
            "mark answers as good or bad in the column label\n  to train on the labels, set objective=dpo "
            "preference.loss_type=kto (recipe=kto has it); to train on all answers, name the columns: "
            "data.format.messages=COLUMN, or data.format.prompt=COLUMN data.format.completion=COLUMN"
        )


def _first(rows: Sequence[Mapping[str, Any]], column: str) -> Any:
    """The first value in a column that is not null or empty; None if there is none."""
    values = [value for row in rows if (value := row.get(column)) is not None]
    return next((value for value in values if value not in ("", [])), values[0] if values else None)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
