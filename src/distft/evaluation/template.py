"""Which template turns questions into prompts: the one that the evaluated model was trained with, if that is known."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from distft.config.evaluation import Evaluation
from distft.config.recipe import Recipe
from distft.data.conversations import has_messages
from distft.data.formats import format_of, is_chat
from distft.data.sources import read_data
from distft.errors import DataError, ModelError
from distft.evaluation.generate import Template, template_of
from distft.evaluation.target import Target

_ROWS = 8
"""Prompts of the training that are looked at."""
_QUESTION = "?question?"


@dataclass(frozen=True)
class PromptTemplate:
    """A template and why it was chosen."""

    name: Template
    why: str

    def record(self) -> dict[str, str]:
        """What results keep."""
        return asdict(self)


def prompt_template(target: Target, settings: Evaluation) -> PromptTemplate:
    """The template for questions to both sides: as set, else as in training, else the tokenizer's chat template.

    Raises:
        ModelError: the chat template is asked for, and the tokenizer has none.
    """
    given, has_chat = settings.generation.template, template_of(target.tokenizer, "plain") == "chat"
    if given == "chat" and not has_chat:
        raise ModelError(
            "the tokenizer has no chat template (evaluation.generation.template=chat); set instruction or plain"
        )
    if given != "auto":
        return PromptTemplate(given, "as set in evaluation.generation.template")
    trained = None if target.trained is None else trained_template(target.trained.recipe, target.tokenizer)
    if trained is not None:
        return PromptTemplate(trained, "as in training")
    form = format_of(target.recipe.data)
    name = template_of(target.tokenizer, "plain" if form is not None and form.prompt else "instruction")
    if target.result is None and target.trained is None:
        return PromptTemplate(name, "nothing was trained")
    return PromptTemplate(name, "the template of the training is not known; evaluation.generation.template sets it")


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
