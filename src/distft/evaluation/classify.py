"""Classification by a causal model, by the likelihood of the label words and by what it writes: what the tasks `imdb`
and `classification` share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distft.config.evaluation import Evaluation, Labels
from distft.data.batch_plan import batches_by_length
from distft.data.labelled import Prompt, Review
from distft.distributed.collectives import together
from distft.errors import DataError
from distft.evaluation.cache import complete, key_of
from distft.evaluation.classifier import Classes, confusion, figures
from distft.evaluation.engines.transformers import TransformersEngine
from distft.evaluation.generate import Item, Sampling, generate
from distft.evaluation.likelihood import continuation_log_likelihoods
from distft.evaluation.overlap import overlap
from distft.evaluation.target import SideName, Target
from distft.files import read_lines, write_atomically

_EXAMPLES = 5
"""Unparsable answers in the result; the cache has all of them."""
_NO_SPACES = 0x2E80
"""From this code point on are the scripts that write words without spaces between them."""


@dataclass(frozen=True)
class Classified:
    """What a task `name` has to classify: its rows, each with its prompt, and the label words."""

    name: str
    settings: Labels
    words: Sequence[str]
    rows: Sequence[Review]
    prompts: Sequence[Prompt]
    positive: int | None
    """The class of precision, recall and F1; None for figures over all classes alone."""


def classify(
    asked: Classified, target: Target, settings: Evaluation, folder: Path, template: Mapping[str, str]
) -> dict[str, Any]:
    """The result of the task. All ranks call this."""
    rows, prompts, words, methods = asked.rows, asked.prompts, asked.words, asked.settings.methods
    if "generation" in methods:
        together(target.world, lambda: _check_room(asked))
    # If "good" is scored without its end, "good not" can never be likelier. With it, as in training, it can.
    ends = any(prompt.nested for prompt in prompts)
    scored = [prompt.ended(target.tokenizer.eos_token_id) for prompt in prompts] if ends else prompts
    labels: Classes = np.array([row.label for row in rows])
    predicted: dict[str, dict[SideName, Classes]] = {method: {} for method in methods}
    unparsed: dict[SideName, list[str]] = {}
    for side in target.sides:
        if "logprob" in methods:
            likelihoods = _score(asked, target, side, scored, settings, folder)
            predicted["logprob"][side] = np.array([int(np.argmax(row)) for row in likelihoods])
        if "generation" in methods:
            answers = _write(asked, target, side, settings, folder)
            classes = [parse(answer, words) for answer in answers]
            predicted["generation"][side] = np.array([len(words) if one is None else one for one in classes])
            unparsed[side] = [answer for answer, one in zip(answers, classes, strict=True) if one is None]
    found = _figures(labels, predicted, len(words), asked.positive, settings.seed)
    for group in sorted({row.group for row in rows} - {""}):
        members = np.array([row.group == group for row in rows])
        parts = {way: {side: kept[members] for side, kept in sides.items()} for way, sides in predicted.items()}
        of_group = _figures(labels[members], parts, len(words), asked.positive, settings.seed)
        kept = {name: figure for name, figure in of_group.items() if name.endswith("accuracy")}
        found |= {f"{name}_{group}": figure | {"title": f"{figure['title']}, {group}"} for name, figure in kept.items()}
    return {
        "of_class": np.bincount(labels, minlength=len(words)).tolist(),
        "label_words": list(words),
        "end_scored": ends,
        "items_digest": key_of([(row.text, row.label) for row in rows]),
        "overlap": overlap(target, [row.text for row in rows]),
        "template": dict(template),
        "positive": None if asked.positive is None else words[asked.positive],
        "balanced": asked.settings.balanced,
        "seed": settings.seed,
        "figures": found,
        "confusion": {
            "rows": list(words),
            "columns": [*words, "unparsed"],
            **{
                method: {side: confusion(labels, values, len(words)) for side, values in sides.items()}
                for method, sides in predicted.items()
            },
        },
        "unparsed": {side: {"count": len(texts), "first": texts[:_EXAMPLES]} for side, texts in unparsed.items()},
    }


def _check_room(asked: Classified) -> None:
    """Raises DataError if a label word is longer than an answer may be: the model could never write it."""
    prompts, words, limit = asked.prompts, asked.words, asked.settings.max_new_tokens
    longest = [max(len(prompt.continuations[label]) for prompt in prompts) for label in range(len(words))]
    if too_long := [
        f"{word!r} ({tokens} tokens)" for word, tokens in zip(words, longest, strict=True) if tokens > limit
    ]:
        raise DataError(
            f"{', '.join(too_long)}: longer than an answer may be, so the model could never write it; set "
            f"evaluation.{asked.name}.max_new_tokens={max(longest) + 1} (now {limit})"
        )


def _figures(
    labels: Classes,
    predicted: Mapping[str, Mapping[SideName, Classes]],
    classes: int,
    positive: int | None,
    seed: int,
) -> dict[str, Any]:
    """The figures of both methods; those by generation are named `generation_…`."""
    found: dict[str, Any] = {}
    if "logprob" in predicted:
        found |= figures(labels, predicted["logprob"], classes, positive, seed)
        del found["unparsed"]  # the likeliest label word always is one
    if "generation" in predicted:
        by_generation = figures(labels, predicted["generation"], classes, positive, seed, " by generation")
        found |= {f"generation_{name}": figure for name, figure in by_generation.items()}
    return found


def _score(
    asked: Classified,
    target: Target,
    side: SideName,
    prompts: Sequence[Prompt],
    settings: Evaluation,
    folder: Path,
) -> list[list[float]]:
    """The log-likelihood of every label word after every prompt, [rows][words]."""
    rows = asked.rows

    def score(share: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        with target.side(side) as model:
            for batch in batches_by_length([len(prompts[i].prefix) for i in share], settings.batch_tokens):
                chosen = [share[i] for i in batch]
                found = continuation_log_likelihoods(
                    model,
                    [prompts[i].prefix for i in chosen],
                    [prompts[i].continuations for i in chosen],
                    target.tokenizer.pad_token_id,
                    target.device,
                )
                for index, values in zip(chosen, found, strict=True):
                    yield index, {"row": rows[index].row, "label": rows[index].label, "log_likelihoods": values}

    records = complete(
        folder / f"logprob-{side}.jsonl",
        [key_of(target.identity[side], prompt.prefix, prompt.continuations) for prompt in prompts],
        score,
        target.world,
        costs=[len(prompt.prefix) for prompt in prompts],
        title=f"{asked.name}, {side}, likelihoods",
    )
    return [record["log_likelihoods"] for record in records]


class _PromptEngine(TransformersEngine):
    """Continues prompts that are tokenized already, in the recipe's template and truncated to its length."""

    def __init__(self, target: Target, side: SideName, ids: dict[str, list[int]], batch_tokens: int) -> None:
        identity = {"weights": target.identity[side]}
        super().__init__(target.model, target.tokenizer, identity, batch_tokens=batch_tokens, template="plain")
        self._tokens = ids

    def prompt(self, messages: Sequence[Any]) -> str:
        return str(messages[-1]["content"])

    def _ids(self, prompt: str) -> list[int]:
        return self._tokens[prompt]


def _write(asked: Classified, target: Target, side: SideName, settings: Evaluation, folder: Path) -> list[str]:
    """What the model writes after every prompt, greedily. The cache also gets each row's label and the parsed
    class."""
    rows, prompts, words = asked.rows, asked.prompts, asked.words
    texts = [target.tokenizer.decode(prompt.prefix) for prompt in prompts]
    ids = {text: prompt.prefix for text, prompt in zip(texts, prompts, strict=True)}
    sampling = Sampling(asked.settings.max_new_tokens)
    items = [Item(({"role": "user", "content": text},), sampling) for text in texts]
    path = folder / f"generation-{side}.jsonl"
    with target.side(side):
        engine = _PromptEngine(target, side, ids, settings.generation.batch_tokens)
        answers = generate(engine, items, target.world, path, f"{asked.name}, {side}, answers")
    if target.world.is_main:
        review_of = dict(reversed([*zip(texts, rows, strict=True)]))  # the first of equal prompts, as in the cache
        lines = [_annotate(record, review_of.get(record["prompt"]), words) for record in read_lines(path)]
        write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return [answer.text for answer in answers]


def _annotate(record: dict[str, Any], review: Review | None, words: Sequence[str]) -> dict[str, Any]:
    """An answer's record with its review and how it was read: two class numbers, `read` null without a label word."""
    if review is None:  # of other settings
        return record
    return {**record, "row": review.row, "label": review.label, "read": parse(record["text"], words)}


def parse(text: str, words: Sequence[str]) -> int | None:
    """The class that an answer names: it must begin with a label word, in any case and with any punctuation around it.

    None otherwise: a word further on may be part of anything ("not positive").
    """
    stripped = re.sub(r"^[\W_]+", "", text).lower()
    for label, word in sorted(enumerate(words), key=lambda item: -len(item[1])):
        name = word.strip().lower()
        if re.match(re.escape(name) + ("" if ord(name[-1]) >= _NO_SPACES else r"(?![^\W_])"), stripped):
            return label
    return None
