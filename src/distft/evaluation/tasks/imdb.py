"""Classification of reviews by a causal model: by the likelihood of the label words, and by what it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from distft import hub
from distft.config.evaluation import Evaluation
from distft.config.recipe import Recipe
from distft.console import say
from distft.data import reviews
from distft.data.batch_plan import batches_by_length
from distft.data.formats import format_of
from distft.distributed.collectives import together
from distft.errors import DataError
from distft.evaluation.cache import complete, key_of
from distft.evaluation.engines.transformers import TransformersEngine
from distft.evaluation.generate import Item, Sampling, generate
from distft.evaluation.likelihood import continuation_log_likelihoods
from distft.evaluation.overlap import overlap
from distft.evaluation.sets import DataOf
from distft.evaluation.target import SideName, Target
from distft.evaluation.tasks import InputFile, Task
from distft.evaluation.tasks.classification import Classes, confusion, figures
from distft.files import read_lines, write_atomically

_EXAMPLES = 5
"""Unparsable answers in the result; the cache has all of them."""


class ImdbTask(Task):
    """Classify the reviews with both sides."""

    files = (InputFile("imdb.path", "reviews with classes", required=False),)
    packages: ClassVar = {"sklearn": "scikit-learn"}

    def data(self, recipe: Recipe) -> DataOf:
        source = reviews.source_of(recipe)
        return DataOf.held_out(recipe) if source is None else DataOf.at(source)

    def reads(self, recipe: Recipe) -> Mapping[str, Callable[[], object]]:
        key = "evaluation.imdb" if recipe.evaluation.imdb.path is None else "evaluation.imdb.path"
        return {key: lambda: _check_reviews(recipe)}

    def fetch(self, recipe: Recipe) -> list[str]:
        source = reviews.source_of(recipe)
        return [] if source is None else [hub.fetch_data(source)]

    def not_fetched(self, recipe: Recipe) -> list[str]:
        source = reviews.source_of(recipe)
        return [] if source is None else hub.missing_data(recipe, source)

    def run(self, target: Target, settings: Evaluation, folder: Path) -> dict[str, Any]:
        """Raises:
        DataError: the reviews cannot be loaded.
        """
        section, recipe, world = settings.imdb, target.recipe, target.world
        words = together(world, lambda: reviews.words_of(recipe))
        available = together(world, lambda: reviews.load(recipe, len(words)))
        rows = together(world, lambda: reviews.select(recipe, available, len(words)))
        if section.balanced and section.subset is None and len(rows) < len(available) and world.is_main:
            say(
                f"imdb: {len(rows)} of {len(available)} reviews, the same number of each class "
                "(evaluation.imdb.balanced=false takes all)"
            )
        max_length = section.max_length or recipe.training.get("max_length", 1024)
        prompts = [reviews.prompt_of(row.text, words, target.tokenizer, max_length) for row in rows]
        if "generation" in section.methods:
            together(world, lambda: _check_room(prompts, words, section.max_new_tokens))
        # If "good" is scored without its end, "good not" can never be likelier. With it, as in training, it can.
        ends = any(prompt.nested for prompt in prompts)
        scored = [prompt.ended(target.tokenizer.eos_token_id) for prompt in prompts] if ends else prompts
        labels: Classes = np.array([row.label for row in rows])
        predicted: dict[str, dict[SideName, Classes]] = {method: {} for method in section.methods}
        unparsed: dict[SideName, list[str]] = {}
        for side in target.sides:
            if "logprob" in section.methods:
                likelihoods = _score(target, side, rows, scored, settings, folder)
                predicted["logprob"][side] = np.array([int(np.argmax(row)) for row in likelihoods])
            if "generation" in section.methods:
                answers = _write(target, side, rows, prompts, words, settings, folder)
                classes = [parse(answer, words) for answer in answers]
                predicted["generation"][side] = np.array([len(words) if one is None else one for one in classes])
                unparsed[side] = [answer for answer, one in zip(answers, classes, strict=True) if one is None]
        return {
            "reviews": len(rows),
            "of_class": np.bincount(labels, minlength=len(words)).tolist(),
            "label_words": words,
            "end_scored": ends,
            "items_digest": key_of([(row.text, row.label) for row in rows]),
            "overlap": overlap(target, [row.text for row in rows]),
            "template": {"name": "review", "why": _why_reviews(target)},
            "positive": words[section.positive],
            "balanced": section.balanced,
            "seed": settings.seed,
            "figures": _figures(labels, predicted, len(words), settings),
            "confusion": {
                "rows": words,
                "columns": [*words, "unparsed"],
                **{
                    method: {side: confusion(labels, values, len(words)) for side, values in sides.items()}
                    for method, sides in predicted.items()
                },
            },
            "unparsed": {side: {"count": len(texts), "first": texts[:_EXAMPLES]} for side, texts in unparsed.items()},
        }


TASK = ImdbTask()


def _check_reviews(recipe: Recipe) -> None:
    words, positive = reviews.words_of(recipe), recipe.evaluation.imdb.positive
    if positive >= len(words):
        raise DataError(
            f"positive={positive} is not a class: the label words ({', '.join(words)}) are 0 to {len(words) - 1}"
        )
    reviews.select(recipe, reviews.load(recipe, len(words)), len(words))


def _why_reviews(target: Target) -> str:
    form = None if target.trained is None else format_of(target.trained.recipe.data)
    return "as in training" if form is not None and form.review else "the task's own"


def _check_room(prompts: Sequence[reviews.Prompt], words: Sequence[str], limit: int) -> None:
    """Raises DataError if a label word is longer than an answer may be: the model could never write it."""
    longest = [max(len(prompt.continuations[label]) for prompt in prompts) for label in range(len(words))]
    if too_long := [
        f"{word!r} ({tokens} tokens)" for word, tokens in zip(words, longest, strict=True) if tokens > limit
    ]:
        raise DataError(
            f"{', '.join(too_long)}: longer than an answer may be, so the model could never write it; set "
            f"evaluation.imdb.max_new_tokens={max(longest) + 1} (now {limit})"
        )


def _figures(
    labels: Classes, predicted: Mapping[str, Mapping[SideName, Classes]], classes: int, settings: Evaluation
) -> dict[str, Any]:
    """The figures of both methods; those by generation are named `generation_…`."""
    found: dict[str, Any] = {}
    positive, seed = settings.imdb.positive, settings.seed
    if "logprob" in predicted:
        found |= figures(labels, predicted["logprob"], classes, positive, seed)
        del found["unparsed"]  # the likeliest label word always is one
    if "generation" in predicted:
        by_generation = figures(labels, predicted["generation"], classes, positive, seed, " by generation")
        found |= {f"generation_{name}": figure for name, figure in by_generation.items()}
    return found


def _score(
    target: Target,
    side: SideName,
    rows: Sequence[reviews.Review],
    prompts: Sequence[reviews.Prompt],
    settings: Evaluation,
    folder: Path,
) -> list[list[float]]:
    """The log-likelihood of every label word after every prompt, [reviews][words]."""

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
        title=f"imdb, {side}, likelihoods",
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


def _write(
    target: Target,
    side: SideName,
    rows: Sequence[reviews.Review],
    prompts: Sequence[reviews.Prompt],
    words: Sequence[str],
    settings: Evaluation,
    folder: Path,
) -> list[str]:
    """What the model writes after every prompt, greedily. The cache also gets each review's label and the parsed
    class."""
    texts = [target.tokenizer.decode(prompt.prefix) for prompt in prompts]
    ids = {text: prompt.prefix for text, prompt in zip(texts, prompts, strict=True)}
    sampling = Sampling(settings.imdb.max_new_tokens)
    items = [Item(({"role": "user", "content": text},), sampling) for text in texts]
    path = folder / f"generation-{side}.jsonl"
    with target.side(side):
        engine = _PromptEngine(target, side, ids, settings.generation.batch_tokens)
        answers = generate(engine, items, target.world, path, f"imdb, {side}, answers")
    if target.world.is_main:
        review_of = dict(reversed([*zip(texts, rows, strict=True)]))  # the first of equal prompts, as in the cache
        lines = [_annotate(record, review_of.get(record["prompt"]), words) for record in read_lines(path)]
        write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return [answer.text for answer in answers]


def _annotate(record: dict[str, Any], review: reviews.Review | None, words: Sequence[str]) -> dict[str, Any]:
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
        if re.match(re.escape(word.strip().lower()) + r"(?![a-z0-9])", stripped):
            return label
    return None
