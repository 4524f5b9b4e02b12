"""The held-out rows that a proof replays: their conversations, the text of their prompts, and their tokens in training.

Prepared data have tokens alone, so the rows are read again up to those that gave the tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from distft.config.recipe import Recipe
from distft.data.conversations import Conversation
from distft.data.encode import encode
from distft.data.formats import Formatter, formatter
from distft.data.inference import with_format
from distft.data.pairs import sequences_of
from distft.data.prepare import prepare_data
from distft.data.sources import parts_of, read_data
from distft.data.templates import Dropped, Example
from distft.data.tokenize import IGNORED

_SEARCHED = 100_000
"""Rows that are read to find the text of the held-out samples."""
_AT_ONCE = 256


@dataclass(frozen=True)
class Replay:
    """A held-out sample as the model saw it in training."""

    ids: list[int]
    trained: list[int]
    """The places in `ids` of the tokens of the answers."""
    text: str | None = None
    """The whole text; None if the row was not found again."""
    prompt: str | None = None
    """The text before the last answer."""
    messages: list[dict[str, Any]] | None = None
    """The conversation before the last answer; None if the row is not rendered by a chat template."""
    tools: list[Any] | None = None
    whole: bool = True
    """Whether the sample was not truncated, so that its last tokens end an answer."""

    @property
    def start(self) -> int:
        """The place of the first token of the last answer."""
        places = self.trained
        return next(
            (one for one, before in zip(places[:0:-1], places[-2::-1], strict=True) if one != before + 1), places[0]
        )

    @property
    def opening(self) -> list[int]:
        """The tokens that a continuation starts from: the prompt, or half of a text that has none."""
        return self.ids[: self.start] if self.start > 1 else self.ids[: max(1, len(self.ids) // 2)]


@dataclass(frozen=True)
class Replays:
    """What is replayed, and which split it is from."""

    items: list[Replay]
    split: str
    special: frozenset[int] = frozenset()
    """The tokens that are no text."""

    @property
    def is_chat(self) -> bool:
        return any(item.messages is not None for item in self.items)

    @property
    def ends(self) -> set[int]:
        """The tokens that end answers in training: special ones at the end, perhaps with a line break after them."""
        tails = [[item.ids[place] for place in item.trained[-2:]] for item in self.items if item.whole]
        found = (next((token for token in reversed(tail) if token in self.special), None) for tail in tails)
        return {token for token in found if token is not None}


def replays(recipe: Recipe, tokenizer: Any, number: int) -> Replays:
    """The first `number` samples of the run's held-out split; of the training split if nothing is held out.

    Raises:
        DataError: the data of the run cannot be read.
    """
    splits = prepare_data(recipe, tokenizer)
    held_out = {"test": splits.test, "validation": splits.validation, "train": splits.train}
    name, samples = next((name, rows) for name, rows in held_out.items() if rows is not None and len(rows))
    rows = samples[: min(number, len(samples))]
    chosen = [{key: rows[key][at] for key in rows} for at in range(len(rows["input_ids"]))]
    items: dict[tuple[int, ...], list[int]] = {}
    found: list[Replay] = []
    for row in chosen:
        items.setdefault(tuple(row["input_ids"]), []).append(len(found))
        sample = sequences_of([row])[0] if "chosen" in row else row
        trained = [place for place, label in enumerate(sample["labels"]) if label != IGNORED]
        found.append(Replay(list(sample["input_ids"]), trained))
    for key, filled in itertools.islice(_known(recipe, tokenizer), _SEARCHED):
        for place in items.pop(key, ()):
            found[place] = filled(found[place])
        if not items:
            break
    return Replays(found, name, frozenset(tokenizer.added_tokens_decoder))


@dataclass(frozen=True)
class _Filled:
    """What a row adds to the replay of its tokens."""

    example: Example
    said: Conversation | None
    whole: bool

    def __call__(self, item: Replay) -> Replay:
        text = self.example.text
        prompt = text[: self.example.trained[-1][0]] if self.example.trained else text
        messages = None if self.said is None else _before_the_last_answer(self.said)
        tools = None if self.said is None else self.said.tools
        return replace(item, text=text, prompt=prompt, messages=messages, tools=tools, whole=self.whole)


def _before_the_last_answer(said: Conversation) -> list[dict[str, Any]]:
    last = max(at for at, message in enumerate(said.messages) if message["role"] == "assistant")
    return [dict(message) for message in said.messages[:last]]


@dataclass
class _Recorder:
    """Stands before a chat template, and keeps the conversation that it renders."""

    template: Any
    said: Conversation | None = field(default=None)

    def example(self, said: Conversation) -> Example | Dropped:
        if self.said is None:  # of a pair, the chosen one comes first
            self.said = said
        made: Example | Dropped = self.template.example(said)
        return made


def _known(recipe: Recipe, tokenizer: Any) -> Iterator[tuple[tuple[int, ...], _Filled]]:
    """Each row's tokens, with what else is known of it."""
    length = recipe.training.get("max_length", 1024)
    for data in parts_of(recipe.data).values():
        part, _ = with_format(recipe.model_copy(update={"data": data}), tokenizer)
        form = formatter(part, tokenizer)
        rows = itertools.chain.from_iterable(reversed(read_data(part.data)))  # an official held-out split comes last
        while some := list(itertools.islice(rows, _AT_ONCE)):
            made = [pair for row in some if (pair := _example(form, row)) is not None]
            samples = encode([example for example, _ in made], tokenizer, length) if made else []
            for (example, said), sample in zip(made, samples, strict=True):
                yield tuple(sample.ids.tolist()), _Filled(example, said, whole=not sample.cut)


def _example(form: Formatter, row: Mapping[str, Any]) -> tuple[Example, Conversation | None] | None:
    if form.rules.template is None:
        example, said = form(row), None
    else:
        recorder: Any = _Recorder(form.rules.template)
        example = Formatter(form.form, replace(form.rules, template=recorder))(row)
        said = recorder.said
    return None if isinstance(example, Dropped) else (example, said)
