"""Write answers to conversations: items, sampling, templates, and a cache so that no answer is written twice.

An engine writes; `generate` asks it for what the cache does not hold, each rank for its share. An answer depends on
its item alone, not on its batch, its rank or the number of processes: every sampled item has a random stream of its
own. (What remains is the rounding of batches of different shapes, about 1e-6 of a logit in fp32, which matters only if
two tokens tie.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from distft.data.prompts import Message
from distft.distributed.world import World
from distft.evaluation.cache import complete, key_of


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. With `temperature` 0 the likeliest token is taken, and `top_p` and `seed` have no
    effect."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42

    def content(self) -> dict[str, Any]:
        """The settings that the text depends on."""
        return asdict(self) if self.temperature > 0 else {"max_new_tokens": self.max_new_tokens, "temperature": 0.0}


@dataclass(frozen=True)
class Item:
    """A conversation that ends with the user's turn, and how to sample the answer to it."""

    messages: tuple[Message, ...]
    sampling: Sampling


@dataclass(frozen=True)
class Answer:
    """A text of `tokens` tokens. `finished` is false if it ran into a limit, or if the prompt left no room (0
    tokens). `why_empty` says why a server gave no text, if that is known."""

    text: str
    tokens: int
    finished: bool
    why_empty: str = ""


class Engine(Protocol):
    """Writes answers. `identity` names everything they depend on besides the item: engine, model, revision, adapter."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text given to the model, or as much of it as this side of the engine knows."""
        ...

    def write(self, items: Sequence[Item]) -> Iterable[tuple[int, Answer]]:
        """The index of each item with its answer, as they are finished, in any order."""
        ...


def generate(engine: Engine, items: Sequence[Item], world: World, cache: Path, title: str) -> list[Answer]:
    """The answer to each item, in order and on all ranks. All ranks call this. Finished answers are kept in `cache`.

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
    records = complete(cache, keys, work, world, costs=costs, title=title)
    return [
        Answer(record["text"], record["tokens"], record["finished"], record.get("why_empty", "")) for record in records
    ]


def describe_answers(answers: Sequence[Answer]) -> dict[str, Any]:
    """What to know about answers before believing their score: their length, and how many were cut off or empty."""
    return {
        "count": len(answers),
        "mean_tokens": sum(answer.tokens for answer in answers) / len(answers) if answers else None,
        "cut_off": sum(not answer.finished for answer in answers),
        "empty": sum(not answer.text.strip() for answer in answers),
    }


def item_seed(sampling: Sampling, prompt: str) -> int:
    """The seed of an item's random stream, from the seed and the prompt alone. Below 2**31, as servers require."""
    return int(key_of(sampling.seed, prompt)[:8], 16) >> 1
