"""Which template turns questions into prompts: the one that the evaluated model was trained with, if that is known."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from distft.config.evaluation import Evaluation
from distft.data.formats import format_of
from distft.data.prompts import Template, template_of, trained_template
from distft.errors import ModelError
from distft.evaluation.target import Target


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
