"""Which columns of a row hold what, and the function that turns a row into text with a template.

The templates themselves are in `distft.data.templates`.
"""

from __future__ import annotations

import itertools
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from distft.config.recipe import Recipe
from distft.config.schema import Data, Format
from distft.data.files import Row
from distft.data.sources import KNOWN_DATASETS, Rows
from distft.data.templates import Dropped, Example, format_dolly, format_review
from distft.errors import DataError

RowFormatter = Callable[[Mapping[str, Any]], Example | Dropped]
"""Turns a row into an `Example`, or says why there is nothing to train on."""
_KINDS = {
    "text": {"text"},
    "prompt": {"prompt", "completion"},
    "dolly": {"instruction", "response"},
    "review": {"review", "label"},
}
"""The kinds of format, each with the columns that it requires; `dolly` takes an optional `context` as well."""
_COLUMNS = ("text", "prompt", "completion", "instruction", "context", "response", "review", "label")


def format_of(data: Data) -> Format | None:
    """The columns to read: the recipe's, merged over the known data set's if they are of the same kind."""
    if data.name not in KNOWN_DATASETS:
        return data.format
    known = KNOWN_DATASETS[data.name].format
    given = data.format.model_dump(exclude_none=True, exclude_defaults=True) if data.format else {}
    return known.model_copy(update=given) if given.keys() <= known.model_dump(exclude_none=True).keys() else data.format


def kind_of(form: Format) -> str:
    """The kind of format that the columns of `form` make up.

    Raises:
        DataError: they are not those of any kind.
    """
    given = {name for name in _COLUMNS if getattr(form, name)}
    for kind, required in _KINDS.items():
        if given - ({"context"} if kind == "dolly" else set()) == required:
            return kind
    raise DataError(
        "set text; or prompt and completion; or instruction, response and optionally context; or review and label "
        f"(got {', '.join(sorted(given)) or 'none'})"
    )


def check_columns(rows: Rows, data: Data) -> None:
    """Check that `rows` have the columns that the format of `data` names. The `context` of a known data set may be
    absent.

    Raises:
        DataError: a column is missing in one of the files, or the columns are a pair of preferences.
    """
    form, own = format_of(data), data.format
    assert form is not None
    optional = () if own is not None and own.context else ("context",)
    named = {field: column for field in _COLUMNS if field not in optional and (column := getattr(form, field))}
    for part in rows.parts:
        columns = part.columns(named.values())
        if not columns:
            continue  # an empty file beside others
        missing = {field: column for field, column in named.items() if column not in columns}
        if missing:
            hint = f"name yours: {' '.join(f'data.format.{field}=COLUMN' for field in missing)}"
            if len(columns) == 1 and (other := re.search(r"[;\t|]", columns[0])):
                hint = (
                    f"its cells seem to be separated by {other[0]!r}; write commas in a .csv file, tabs in a .tsv file"
                )
            raise DataError(
                f"the data ({part.name}) has no column {', '.join(missing.values())}; it has {', '.join(columns)}\n"
                f"  {hint}"
            )
        _check_preferences(part.name, named.values(), columns)


def _check_preferences(name: str, named: Iterable[str], columns: Collection[str]) -> None:
    """Refuse to train on the column `chosen` of data that also has `rejected` (likewise `chosen_response`, …)."""
    for column in named:
        for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
            if one in column and (ignored := column.replace(one, other)) in columns:
                raise DataError(
                    f"the data ({name}) has pairs of preferences, {column} and {ignored}, and distft trains on single "
                    f"answers: {ignored} would be ignored\n  to train on {column} alone, write a file without the "
                    f"column {ignored}"
                )


def format_rows(
    rows: Rows, recipe: Recipe, head: int | None = None, tokenizer: Any = None
) -> Iterator[tuple[Row, Example | Dropped]]:
    """Each row, or the first `head` of each file, with what `formatter` makes of it.

    Raises:
        DataError: a row does not fit the format; the message says which row, counted from 1.
    """
    apply = formatter(recipe, tokenizer)
    for part in rows.parts:
        for number, row in enumerate(itertools.islice(part, head), 1):
            try:
                example = apply(row)
            except DataError as error:
                raise DataError(f"{part.name}, row {number}: {error}") from None
            yield row, example


def formatter(recipe: Recipe, tokenizer: Any = None) -> RowFormatter:
    """The function that formats the rows of `recipe`. It can be sent to other processes.

    The `tokenizer` is what renders conversations; without one, they are only checked.

    The returned function raises DataError if a column does not hold text, or a label is not a class number.
    """
    form = format_of(recipe.data)
    assert form is not None
    return partial(_format, form, recipe.training.get("completion_only_loss"))


def _format(form: Format, completion_only: bool | None, row: Mapping[str, Any]) -> Example | Dropped:
    made = _FORMATTERS[kind_of(form)](form, completion_only, row)
    notes = tuple(blanks(row, form))
    return made._replace(notes=notes) if isinstance(made, Dropped) else replace(made, notes=notes)


_EMPTY = Dropped("an empty response")


def _format_text(form: Format, completion_only: bool | None, row: Mapping[str, Any]) -> Example | Dropped:
    text = _text(row, form.text)
    return Example.trained_from(text) if text.strip() else _EMPTY


def _format_prompt(form: Format, completion_only: bool | None, row: Mapping[str, Any]) -> Example | Dropped:
    prompt, completion = _text(row, form.prompt), _text(row, form.completion)
    if not completion.strip():
        return _EMPTY
    return Example.trained_from(prompt + completion, 0 if completion_only is False else len(prompt))


def _format_instruction(form: Format, completion_only: bool | None, row: Mapping[str, Any]) -> Example | Dropped:
    response = _text(row, form.response)
    if not response.strip():
        return _EMPTY
    instruction, context = _text(row, form.instruction), _text(row, form.context)
    return format_dolly(instruction, context, response, completion_only=bool(completion_only))


def _format_review(form: Format, completion_only: bool | None, row: Mapping[str, Any]) -> Example | Dropped:
    words, column = form.label_words, form.label or "label"
    label = class_number(row.get(column), len(words))
    if label is None:
        raise DataError(
            f"column {column!r} contains {row.get(column)!r}; expected a class number from 0 to {len(words) - 1} "
            "(data.format.label_words)"
        )
    return format_review(_text(row, form.review), words[label], completion_only=completion_only is not False)


def class_number(value: Any, classes: int) -> int | None:
    """The number of a class, written as a number or, as in a CSV file, as its digits; None if it is not one of
    0 … `classes` - 1."""
    number = int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value.strip()) else value
    return number if isinstance(number, int) and 0 <= number < classes else None


_FORMATTERS = {
    "text": _format_text,
    "prompt": _format_prompt,
    "dolly": _format_instruction,
    "review": _format_review,
}


def blanks(row: Mapping[str, Any], form: Format) -> Iterator[str]:
    """What `row` lacks in the columns of `form`: `null prompt`, `empty completion`. A context may be empty."""
    for field in _COLUMNS:
        column = getattr(form, field)
        if column is None or field == "label":
            continue
        value = row.get(column)
        if value is None and (field != "context" or column in row):
            yield f"null {field}"
        elif isinstance(value, str) and not value.strip() and field != "context":
            yield f"empty {field}"


def _text(row: Mapping[str, Any], column: str | None) -> str:
    """The text in `column`; "" for a null, a column that the row lacks, or no column."""
    value = row.get(column) if column else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"column {column!r} contains {type(value).__name__} values; expected text\n"
            f"  found {reprlib.repr(value)}; {_as_text(value)}"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"column {column!r} contains half of a surrogate pair, which is not a character") from None
    return value


def _as_text(value: Any) -> str:
    """How to turn `value` into text to train on."""
    if not isinstance(value, list | dict):
        return "write it in quotes, as it should be trained"
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict) and first.keys() & {"role", "from"}:
        return (
            "render such messages into a column of prompts and a column of completions, for example with the "
            "tokenizer's apply_chat_template, and name them: data.format.prompt, data.format.completion"
        )
    return "give each row one text"
