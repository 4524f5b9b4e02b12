"""Which columns of a row hold what, and the function that turns a row into text with a template.

The templates themselves are in `distft.data.templates`.
"""

from __future__ import annotations

import functools
import itertools
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from distft.config.recipe import Recipe
from distft.config.schema import Data, Format
from distft.data.conversations import Conversation, conversation, from_texts, has_messages
from distft.data.files import Row
from distft.data.pairs import NO_ANSWER, after_prompt, common_text, pair_of, truth, with_prompt
from distft.data.sources import KNOWN_DATASETS, Rows, parts_of
from distft.data.templates import Dropped, Example, format_dolly, format_review
from distft.errors import DataError

if TYPE_CHECKING:
    from distft.data.chat_template import ChatTemplate

_KINDS = {
    "messages": {"messages"},
    "text": {"text"},
    "prompt": {"prompt", "completion"},
    "pair": {"chosen", "rejected"},
    "rated messages": {"messages", "label"},
    "rated prompt": {"prompt", "completion", "label"},
    "dolly": {"instruction", "response"},
    "review": {"review", "label"},
}
"""The kinds of format, each with the columns that it requires."""
_OPTIONAL = {
    "messages": {"tools", "system"},
    "prompt": {"tools"},
    "pair": {"prompt", "tools", "system"},
    "rated messages": {"tools", "system"},
    "rated prompt": {"tools"},
    "dolly": {"context", "system"},
}
_COLUMNS = (
    "messages",
    "tools",
    "system",
    "text",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "instruction",
    "context",
    "response",
    "review",
    "label",
)


_MEDIA_COLUMNS = ("images", "image", "videos", "audios", "audio")


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
        if given - _OPTIONAL.get(kind, set()) == required:
            return kind
    raise DataError(
        "set messages; or text; or prompt and completion; or instruction, response and optionally context; or review "
        "and label; or, with objective=dpo, chosen and rejected, or answers and label (got "
        f"{', '.join(sorted(given)) or 'none'})"
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
    for part in rows.parts[:1] if data.streaming else rows.parts:
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
        if form.chosen is None:
            _check_preferences(part.name, named.values(), columns)


def _check_preferences(name: str, named: Iterable[str], columns: Collection[str]) -> None:
    """Refuse to train on the column `chosen` of data that also has `rejected` (likewise `chosen_response`, …)."""
    for column in named:
        for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
            if one in column and (ignored := column.replace(one, other)) in columns:
                better, worse = (column, ignored) if one == "chosen" else (ignored, column)
                raise DataError(
                    f"the data ({name}) has pairs of preferences, {column} and {ignored}, and {ignored} would be "
                    f"ignored\n  to train on the pairs, set objective=dpo data.format.chosen={better} "
                    f"data.format.rejected={worse}; to train on {column} alone, write a file without the column "
                    f"{ignored}"
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


def formatter(recipe: Recipe, tokenizer: Any = None) -> Formatter:
    """The function that formats the rows of `recipe`. It can be sent to other processes.

    The `tokenizer` has the template of conversations; without one, they are only checked.

    Raises:
        DataError: the rows are conversations, and the tokenizer has no template for them.
    """
    form, through_chat = format_of(recipe.data), is_chat(recipe.data)
    assert form is not None
    template, problem = None, None
    if tokenizer is not None and (through_chat or kind_of(form) in ("prompt", "pair", "rated prompt")):
        from distft.data.chat_template import chat_template

        try:
            template = chat_template(recipe, tokenizer)
        except DataError as error:
            if through_chat:
                raise
            problem = str(error)  # matters only if the prompts turn out to be messages
    rules = _Rules(
        completion_only=recipe.training.get("completion_only_loss"),
        through_chat=recipe.data.chat_template is not None,
        trains_all=recipe.data.train_on == "all",
        template=template,
        problem=problem,
    )
    return Formatter(form, rules)


def is_chat(data: Data) -> bool:
    """Whether a chat template renders the rows; prompts may be lists of messages all the same."""
    if data.sources is not None:
        return any(map(is_chat, parts_of(data).values()))
    form = format_of(data)
    return form is not None and (form.messages is not None or data.chat_template is not None)


@dataclass(frozen=True)
class _Rules:
    """What the recipe says of formatting."""

    completion_only: bool | None
    through_chat: bool
    """Whether texts of columns become a conversation, too."""
    trains_all: bool
    template: ChatTemplate | None
    problem: str | None
    """Why there is no template."""

    def example(self, said: Conversation) -> Example | Dropped:
        """The conversation by the template; without one, its text as far as it is known."""
        if self.problem is not None:
            raise DataError(self.problem)
        if self.template is not None:
            return self.template.example(said)
        return Example.trained_from("\n".join(str(message["content"]) for message in said.messages))


@dataclass(frozen=True)
class Formatter:
    """Turns a row into an `Example`, or says why there is nothing to train on."""

    form: Format
    rules: _Rules

    @functools.cached_property
    def _format(self) -> Callable[[Format, _Rules, Mapping[str, Any]], Example | Dropped]:
        return _FORMATTERS[kind_of(self.form)]

    def __call__(self, row: Mapping[str, Any]) -> Example | Dropped:
        """Raises:
        DataError: a column does not hold text, or a label is not a class number.
        """
        made = self._format(self.form, self.rules, row)
        notes = (*blanks(row, self.form), *made.notes)
        return Dropped(made.reason, notes) if isinstance(made, Dropped) else replace(made, notes=notes)

    def key(self) -> dict[str, Any]:
        """All that the examples depend on besides the rows, for JSON."""
        columns = self.form.model_dump(exclude={"chosen", "rejected"} if self.form.chosen is None else None)
        return {"form": columns, "rules": asdict(self.rules)}

    def lines(self) -> list[str]:
        """What to tell the user about the template of conversations."""
        template = self.rules.template
        return [] if template is None or self.form.messages is None else [f"chat template: {template.source}"]


_EMPTY = Dropped("an empty response")


def _format_messages(form: Format, rules: _Rules, row: Mapping[str, Any]) -> Example | Dropped:
    assert form.messages is not None
    if media := next((column for column in _MEDIA_COLUMNS if row.get(column)), None):
        raise DataError(f"column {media!r} is not empty, and distft trains on text alone\n  leave out such rows")
    if row.get(form.messages) is None:
        return Dropped("no conversation")
    tools = row.get(form.tools) if form.tools else None
    return rules.example(conversation(row[form.messages], form.messages, tools, _text(row, form.system)))


def _format_text(form: Format, rules: _Rules, row: Mapping[str, Any]) -> Example | Dropped:
    text = _text(row, form.text)
    return Example.trained_from(text) if text.strip() else _EMPTY


def _format_prompt(form: Format, rules: _Rules, row: Mapping[str, Any]) -> Example | Dropped:
    assert form.prompt is not None and form.completion is not None
    if has_messages(row.get(form.prompt)) or isinstance(row.get(form.completion), list):
        return _format_turns(form, rules, row)
    prompt, completion = _text(row, form.prompt), _text(row, form.completion)
    if not completion.strip():
        return _EMPTY
    if rules.through_chat:
        return rules.example(from_texts(prompt, "", completion))
    return Example.trained_from(prompt + completion, 0 if rules.completion_only is False else len(prompt))


def _format_turns(form: Format, rules: _Rules, row: Mapping[str, Any]) -> Example | Dropped:
    """A prompt and a completion that are messages. The turns of the prompt are trained only with all others."""
    assert form.prompt is not None and form.completion is not None
    prompt = conversation(row.get(form.prompt), form.prompt, row.get(form.tools) if form.tools else None)
    completion = conversation(row.get(form.completion), form.completion)
    if not rules.trains_all:
        prompt = replace(prompt, trained=(False,) * len(prompt.messages))
    return rules.example(prompt + completion)


def _format_pair(form: Format, rules: _Rules, row: Mapping[str, Any]) -> Example | Dropped:
    assert form.chosen is not None and form.rejected is not None
    columns = form.chosen, form.rejected
    given: Any = row.get(form.prompt) if form.prompt else None
    if all(isinstance(row.get(column), str | None) and not has_messages(row.get(column)) for column in columns):
        chosen, rejected = (_text(row, column) for column in columns)
        if form.prompt is None:
            given = common_text(chosen, rejected)
            chosen, rejected = chosen[len(given) :], rejected[len(given) :]
        if not (chosen.strip() and rejected.strip()):
            return NO_ANSWER
        if not (rules.through_chat or has_messages(given)):
            head = given if form.prompt is None else _text(row, form.prompt)
            examples = [Example.trained_from(head + answer, len(head)) for answer in (chosen, rejected)]
            return pair_of(*examples, has_prompt=bool(head.strip()))
        answers: list[Any] = [[{"role": "assistant", "content": answer}] for answer in (chosen, rejected)]
    elif any(row.get(column) is None for column in columns):
        return NO_ANSWER
    else:
        answers = [row[column] for column in columns]
    tools, system = row.get(form.tools) if form.tools else None, _text(row, form.system)
    if isinstance(given, str) and not has_messages(given):
        given = [{"role": "user", "content": given}] if given.strip() else None
    prompt = None if given is None else conversation(given, form.prompt or "prompt", tools, system)
    said = [
        with_prompt(conversation(answer, column, tools, "" if prompt else system), column, prompt)
        for answer, column in zip(answers, columns, strict=True)
    ]
    *both, shared = after_prompt(*said)
    return pair_of(*map(rules.example, both), has_prompt=shared > 0)


def _format_rated(form: Format, rules: _Rules, row: Mapping[str, Any]) -> Example | Dropped:
    """A conversation, or a prompt and a completion, with a label."""
    good = truth(row, form.label or "label")
    made = (_format_messages if form.messages else _format_prompt)(form, rules, row)
    return made if isinstance(made, Dropped) else replace(made, good=good)


def _format_instruction(form: Format, rules: _Rules, row: Mapping[str, Any]) -> Example | Dropped:
    response = _text(row, form.response)
    if not response.strip():
        return _EMPTY
    instruction, context = _text(row, form.instruction), _text(row, form.context)
    if rules.through_chat:
        return rules.example(from_texts(instruction, context, response, _text(row, form.system)))
    return format_dolly(instruction, context, response, completion_only=bool(rules.completion_only))


def _format_review(form: Format, rules: _Rules, row: Mapping[str, Any]) -> Example | Dropped:
    words, column = form.label_words, form.label or "label"
    label = class_number(row.get(column), len(words))
    if label is None:
        raise DataError(
            f"column {column!r} contains {row.get(column)!r}; expected a class number from 0 to {len(words) - 1} "
            "(data.format.label_words)"
        )
    return format_review(_text(row, form.review), words[label], completion_only=rules.completion_only is not False)


def class_number(value: Any, classes: int) -> int | None:
    """The number of a class, written as a number or, as in a CSV file, as its digits; None if it is not one of
    0 … `classes` - 1."""
    number = int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value.strip()) else value
    return number if isinstance(number, int) and 0 <= number < classes else None


_FORMATTERS = {
    "messages": _format_messages,
    "text": _format_text,
    "prompt": _format_prompt,
    "pair": _format_pair,
    "rated messages": _format_rated,
    "rated prompt": _format_rated,
    "dolly": _format_instruction,
    "review": _format_review,
}


def blanks(row: Mapping[str, Any], form: Format) -> Iterator[str]:
    """What `row` lacks in the columns of `form`: `null prompt`, `empty completion`. A context may be empty."""
    for field in _COLUMNS:
        column = getattr(form, field)
        if column is None or field in ("label", "tools", "system"):
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
        return "these are messages; name the column of conversations: data.format.messages=COLUMN"
    return "give each row one text"
