"""Which columns of a row hold what, and the function that turns a row into text with a template.

The templates themselves are in `distft.data.templates`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distft.config.recipe import Recipe
from distft.config.schema import Data, Format
from distft.data.sources import KNOWN_DATASETS, local_source
from distft.data.templates import Example, format_dolly, format_review
from distft.errors import DataError, Fault

RowFormatter = Callable[[Mapping[str, Any]], Example | None]
"""Turns a row into an `Example`, or into None if there is nothing to train on."""
_KINDS = {
    "text": {"text"},
    "prompt": {"prompt", "completion"},
    "dolly": {"instruction", "response"},
    "review": {"review", "label"},
}
"""The kinds of format, each with the columns that it requires; `dolly` takes an optional `context` as well."""
_COLUMNS = ("text", "prompt", "completion", "instruction", "context", "response", "review", "label")


def data_faults(recipe: Recipe) -> list[Fault]:
    """Find the mistakes in the data section that are visible without reading any data."""
    data, found = recipe.data, []

    def fault(key: str, *texts: str) -> None:
        found.append(Fault(recipe.source.of(key), key, *texts))

    if data.name not in KNOWN_DATASETS and data.format is None:
        file = local_source(data)
        if file is not None and not file.exists():
            fault("data.name", f"there is no file or folder {file}")
        else:
            found.append(
                Fault(
                    recipe.source.of("data.name"),
                    "data.format",
                    f"is required for {data.name!r}, which is not one of {', '.join(KNOWN_DATASETS)}",
                    "data.format.text=COLUMN, or data.format.prompt=COLUMN data.format.completion=COLUMN",
                )
            )
    form = format_of(data)
    if form is not None:
        try:
            kind = _kind(form)
        except DataError as error:
            fault("data.format", str(error))
            return found
        if kind == "text" and recipe.training.get("completion_only_loss"):
            fault(
                "training.completion_only_loss",
                "needs a completion, and data.format.text names whole texts",
                "set data.format.prompt and data.format.completion",
            )
    if data.validation_fraction + data.test_fraction >= 1:
        fault("data", "validation_fraction and test_fraction leave nothing to train on")
    return found


def format_of(data: Data) -> Format | None:
    """The columns to read: the recipe's, merged over the known data set's if they are of the same kind."""
    if data.name not in KNOWN_DATASETS:
        return data.format
    known = KNOWN_DATASETS[data.name].format
    given = data.format.model_dump(exclude_none=True, exclude_defaults=True) if data.format else {}
    return known.model_copy(update=given) if given.keys() <= known.model_dump(exclude_none=True).keys() else data.format


def _kind(form: Format) -> str:
    given = {name for name in _COLUMNS if getattr(form, name)}
    for kind, required in _KINDS.items():
        if given - ({"context"} if kind == "dolly" else set()) == required:
            return kind
    raise DataError(
        "set text; or prompt and completion; or instruction, response and optionally context; or review and label "
        f"(got {', '.join(sorted(given)) or 'none'})"
    )


def check_columns(column_names: list[str], data: Data, where: str) -> None:
    """Check that the rows of `where` (a name for the message) have every column that the format of `data` requires.

    Raises:
        DataError: a column is missing.
    """
    form = format_of(data)
    assert form is not None
    missing = {
        field: column
        for field in _COLUMNS
        if field != "context" and (column := getattr(form, field)) and column not in column_names
    }
    if missing:
        overrides = " ".join(f"data.format.{field}=COLUMN" for field in missing)
        raise DataError(
            f"the data ({where}) has no column {', '.join(missing.values())}; it has {', '.join(column_names)}\n"
            f"  name yours: {overrides}"
        )


def formatter(recipe: Recipe) -> RowFormatter:
    """The function that formats the rows of `recipe`; it returns None for rows whose response is blank.

    The returned function raises DataError if a column does not hold text, or a label is not a class number.
    """
    form = format_of(recipe.data)
    assert form is not None
    return _FORMATTERS[_kind(form)](form, recipe.training.get("completion_only_loss"))


def _format_texts(form: Format, completion_only: bool | None) -> RowFormatter:
    def apply(row: Mapping[str, Any]) -> Example | None:
        text = _text(row, form.text)
        return Example(text) if text.strip() else None

    return apply


def _format_prompts(form: Format, completion_only: bool | None) -> RowFormatter:
    def apply(row: Mapping[str, Any]) -> Example | None:
        prompt, completion = _text(row, form.prompt), _text(row, form.completion)
        if not completion.strip():
            return None
        return Example(prompt + completion, 0 if completion_only is False else len(prompt))

    return apply


def _format_instructions(form: Format, completion_only: bool | None) -> RowFormatter:
    def apply(row: Mapping[str, Any]) -> Example | None:
        response = _text(row, form.response)
        if not response.strip():
            return None
        instruction, context = _text(row, form.instruction), _text(row, form.context)
        return format_dolly(instruction, context, response, completion_only=bool(completion_only))

    return apply


def _format_reviews(form: Format, completion_only: bool | None) -> RowFormatter:
    words = form.label_words

    def apply(row: Mapping[str, Any]) -> Example | None:
        label = row[form.label or "label"]
        if not isinstance(label, int) or not 0 <= label < len(words):
            raise DataError(
                f"column {form.label!r} contains {label!r}; expected a class number from 0 to {len(words) - 1} "
                "(data.format.label_words)"
            )
        return format_review(_text(row, form.review), words[label], completion_only=completion_only is not False)

    return apply


_FORMATTERS = {
    "text": _format_texts,
    "prompt": _format_prompts,
    "dolly": _format_instructions,
    "review": _format_reviews,
}


def _text(row: Mapping[str, Any], column: str | None) -> str:
    """The text in `column`; "" for a null, a column that the row lacks, or no column."""
    value = row.get(column) if column else None
    if value is not None and not isinstance(value, str):
        raise DataError(f"column {column!r} contains {type(value).__name__} values; expected text")
    return value or ""
