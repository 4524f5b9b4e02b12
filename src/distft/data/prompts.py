"""From a question to the prompt that a model is given, and which template it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal, TypedDict

from distft.config.recipe import Recipe
from distft.data.conversations import has_messages
from distft.data.formats import format_of, is_chat
from distft.data.sources import read_data
from distft.data.templates import format_dolly
from distft.errors import DataError

_ROWS = 8
"""Prompts of the training that are looked at."""
_QUESTION = "?question?"
Template = Literal["chat", "instruction", "plain"]
"""How a conversation becomes a prompt: the tokenizer's chat template, the one of instruction data, or none."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def instruction_prompt(messages: Sequence[Message]) -> str:
    """The prompt in the template of instruction data (`format_dolly`), with earlier turns and their answers before
    it."""
    done = [
        format_dolly(user["content"], None, answer["content"].strip(), completion_only=False).text + "\n\n"
        for user, answer in zip(messages[:-1:2], messages[1::2], strict=True)
    ]
    return "".join(done) + format_dolly(messages[-1]["content"], None, "", completion_only=False).text


def plain_prompt(messages: Sequence[Message]) -> str:
    """The turns without a template, for models trained on prompts as they are."""
    return "\n\n".join(message["content"] for message in messages)


def template_of(tokenizer: Any, otherwise: Literal["instruction", "plain"]) -> Template:
    """The tokenizer's chat template if it has one."""
    return "chat" if getattr(tokenizer, "chat_template", None) else otherwise


def render(tokenizer: Any, template: Template, messages: Sequence[Message]) -> str:
    """The conversation as the text of a prompt."""
    if template == "chat":
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    return instruction_prompt(messages) if template == "instruction" else plain_prompt(messages)


def token_ids(tokenizer: Any, template: Template, prompt: str) -> list[int]:
    """The tokens of a rendered prompt.

    A chat template spells special tokens out. For the other templates the tokenizer adds its own, as in training,
    except for the end of the sequence.
    """
    spelt_out = template == "chat"
    ids = list(tokenizer(prompt, add_special_tokens=not spelt_out)["input_ids"])
    return ids[:-1] if ids and not spelt_out and ids[-1] == tokenizer.eos_token_id else ids


def trained_template(recipe: Recipe, tokenizer: Any) -> Template | None:
    """The template that `recipe` trains with; None if its data do not tell: whole texts may be in any."""
    form = format_of(recipe.data)
    if is_chat(recipe.data):
        return "chat"
    if form is None or not (form.instruction or form.prompt):
        return None
    return "instruction" if form.instruction else _template_of_prompts(recipe, str(form.prompt), tokenizer)


def _template_of_prompts(recipe: Recipe, column: str, tokenizer: Any) -> Template | None:
    """`chat` if the prompts of the data are rendered by the tokenizer's chat template already, otherwise `plain`."""
    if template_of(tokenizer, "plain") == "plain":
        return "plain"
    try:
        rows = read_data(recipe.data)[0]
        prompts = [row[column] or "" for row in islice(rows, _ROWS)]
        if any(map(has_messages, prompts)):
            return "chat"
        prompts = [str(prompt) for prompt in prompts]
    except (DataError, KeyError):  # the data of the training are not here any more
        return None
    question = [{"role": "user", "content": _QUESTION}]
    rendered = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    end = rendered.rpartition(_QUESTION)[2].strip()  # the beginning may hold a system message of the data's own
    return "chat" if end and all(prompt.strip().endswith(end) for prompt in prompts) else "plain"
