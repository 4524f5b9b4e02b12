"""From a row with a chosen and a rejected answer to a pair of examples that share a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from distft.config.recipe import Recipe
from distft.config.schema import Format
from distft.data.conversations import Conversation, has_messages
from distft.data.templates import Dropped, Example
from distft.data.tokenize import IGNORED
from distft.errors import DataError

SAME = Dropped("a chosen answer that equals the rejected one")
NO_ANSWER = Dropped("an empty answer of a pair")
_NO_PROMPT = "a pair without a prompt"


def mismatched(row: Mapping[str, Any], other: Mapping[str, Any], max_length: int | None) -> dict[str, list[int]]:
    """The prompt of one prepared answer with the answer of another, cut to `max_length` tokens, as a sample.

    An answer begins with the first trained token.
    """
    first, start = (next(at for at, label in enumerate(each["labels"]) if label != IGNORED) for each in (row, other))
    return {
        "input_ids": [*row["input_ids"][:first], *other["input_ids"][start:]][:max_length],
        "labels": [*[IGNORED] * first, *other["labels"][start:]][:max_length],
    }


def sequences_of(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The two sequences of each prepared pair, as samples: the one with the chosen answer, then the other; of an answer
    with a label, its only one."""
    return [
        {name: row[name][part] for name in ("input_ids", "labels")}
        for row in rows
        for part in (slice(row["chosen"]), slice(row["chosen"], None))
        if row["input_ids"][part]
    ]


def is_truth(value: Any) -> bool:
    """Whether `value` is what a column of labels may hold: true or false, which text files may write as `True` or 1."""
    return _truth(value) is not None


def truth(row: Mapping[str, Any], column: str) -> bool:
    """What the label of a row says.

    Raises:
        DataError: it is neither true nor false.
    """
    found = _truth(row.get(column))
    if found is None:
        raise DataError(f"column {column!r} contains {row.get(column)!r}; expected true or false")
    return found


def _truth(value: Any) -> bool | None:
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())


def is_answer(value: Any) -> bool:
    """Whether `value` is what a column of answers may hold: a text, a message, or a list of messages."""
    return isinstance(value, str) or has_messages([value] if isinstance(value, Mapping) else value)


def wrong_samples(recipe: Recipe, form: Format) -> tuple[str, str] | None:
    """What is wrong with columns of this kind for the recipe's objective, and what to do; None if nothing is."""
    loss = (
        ""
        if not recipe.prefers or recipe.preference is None
        else f" preference.loss_type={recipe.preference.loss_type}"
    )
    asked = f"objective={recipe.objective}{loss if recipe.rates else ''}"
    if form.rated and not recipe.rates:
        return (
            f"names answers with a label, and {asked}",
            "set objective=dpo preference.loss_type=kto (recipe=kto has it)",
        )
    if form.chosen is not None and not recipe.pairs:
        set_ = "set preference.loss_type=sigmoid" if recipe.rates else "set objective=dpo"
        return f"names pairs of answers, chosen and rejected, and {asked}", set_
    if recipe.pairs and form.chosen is None:
        return f"names single answers, and {asked}", "set data.format.chosen and data.format.rejected, or objective=sft"
    if recipe.rates and not form.rated:
        return f"names answers without a label, and {asked}", "set data.format.label, or objective=sft"
    return None


def pair_of(chosen: Example | Dropped, rejected: Example | Dropped, *, has_prompt: bool) -> Example | Dropped:
    """The two examples as one pair."""
    for example in (chosen, rejected):
        if isinstance(example, Dropped):
            return example
    assert isinstance(chosen, Example) and isinstance(rejected, Example)
    if chosen.text == rejected.text:
        return SAME
    notes = dict.fromkeys([*chosen.notes, *rejected.notes, *([] if has_prompt else [_NO_PROMPT])])
    return replace(chosen, rejected=rejected, notes=tuple(notes))


def common_text(chosen: str, rejected: str) -> str:
    """What both texts begin with, without a space at its end, which belongs to the first word of the answers."""
    size = min(len(chosen), len(rejected))
    size = next((at for at in range(size) if chosen[at] != rejected[at]), size)
    return chosen[:size].removesuffix(" ")


def with_prompt(answer: Conversation, column: str, prompt: Conversation | None) -> Conversation:
    """The conversation that ends in the answer of a `column`, which may have all of it.

    Raises:
        DataError: the answer begins with a turn that is not the assistant's, and lacks the prompt's last one.
    """
    if prompt is None or not prompt.messages:
        return answer
    first = answer.messages[0]["role"] if answer.messages else "assistant"
    if first in ("assistant", "tool"):
        return prompt + answer
    if prompt.messages[-1] not in answer.messages:
        raise DataError(
            f"column {column!r} begins with a turn of {first}, and does not contain the prompt; expected an answer of "
            "the assistant, or the whole conversation"
        )
    return answer


def after_prompt(chosen: Conversation, rejected: Conversation) -> tuple[Conversation, Conversation, int]:
    """The two conversations, of which nothing is trained before they differ, and the number of messages until then."""
    both = list(zip(chosen.messages, rejected.messages, strict=False))
    shared = next((at for at, (one, other) in enumerate(both) if one != other), len(both))
    parts = [replace(each, trained=(*[False] * shared, *each.trained[shared:])) for each in (chosen, rejected)]
    return parts[0], parts[1], shared
