"""Answers from a model in this process, by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from distft.data.batch_plan import batches_by_length
from distft.data.prompts import Message, Template, render, token_ids
from distft.errors import OutOfMemory
from distft.evaluation.generate import Answer, Item, Sampling, item_seed
from distft.models.generation import end_tokens, write


class TransformersEngine:
    """`model.generate` in batches of prompts of similar length.

    `template` turns conversations into prompts. A batch takes at most `batch_tokens` tokens, padding and new tokens
    included. Generation settings that come with the model, such as a repetition penalty, are ignored: only `Sampling`
    counts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        identity: Mapping[str, Any],
        *,
        batch_tokens: int,
        template: Template,
    ) -> None:
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.template: Template = template
        self._identity = {**identity, "engine": "transformers", "template": template}
        self._end_tokens = end_tokens(model, tokenizer)
        self._max_positions = max_positions(model)

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def prompt(self, messages: Sequence[Message]) -> str:
        return render(self.tokenizer, self.template, messages)

    def write(self, items: Sequence[Item]) -> Iterator[tuple[int, Answer]]:
        """Raises:
        OutOfMemory: a single item does not fit on the device.
        """
        prompts = [self.prompt(item.messages) for item in items]
        ids = [self._ids(prompt) for prompt in prompts]
        limits = [min(item.sampling.max_new_tokens, self._room(one)) for item, one in zip(items, ids, strict=True)]
        yield from ((index, Answer("", 0, False)) for index, limit in enumerate(limits) if limit < 1)
        groups: dict[tuple[float, float, int], list[int]] = {}
        for index, (item, limit) in enumerate(zip(items, limits, strict=True)):
            if limit > 0:
                groups.setdefault((item.sampling.temperature, item.sampling.top_p, limit), []).append(index)
        for (_, _, limit), members in groups.items():
            for batch in batches_by_length([len(ids[index]) + limit for index in members], self.batch_tokens):
                chosen = [members[place] for place in batch]
                seeds = [item_seed(items[index].sampling, prompts[index]) for index in chosen]
                written = self._write([ids[index] for index in chosen], items[chosen[0]].sampling, limit, seeds)
                yield from zip(chosen, written, strict=True)

    def stream(self, item: Item, write: Callable[[str], None]) -> Answer:
        """The answer to one item, whose text goes to `write` as it grows: whole words, until the answer ends.

        Raises:
            OutOfMemory: the item does not fit on the device.
        """
        prompt = self.prompt(item.messages)
        ids = self._ids(prompt)
        limit = min(item.sampling.max_new_tokens, self._room(ids))
        if limit < 1:
            return Answer("", 0, False)
        with _out_of_memory(len(ids), limit):
            return self._generate(
                [ids], item.sampling, limit, [item_seed(item.sampling, prompt)], _Streamer(self.tokenizer, write)
            )[0]

    def _ids(self, prompt: str) -> list[int]:
        return token_ids(self.tokenizer, self.template, prompt)

    def _room(self, ids: list[int]) -> int:
        """How many tokens the model can append."""
        return 2**31 if self._max_positions is None else self._max_positions - len(ids)

    def _write(self, ids: list[list[int]], sampling: Sampling, limit: int, seeds: list[int]) -> list[Answer]:
        """The answers to one batch; if it does not fit on the device, one half after the other."""
        if len(ids) == 1:
            with _out_of_memory(len(ids[0]), limit):
                return self._generate(ids, sampling, limit, seeds)
        with suppress(torch.OutOfMemoryError):
            return self._generate(ids, sampling, limit, seeds)
        torch.cuda.empty_cache()
        half = len(ids) // 2
        return [
            answer
            for part in (slice(half), slice(half, None))
            for answer in self._write(ids[part], sampling, limit, seeds[part])
        ]

    def _generate(
        self, ids: list[list[int]], sampling: Sampling, limit: int, seeds: list[int], streamer: Any = None
    ) -> list[Answer]:
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(sampling.top_p))
            processors.append(_Draw(seeds, self.model.get_input_embeddings().weight.device))
        options = {"logits_processor": processors, "streamer": streamer}
        return [
            self._answer(row)
            for row in write(self.model, ids, limit, self._end_tokens, self.tokenizer.pad_token_id, **options)
        ]

    def _answer(self, row: list[int]) -> Answer:
        end = next((place for place, token in enumerate(row) if token in self._end_tokens), None)
        written = row[:end]
        return Answer(self.tokenizer.decode(written, skip_special_tokens=True), len(written), end is not None)


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Passes the text of an answer on, without its prompt and its special tokens."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._pass_on = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._pass_on(text)


@contextmanager
def _out_of_memory(prompt: int, limit: int) -> Iterator[None]:
    """Explain that one prompt of `prompt` tokens, with `limit` new ones, does not fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the device's memory does not hold the model and one prompt of {prompt} tokens with {limit} new ones; "
            "allow fewer new tokens (evaluation.generation.max_new_tokens), or quantise the model",
            {},
            restart=False,
        ) from error


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Turns greedy decoding into sampling with a random stream per row, so that no row depends on another.

    This is the Gumbel-max trick: log p minus the logarithm of an exponential variate is largest at a token with
    probability p.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = torch.empty_like(scores, dtype=torch.float32)
        for row, stream in zip(drawn, self.streams, strict=True):
            row.exponential_(generator=stream)
        return scores.float() - drawn.clamp_min(torch.finfo(torch.float32).tiny).log()


def max_positions(model: Any) -> int | None:
    """The longest sequence that the model has positions for; None if its configuration names no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit
