"""How far apart two models are on the same tokens: KL divergence, top-1 agreement, perplexity, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distft.stats import Estimate, bootstrap_weights

_EQUAL = 1e-4
"""Log-probabilities that differ by no more, in nats, are equal: in fp32, sums that are taken in another order do."""
_RESAMPLES = 2_000
Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for one row, at each token of its answers.

    `tokens` and `logs` [positions, K] have the likeliest tokens and their log-probabilities in descending order, in
    nats; `reference` [positions] the log-probability of the token that stands there.
    """

    tokens: Ints
    logs: Floats
    reference: Floats


@dataclass(frozen=True)
class Distance:
    """Of the second model from the first. Intervals (95%) are from resampling rows, whose tokens depend on each other.

    `kl` is KL(first ‖ second) in nats per token, with all tokens that are not among the likeliest of both as one: never
    more than the whole divergence. `largest` is the largest difference between log-probabilities of reference tokens.
    """

    kl: Estimate
    agreement: Estimate
    perplexity: tuple[float, float]
    largest: float
    positions: int

    @property
    def equal(self) -> bool:
        return self.largest <= _EQUAL and self.kl.value <= _EQUAL

    def record(self) -> dict[str, Any]:
        return {
            "kl": vars(self.kl),
            "top1_agreement": vars(self.agreement),
            "perplexity": list(self.perplexity),
            "largest_difference": self.largest,
            "positions": self.positions,
            "equal": self.equal,
        }

    def __str__(self) -> str:
        if self.equal:
            return f"equal at {self.positions:,} positions"
        kl, top = self.kl, self.agreement
        return (
            f"KL {kl.value:.2g} [{kl.low:.2g}, {kl.high:.2g}], top-1 {top.value:.1%} [{top.low:.1%}, {top.high:.1%}], "
            f"perplexity {self.perplexity[0]:,.3f} → {self.perplexity[1]:,.3f}"
        )


def distance(one: Sequence[Predictions], other: Sequence[Predictions]) -> Distance:
    """How far `other` is from `one`, which have the same rows."""
    sums = np.array([_of_row(first, second) for first, second in zip(one, other, strict=True)])  # [rows, 3]
    total = sums.sum(0)
    with np.errstate(invalid="ignore"):  # an infinite divergence times 0
        weights = bootstrap_weights(len(sums), 0, _RESAMPLES) @ sums
        kls, tops = weights[:, 0] / weights[:, 2], weights[:, 1] / weights[:, 2]
    positions = int(total[2])
    share = Estimate.proportion(total[1] / positions, positions)
    resampled = Estimate.bootstrap(share.value, tops)
    top = Estimate(share.value, min(share.low, resampled.low), max(share.high, resampled.high))
    references = [np.concatenate([row.reference for row in side]) for side in (one, other)]
    gap = np.abs(references[0] - references[1])
    return Distance(
        Estimate.bootstrap(total[0] / positions, kls),
        top,
        (_perplexity(references[0]), _perplexity(references[1])),
        float(gap.max()) if np.isfinite(gap).all() else math.inf,
        positions,
    )


def _perplexity(logs: Floats) -> float:
    mean = float(-logs.mean())
    return math.exp(mean) if mean < 700 else math.inf


def _of_row(one: Predictions, other: Predictions) -> tuple[float, float, float]:
    """The sums of a row: KL divergence, positions where the likeliest token is the same, positions."""
    kl = 0.0
    for tokens, logs, others, theirs in zip(one.tokens, one.logs, other.tokens, other.logs, strict=True):
        _, here, there = np.intersect1d(tokens, others, assume_unique=True, return_indices=True)
        kl += _divergence(logs[here], theirs[there])
    same = float((one.tokens[:, 0] == other.tokens[:, 0]).sum())
    return kl, same, float(len(one.tokens))


def _divergence(p_logs: Floats, q_logs: Floats) -> float:
    """KL(p ‖ q) over some tokens and the rest as one token."""
    if not (np.isfinite(p_logs).all() and np.isfinite(q_logs).all()):
        return math.inf
    p, q = np.exp(p_logs), np.exp(q_logs)
    rest = max(1 - p.sum(), 1e-12), max(1 - q.sum(), 1e-12)
    return max(float((p * (p_logs - q_logs)).sum() + rest[0] * math.log(rest[0] / rest[1])), 0.0)
