"""Perplexity on the held-out split: base and adapter on the same tokens, those that training's loss looks at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distft.config.evaluation import Evaluation
from distft.data.batch_plan import batches_by_length
from distft.data.prepare import first_samples
from distft.data.tokenize import IGNORED
from distft.errors import DataError
from distft.evaluation.cache import complete, key_of
from distft.evaluation.likelihood import trained_log_likelihoods
from distft.evaluation.metrics import Estimate, Floats, bootstrap_weights, compared
from distft.evaluation.target import SideName, Target


def run(target: Target, settings: Evaluation, folder: Path) -> dict[str, Any]:
    """exp of the mean negative log-likelihood (nats) of a token, with bootstrap intervals over samples. All ranks enter.

    Raises:
        DataError: the recipe holds out no rows.
    """
    rows = first_samples(target.held_out(), settings.max_samples)
    if rows is None or not len(rows):
        raise DataError(
            "the recipe holds out no rows to take the perplexity of; set data.test_fraction, or data.test_path"
        )
    ids, labels = [list(row) for row in rows["input_ids"]], [list(row) for row in rows["labels"]]
    tokens = np.array([sum(label != IGNORED for label in row) for row in labels], dtype=np.float64)
    sums: dict[SideName, Floats] = {}
    for side in target.sides:
        keys = [key_of(target.identity[side], row, label) for row, label in zip(ids, labels, strict=True)]

        def score(share: list[int], side: SideName = side) -> Iterator[tuple[int, dict[str, Any]]]:
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
                        yield index, {"sample": index, "tokens": int(tokens[index]), "log_likelihood": value}

        records = complete(
            folder / f"{side}.jsonl",
            keys,
            score,
            target.world,
            costs=[len(row) for row in ids],
            title=f"perplexity, {side}",
        )
        sums[side] = np.array([-record["log_likelihood"] for record in records])
    return {"samples": len(ids), "tokens": int(tokens.sum()), "figures": figures(sums, tokens, settings.seed)}


def figures(sums: dict[SideName, Floats], tokens: Floats, seed: int) -> dict[str, Any]:
    """Perplexity and loss from each sample's negative log-likelihood `sums` [samples], in nats, and its number of `tokens` [samples]."""
    weights = bootstrap_weights(len(tokens), seed)
    drawn = weights @ tokens
    losses = {side: (float(nll.sum() / tokens.sum()), (weights @ nll) / drawn) for side, nll in sums.items()}

    def estimates(of: Any) -> list[Estimate | None]:
        sides = [Estimate.of(float(of(value)), of(again)) for value, again in losses.values()]
        if len(sides) < 2:
            return [*sides, None, None]
        (base, bases), (adapter, adapters) = losses["base"], losses["adapter"]
        return [*sides, Estimate.of(float(of(adapter) - of(base)), of(adapters) - of(bases))]

    count = len(tokens)
    with np.errstate(over="ignore"):
        perplexity = estimates(np.exp)
    loss = estimates(lambda value: value)
    assert all(side is None or not math.isnan(side.value) for side in loss)
    return {
        "perplexity": compared(*perplexity, title="held-out perplexity", better="lower", form=",.2f", count=count),
        "loss": compared(*loss, title="held-out loss, nats a token", better="lower", form=",.4f", count=count),
    }
