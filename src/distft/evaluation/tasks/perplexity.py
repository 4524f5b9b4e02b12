"""Perplexity on the held-out split: base and adapter on the same tokens, those that the training loss counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distft.config.evaluation import Evaluation
from distft.config.recipe import Recipe
from distft.data.batch_plan import batches_by_length
from distft.data.formats import check_columns
from distft.data.sources import data_sources, parts_of, read_data
from distft.data.splits import first_samples
from distft.data.tokenize import IGNORED
from distft.errors import DataError
from distft.evaluation.cache import complete, key_of
from distft.evaluation.likelihood import trained_log_likelihoods
from distft.evaluation.metrics import figure_of
from distft.evaluation.overlap import overlap
from distft.evaluation.target import SideName, Target
from distft.evaluation.tasks import Task
from distft.stats import Estimate, Floats, bootstrap_weights

_NOTHING_HELD_OUT = "the recipe holds out no rows to measure perplexity on; set data.test_fraction or data.test_path"


class PerplexityTask(Task):
    """exp of the mean negative log-likelihood per token, in nats, with bootstrap intervals over samples."""

    def reads(self, recipe: Recipe) -> Mapping[str, Callable[[], object]]:
        return {"data": lambda: _check_held_out(recipe)}

    def run(self, target: Target, settings: Evaluation, folder: Path) -> dict[str, Any]:
        """Raises:
        DataError: the recipe holds out no rows.
        """
        rows = first_samples(target.held_out(), settings.max_samples)
        if rows is None or not len(rows):
            raise DataError(_NOTHING_HELD_OUT)
        ids, labels = [list(row) for row in rows["input_ids"]], [list(row) for row in rows["labels"]]
        tokens = np.array([sum(label != IGNORED for label in row) for row in labels], dtype=np.float64)
        sums = {side: _score(target, side, ids, labels, settings, folder) for side in target.sides}
        return {
            "samples": len(ids),
            "tokens": int(tokens.sum()),
            "items_digest": key_of(ids, labels),
            "overlap": overlap(target),
            "figures": figures(sums, tokens, settings.seed),
        }


TASK = PerplexityTask()


def _check_held_out(recipe: Recipe) -> None:
    for data in parts_of(recipe.data).values():
        sources = data_sources(data)
        if len(sources) == 1 and data.test_fraction == 0:
            raise DataError(_NOTHING_HELD_OUT)
        for rows in read_data(data):
            check_columns(rows, data)


def _score(
    target: Target,
    side: SideName,
    ids: list[list[int]],
    labels: list[list[int]],
    settings: Evaluation,
    folder: Path,
) -> Floats:
    """The negative log-likelihood of each sample's trained tokens, [samples], in nats."""

    def score(share: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        with target.side(side) as model:
            for batch in batches_by_length([len(ids[i]) for i in share], settings.batch_tokens):
                chosen = [share[i] for i in batch]
                found = trained_log_likelihoods(
                    model,
                    [ids[i] for i in chosen],
                    [labels[i] for i in chosen],
                    target.tokenizer.pad_token_id,
                    target.device,
                )
                for index, value in zip(chosen, found, strict=True):
                    count = sum(label != IGNORED for label in labels[index])
                    yield index, {"sample": index, "tokens": count, "log_likelihood": value}

    records = complete(
        folder / f"{side}.jsonl",
        [key_of(target.identity[side], row, label) for row, label in zip(ids, labels, strict=True)],
        score,
        target.world,
        costs=[len(row) for row in ids],
        title=f"perplexity, {side}",
    )
    return np.array([-record["log_likelihood"] for record in records])


def figures(sums: dict[SideName, Floats], tokens: Floats, seed: int) -> dict[str, Any]:
    """Perplexity and loss.

    Args:
        sums: the negative log-likelihood of each sample on each side, [samples], in nats.
        tokens: the number of tokens of each sample, [samples].
        seed: of the bootstrap.
    """
    weights = bootstrap_weights(len(tokens), seed)
    drawn = weights @ tokens
    losses = {side: (float(nll.sum() / tokens.sum()), (weights @ nll) / drawn) for side, nll in sums.items()}

    def estimates(of: Any) -> list[Estimate | None]:
        sides = [Estimate.bootstrap(float(of(value)), of(resampled)) for value, resampled in losses.values()]
        if len(sides) < 2:
            return [*sides, None, None]
        (base, bases), (adapter, adapters) = losses["base"], losses["adapter"]
        return [*sides, Estimate.bootstrap(float(of(adapter) - of(base)), of(adapters) - of(bases))]

    count = len(tokens)
    with np.errstate(over="ignore"):
        perplexity = estimates(np.exp)
    loss = estimates(lambda value: value)
    assert all(side is None or not math.isnan(side.value) for side in loss)
    return {
        "perplexity": figure_of(*perplexity, title="held-out perplexity", better="lower", form=",.2f", count=count),
        "loss": figure_of(*loss, title="held-out loss, nats per token", better="lower", form=",.4f", count=count),
    }
