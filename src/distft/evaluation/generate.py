"""What is written and how: conversations, sampling, templates, answers, and that no answer is written twice.

An engine (`generation`, `endpoint`) writes; `generate` asks it for what its journal does not hold yet, each rank for its share. What an item's answer is depends
on the item alone, not on its batch, its rank or the number of processes: every sampled item draws from a random stream of its own. (What is
left are the roundings of batches of different shapes, about 1e-6 of a logit in fp32, which decide only where two tokens tie.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict

from distft.data.templates import format_dolly
from distft.distributed.world import World
from distft.evaluation.cache import complete, key_of

Template = Literal["chat", "instruction", "plain"]
"""What turns a conversation into a prompt: the tokenizer's own, the one that instructions were trained in, or nothing."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: str


@dataclass(frozen=True)
class Sampling:
    """How a text is drawn. `temperature` 0 takes the likeliest token each time, and then `top_p` and `seed` say nothing."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42

    def content(self) -> dict[str, Any]:
        """What of it a text depends on."""
        return asdict(self) if self.temperature > 0 else {"max_new_tokens": self.max_new_tokens, "temperature": 0.0}


@dataclass(frozen=True)
class Item:
    """A conversation that ends with the user's turn, and how the answer to it is drawn."""

    messages: tuple[Message, ...]
    sampling: Sampling


@dataclass(frozen=True)
class Answer:
    """`finished`: the model ended it itself; false where it ran into its limit, or where the prompt left no room (`tokens` 0)."""

    text: str
    tokens: int
    finished: bool


class Engine(Protocol):
    """What writes answers. `identity` names all that they depend on besides the item: engine, model, revision, adapter."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that the model is given, or as much of it as this side knows."""
        ...

    def write(self, items: Sequence[Item]) -> Iterable[tuple[int, Answer]]:
        """The index of each of `items` with its answer, as they are done, in any order."""
        ...


def generate(engine: Engine, items: Sequence[Item], world: World, journal: Path, title: str) -> list[Answer]:
    """The answer to each item, in order and on all ranks; kept in `journal` one by one as they are done. All ranks enter.

    Raises:
        DistftError: the engine's own, on any rank.
    """
    prompts = [engine.prompt(item.messages) for item in items]
    keys = [
        key_of(engine.identity, prompt, item.sampling.content()) for prompt, item in zip(prompts, items, strict=True)
    ]

    def work(indices: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, answer in engine.write([items[index] for index in indices]):
            index = indices[number]
            yield (
                index,
                {
                    **asdict(answer),
                    "prompt": prompts[index],
                    "sampling": items[index].sampling.content(),
                    "by": dict(engine.identity),
                },
            )

    costs = [len(prompt) + 4 * item.sampling.max_new_tokens for prompt, item in zip(prompts, items, strict=True)]
    records = complete(journal, keys, work, world, costs=costs, title=title)
    return [Answer(record["text"], record["tokens"], record["finished"]) for record in records]


def item_seed(sampling: Sampling, prompt: str) -> int:
    """The seed of an item's own random stream, below 2**31 (as servers want it): of the seed and the prompt alone."""
    return int(key_of(sampling.seed, prompt)[:8], 16) >> 1


def instruction_prompt(messages: Sequence[Message]) -> str:
    """The template that instructions were trained in (`samples.format_dolly`), earlier turns with their answers before it."""
    done = [
        format_dolly(user["content"], None, answer["content"].strip(), completion_only=False).text + "\n\n"
        for user, answer in zip(messages[:-1:2], messages[1::2], strict=True)
    ]
    return "".join(done) + format_dolly(messages[-1]["content"], None, "", completion_only=False).text


def plain_prompt(messages: Sequence[Message]) -> str:
    """The turns as they are, for models that were trained on prompts without a template."""
    return "\n\n".join(message["content"] for message in messages)


def template_of(tokenizer: Any, otherwise: Literal["instruction", "plain"]) -> Template:
    """The tokenizer's chat template where it has one."""
    return "chat" if getattr(tokenizer, "chat_template", None) else otherwise


def rendered(tokenizer: Any, template: Template, messages: Sequence[Message]) -> str:
    """The conversation as the model is given it."""
    if template == "chat":
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    return instruction_prompt(messages) if template == "instruction" else plain_prompt(messages)


def token_ids(tokenizer: Any, template: Template, prompt: str) -> list[int]:
    """The prompt's tokens. A chat template writes special tokens out; without one the tokenizer adds its own, as in training, but not the
    end of the sequence."""
    written_out = template == "chat"
    ids = list(tokenizer(prompt, add_special_tokens=not written_out)["input_ids"])
    return ids[:-1] if ids and not written_out and ids[-1] == tokenizer.eos_token_id else ids
