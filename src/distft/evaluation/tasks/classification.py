"""Classification of texts in a file of the user's, in the template that the model was trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from distft.config.evaluation import Evaluation
from distft.config.recipe import Recipe
from distft.data.labelled import TEXT, Prompt, continued, drawn, file_of, load_labelled
from distft.distributed.collectives import together
from distft.errors import DataError
from distft.evaluation.classify import Classified, classify
from distft.evaluation.generate import Template, render
from distft.evaluation.sets import DataOf
from distft.evaluation.target import Target
from distft.evaluation.tasks import Task
from distft.evaluation.template import prompt_template

_KEY = "evaluation.classification"
_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for the text while the prompt is rendered."""


class ClassificationTask(Task):
    """Classify the texts with both sides."""

    packages: ClassVar = {"sklearn": "scikit-learn"}

    def data(self, recipe: Recipe) -> DataOf | None:
        path = recipe.evaluation.classification.path
        return DataOf.at(file_of(path)) if path else None

    def reads(self, recipe: Recipe) -> Mapping[str, Callable[[], object]]:
        return {f"{_KEY}.path": lambda: _read(recipe.evaluation)}

    def run(self, target: Target, settings: Evaluation, folder: Path) -> dict[str, Any]:
        """Raises:
        DataError: the texts cannot be read, or a prompt leaves no room for them.
        """
        section = settings.classification
        words, rows, positive = together(target.world, lambda: _read(settings))
        template = together(target.world, lambda: prompt_template(target, settings))
        max_length = section.max_length or target.recipe.training.get("max_length", 1024)
        head, tail = around(target.tokenizer, template.name, section.prompt)
        prompts = [prompt_of(row.text, head, tail, words, target.tokenizer, max_length, template.name) for row in rows]
        asked = Classified("classification", section, words, rows, prompts, positive)
        return {"texts": len(rows)} | classify(asked, target, settings, folder, template.record())


TASK = ClassificationTask()


def _read(settings: Evaluation) -> tuple[list[str], list[Any], int | None]:
    """The label words, the rows to classify, and the number of the positive class, if there is one.

    Raises:
        DataError: no file is named, it cannot be read, or the settings do not fit it.
    """
    section = settings.classification
    if section.path is None:
        raise DataError(f"is required for this task: texts with classes\n  {_KEY}.path=FILE")
    if section.prompt.count(TEXT) != 1:
        raise DataError(f"{_KEY}.prompt must have {TEXT} once, where the text is to stand; got {section.prompt!r}")
    words, available = load_labelled(section, section.path, f"{_KEY}.path")
    positive = None
    if section.positive is not None:
        known = [word.casefold() for word in words]
        if section.positive.casefold() not in known:
            raise DataError(f"{_KEY}.positive={section.positive} is not a label word; there are {', '.join(words)}")
        positive = known.index(section.positive.casefold())
    return words, drawn(section, available, settings.seed, len(words)), positive


def around(tokenizer: Any, template: Template, prompt: str) -> tuple[str, str]:
    """What stands before and after the text in a rendered `prompt`."""
    rendered = render(tokenizer, template, [{"role": "user", "content": prompt.replace(TEXT, _PLACE)}])
    head, _, tail = rendered.partition(_PLACE)
    if template == "plain" and not tail[-1:].isspace():
        tail += " "  # as between a prompt and its completion
    return head, tail


def require_room(
    head: str, tail: str, words: list[str], tokenizer: Any, max_length: int | None, template: Template
) -> None:
    """Raises DataError if the question alone takes `max_length` tokens."""
    question = continued(head + tail, len(head), words, tokenizer, None, special=template != "chat")
    needed = len(question.prefix) + max(map(len, question.continuations)) + 1
    if max_length is not None and needed >= max_length:
        raise DataError(
            f"the question takes {needed} of {max_length} tokens, which leaves no room for a text; raise "
            f"{_KEY}.max_length, or shorten {_KEY}.prompt"
        )


def prompt_of(
    text: str, head: str, tail: str, words: list[str], tokenizer: Any, max_length: int | None, template: Template
) -> Prompt:
    """The text between `head` and `tail` before each label word. A text that is too long is cut at its end."""
    text = head + text.strip()
    return continued(text + tail, len(text), words, tokenizer, max_length, special=template != "chat")
