"""Classification of reviews by a causal model: by the likelihood of the label words, and by what it writes.

Metrics are scikit-learn's. Accuracy, precision, recall and what could not be parsed are shares and have Wilson's intervals; those of F1 come
from the bootstrap over reviews, the same for both sides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distft.config.evaluation import Evaluation
from distft.console import say
from distft.data.batch_plan import batches_by_length
from distft.distributed.collectives import together
from distft.evaluation.cache import complete, key_of
from distft.evaluation.engines.transformers import TransformersEngine
from distft.evaluation.generate import Item, Sampling, generate
from distft.evaluation.likelihood import continuation_log_likelihoods
from distft.evaluation.metrics import RESAMPLES, Estimate, Floats, compared, correlation
from distft.evaluation.target import SideName, Target
from distft.evaluation.tasks import reviews
from distft.files import read_lines, write_atomically

_TITLES = {
    "accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "macro_f1": "macro F1",
    "unparsed": "answers without a label word",
}  # fmt: skip
_SHOWN = 5
"""Unparsable answers that the result shows; the journal has all."""


def run(target: Target, settings: Evaluation, folder: Path) -> dict[str, Any]:
    """Classify the reviews with both sides. All ranks enter.

    Raises:
        DataError: the reviews cannot be had.
    """
    section = settings.imdb
    words = together(target.world, lambda: reviews.words_of(target.recipe))
    there = together(target.world, lambda: reviews.load(target.recipe, len(words)))
    rows = together(target.world, lambda: reviews.chosen(target.recipe, there, len(words)))
    if section.balanced and section.subset is None and len(rows) < len(there) and target.world.is_main:
        say(
            f"imdb: {len(rows)} of {len(there)} reviews, as many of each class (evaluation.imdb.balanced=false takes all)"
        )
    limit = section.max_length or target.recipe.training.get("max_length", 1024)
    prompts = [reviews.prompt_of(row.text, words, target.tokenizer, limit) for row in rows]
    labels = np.array([row.label for row in rows])
    found: dict[str, dict[SideName, NDArray[np.int64]]] = {method: {} for method in section.methods}
    unparsed: dict[SideName, list[str]] = {}
    for side in target.sides:
        if "logprob" in section.methods:
            likelihoods = _score(target, side, rows, prompts, settings, folder)
            found["logprob"][side] = np.array([int(np.argmax(row)) for row in likelihoods])
        if "generation" in section.methods:
            answers = _write(target, side, rows, prompts, words, settings, folder)
            read = [parse(answer, words) for answer in answers]
            found["generation"][side] = np.array([len(words) if label is None else label for label in read])
            unparsed[side] = [answer for answer, label in zip(answers, read, strict=True) if label is None]
    figures: dict[str, Any] = {}
    matrices: dict[str, Any] = {}
    for method, predicted in found.items():
        prefix = "" if method == "logprob" else "generation_"
        items = [of_how_many(labels, values, section.positive) for values in predicted.values()]
        # Sides say "positive" of different numbers of reviews: the smaller is the one that counts.
        for name, figure in compare(labels, predicted, len(words), section.positive, settings.seed).items():
            if method == "logprob" and name == "unparsed":
                continue
            how = "" if method == "logprob" else " by generation"
            count = min(side.get(name, len(rows)) for side in items)
            figures[prefix + name] = compared(*figure, title=_TITLES[name] + how, count=count,
                                              better="lower" if name == "unparsed" else "higher")  # fmt: skip
        matrices[method] = {side: confusion(labels, values, len(words)) for side, values in predicted.items()}
    return {
        "reviews": len(rows), "of_class": np.bincount(labels, minlength=len(words)).tolist(), "label_words": words,
        "positive": words[section.positive], "balanced": section.balanced, "seed": settings.seed, "figures": figures,
        "confusion": {"rows": words, "columns": [*words, "unparsed"], **matrices},
        "unparsed": {side: {"count": len(texts), "first": texts[:_SHOWN]} for side, texts in unparsed.items()},
    }  # fmt: skip


def _score(
    target: Target, side: SideName, rows: Sequence[reviews.Review], prompts: Sequence[reviews.Prompt], settings: Evaluation,
    folder: Path,
) -> list[list[float]]:  # fmt: skip
    """The log-likelihood of every label word after every prompt, [reviews][words]."""
    keys = [key_of(target.identity[side], prompt.prefix, prompt.continuations) for prompt in prompts]

    def score(share: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        with target.side(side) as model:
            for batch in batches_by_length([len(prompts[i].prefix) for i in share], settings.batch_tokens):
                chosen = [share[i] for i in batch]
                found = continuation_log_likelihoods(
                    model, [prompts[i].prefix for i in chosen], [prompts[i].continuations for i in chosen],
                    target.tokenizer.pad_token_id, target.device,
                )  # fmt: skip
                for index, values in zip(chosen, found, strict=True):
                    yield index, {"row": rows[index].row, "label": rows[index].label, "log_likelihoods": values}

    costs = [len(prompt.prefix) for prompt in prompts]
    path = folder / f"logprob-{side}.jsonl"
    records = complete(path, keys, score, target.world, costs=costs, title=f"imdb, {side}, likelihoods")
    return [record["log_likelihoods"] for record in records]


class _PromptEngine(TransformersEngine):
    """Goes on after prompts that are tokens already, in the recipe's template and cut to its length."""

    def __init__(self, target: Target, side: SideName, ids: dict[str, list[int]], batch_tokens: int) -> None:
        identity = {"weights": target.identity[side]}
        super().__init__(target.model, target.tokenizer, identity, batch_tokens=batch_tokens, template="plain")
        self._tokens = ids

    def prompt(self, messages: Sequence[Any]) -> str:
        return str(messages[-1]["content"])

    def _ids(self, prompt: str) -> list[int]:
        return self._tokens[prompt]


def _write(
    target: Target, side: SideName, rows: Sequence[reviews.Review], prompts: Sequence[reviews.Prompt], words: Sequence[str],
    settings: Evaluation, folder: Path,
) -> list[str]:  # fmt: skip
    """What the model writes after every prompt, the likeliest token each time; kept with each review's label and the class that was
    read."""
    texts = [target.tokenizer.decode(prompt.prefix) for prompt in prompts]
    ids = {text: prompt.prefix for text, prompt in zip(texts, prompts, strict=True)}
    sampling = Sampling(settings.imdb.max_new_tokens)
    items = [Item(({"role": "user", "content": text},), sampling) for text in texts]
    with target.side(side):
        engine = _PromptEngine(target, side, ids, settings.generation.batch_tokens)
        path = folder / f"generation-{side}.jsonl"
        answers = generate(engine, items, target.world, path, f"imdb, {side}, answers")
    if target.world.is_main:
        of = dict(reversed([*zip(texts, rows, strict=True)]))  # of equal prompts the first, as in the journal
        lines = [_explained(record, of.get(record["prompt"]), words) for record in read_lines(path)]
        write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return [answer.text for answer in answers]


def _explained(record: dict[str, Any], review: reviews.Review | None, words: Sequence[str]) -> dict[str, Any]:
    """The record of an answer with what it was to and how it was read: both class numbers, `read` null where there is no label word."""
    if review is None:  # of other settings
        return record
    return {**record, "row": review.row, "label": review.label, "read": parse(record["text"], words)}


def parse(text: str, words: Sequence[str]) -> int | None:
    """The class that an answer names: it begins with one of the words, whatever its case and what marks stand around it; None where it
    does not, for a word further on may be part of anything ("not positive")."""
    stripped = re.sub(r"^[\W_]+", "", text).lower()
    for label, word in sorted(enumerate(words), key=lambda item: -len(item[1])):
        if re.match(re.escape(word.strip().lower()) + r"(?![a-z0-9])", stripped):
            return label
    return None


def confusion(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> list[list[int]]:
    """Counts, [class][predicted class, and last what could not be parsed]."""
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(labels, predicted, labels=range(classes + 1))[:classes]
    return [[int(count) for count in row] for row in matrix]


def metrics(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int, positive: int) -> dict[str, float]:
    """Accuracy; precision, recall and F1 of the class `positive`; F1 as the mean over classes; the share that could not be parsed.
    A rate of nothing is 0."""
    from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, labels=[positive], average="macro", zero_division=0
    )
    macro = f1_score(labels, predicted, labels=range(classes), average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(labels, predicted)), "precision": float(precision), "recall": float(recall),
            "f1": float(f1), "macro_f1": float(macro), "unparsed": float((predicted == classes).mean())}  # fmt: skip


def resampled(matrices: Floats, positive: int) -> dict[str, Floats]:
    """The same from many confusion matrices at once, [samples, classes, classes + 1] with what could not be parsed in the last column:
    each of [samples]."""
    classes = matrices.shape[1]
    right = np.diagonal(matrices, axis1=1, axis2=2)
    said, there = matrices.sum(1)[:, :classes], matrices.sum(2)

    def rate(part: Floats, whole: Floats) -> Floats:
        return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)

    f1 = rate(2 * right, said + there)
    total = there.sum(1)
    return {
        "accuracy": right.sum(1) / total, "precision": rate(right, said)[:, positive], "recall": rate(right, there)[:, positive],
        "f1": f1[:, positive], "macro_f1": f1.mean(1), "unparsed": matrices[:, :, classes].sum(1) / total,
    }  # fmt: skip


def of_how_many(labels: NDArray[np.int64], predicted: NDArray[np.int64], positive: int) -> dict[str, int]:
    """Of how many reviews each metric that is a share is one: recall of those of the class, precision of those that were said to be."""
    return {
        "accuracy": len(labels), "precision": int((predicted == positive).sum()), "recall": int((labels == positive).sum()),
        "unparsed": len(labels),
    }  # fmt: skip


def compare(
    labels: NDArray[np.int64], predicted: dict[SideName, NDArray[np.int64]], classes: int, positive: int, seed: int
) -> dict[str, list[Estimate | None]]:
    """Every metric of base and adapter (None where there is none) and of their difference, with intervals: of shares Wilson's, and of
    their difference Newcombe's with the correlation that they have in bootstrap samples; of F1 the bootstrap's.

    A bootstrap sample of the reviews is a draw of how often each combination of class and predictions comes (multinomial), so that
    ten thousand of them cost little.
    """
    sides = list(predicted)
    combinations, counts = np.unique(
        np.stack([labels, *(predicted[side] for side in sides)]), axis=1, return_counts=True
    )
    drawn = np.random.default_rng(seed).multinomial(len(labels), counts / len(labels), size=RESAMPLES)
    again: dict[SideName, dict[str, Floats]] = {}
    for number, side in enumerate(sides, 1):
        matrices = np.zeros((RESAMPLES, classes, classes + 1))
        for column, (label, guess) in enumerate(zip(combinations[0], combinations[number], strict=True)):
            matrices[:, label, guess] += drawn[:, column]
        again[side] = resampled(matrices, positive)
    values = {side: metrics(labels, predicted[side], classes, positive) for side in sides}
    items = {side: of_how_many(labels, predicted[side], positive) for side in sides}
    found: dict[str, list[Estimate | None]] = {}
    for name in values[sides[0]]:
        is_share = name in items[sides[0]]
        own = {
            side: Estimate.proportion(values[side][name], items[side][name])
            if is_share
            else Estimate.of(values[side][name], again[side][name])
            for side in sides
        }
        difference = None
        if len(sides) == 2:
            base, adapter = sides
            if is_share:
                difference = Estimate.apart(
                    own[base], own[adapter], correlation(again[base][name], again[adapter][name])
                )
            else:
                value = values[adapter][name] - values[base][name]
                difference = Estimate.of(value, again[adapter][name] - again[base][name])
        found[name] = [*own.values(), *([None] * (2 - len(sides))), difference]
    return found
