"""A conversation with a model: its answers are written word by word, by what was trained or by its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import TemplateError

from distft.data.prompts import Message, Template
from distft.distributed.world import World
from distft.errors import ModelError
from distft.evaluation.engines.transformers import TransformersEngine
from distft.evaluation.generate import Answer, Item, Sampling
from distft.evaluation.request import Request
from distft.evaluation.target import SideName, Target, Trained
from distft.evaluation.template import PromptTemplate, prompt_template


def load_target(request: Request, *, identify: bool = False) -> tuple[Target, PromptTemplate]:
    """What `request` names, in this process, and the template of its prompts: that of its training, where it is known.
    With `identify`, its weights are hashed, which answers that are kept need.

    Raises:
        ModelError: the model or the adapter cannot be loaded.
    """
    target = Target.load(request.recipe, request.result, World(), Trained.by(request.run), identify=identify)
    return target, prompt_template(target, request.recipe.evaluation)


def engine_of(target: Target, template: Template, identity: Mapping[str, str] | None = None) -> TransformersEngine:
    """The engine for the side of `target` that is in use."""
    tokens = target.recipe.evaluation.generation.batch_tokens
    return TransformersEngine(target.model, target.tokenizer, identity or {}, batch_tokens=tokens, template=template)


@dataclass
class Chat:
    """A conversation with `target`, whose turns are kept until `reset`."""

    target: Target
    template: Template
    sampling: Sampling
    system: str = ""
    """The system prompt; only chat templates have one."""
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.system and self.template != "chat":
            raise ModelError(
                f"the model is prompted with the template {self.template!r}, which has no system prompt; leave it out"
            )

    def ask(self, question: str, write: Callable[[str], None], *, base: bool = False) -> Answer:
        """The answer to `question` in this conversation, whose text goes to `write` as it grows.

        Raises:
            ModelError: the chat template refuses the conversation.
        """
        turns: list[Message] = [*self.turns, {"role": "user", "content": question}]
        answer = self._answer(turns, write, base=base)
        self.turns = [*turns, {"role": "assistant", "content": answer.text}]
        return answer

    def ask_base(self, write: Callable[[str], None]) -> Answer | None:
        """The base's answer to the last question, which the conversation does not keep; None if nothing was asked."""
        if not self.turns:
            return None
        return self._answer(self.turns[:-1], write, base=True)

    def reset(self) -> None:
        """Start anew."""
        self.turns = []

    def _answer(self, turns: Sequence[Message], write: Callable[[str], None], *, base: bool) -> Answer:
        side: SideName = "base" if base else self.target.sides[-1]
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        with self.target.side(side):
            try:
                return engine_of(self.target, self.template).stream(Item((*system, *turns), self.sampling), write)
            except TemplateError as error:
                raise ModelError(f"the chat template refuses this conversation: {error}") from error
