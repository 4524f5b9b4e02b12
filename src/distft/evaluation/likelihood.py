"""Log-likelihoods of given tokens, in nats: of the trained tokens of samples, and of continuations of prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from distft.data.tokenize import IGNORED
from distft.errors import ModelError

Tokens = Sequence[int]


def _padded(rows: Sequence[Tokens], fill: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the right as ids [rows, longest], and their mask (1 for a token)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *([fill] * (longest - len(row)))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def trained_log_likelihoods(
    model: Any, rows: Sequence[Tokens], labels: Sequence[Tokens], pad: int, device: torch.device
) -> list[float]:
    """For each row, the sum of the log-probabilities of the tokens whose label is not -100, in one forward pass.

    Raises:
        ModelError: a sum is not finite.
    """
    ids, mask = _padded(rows, pad, device)
    targets, _ = _padded(labels, IGNORED, device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = []
    for row in range(len(rows)):  # row by row: fp32 logits of the whole batch could fill the device
        losses = torch.nn.functional.cross_entropy(
            logits[row, :-1].float(), targets[row, 1:], ignore_index=IGNORED, reduction="none"
        )
        found.append(-float(losses.double().sum()))
    return _finite(found)


def continuation_log_likelihoods(
    model: Any, prefixes: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]], pad: int, device: torch.device
) -> list[list[float]]:
    """log P(continuation | prefix) as [prefixes][continuations], reading each prefix once.

    Every prefix must have the same number of continuations. Their first tokens are scored by the prefix's last logits.
    Only if a continuation has several tokens is the prefix's key-value cache used to score the rest.

    Raises:
        ModelError: a log-likelihood is not finite.
    """
    ids, mask = _padded(prefixes, pad, device)
    lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)
    several = any(len(tokens) > 1 for row in continuations for tokens in row)
    # The vocabulary is large, so compute logits only where prefixes end.
    ends, place = torch.unique(lengths - 1, return_inverse=True)
    output = model(input_ids=ids, attention_mask=mask, use_cache=several, logits_to_keep=ends)
    last = output.logits[torch.arange(len(prefixes), device=device), place].float().log_softmax(-1)
    found = [[float(last[row, tokens[0]]) for tokens in continuations[row]] for row in range(len(prefixes))]
    if not several:
        return [_finite(row) for row in found]
    cache = output.past_key_values
    for number in range(len(continuations[0])):
        tails = [row[number] for row in continuations]
        longest = max(map(len, tails))
        if longest == 1:
            continue
        fed, fed_mask = _padded([[*tokens[:-1], *([pad] if len(tokens) == 1 else [])] for tokens in tails], pad, device)
        steps = torch.arange(fed.shape[1], device=device)
        output = model(
            input_ids=fed,
            attention_mask=torch.cat([mask, fed_mask], 1),
            position_ids=lengths[:, None] + steps,
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits.float().log_softmax(-1)
        for row, tokens in enumerate(tails):
            found[row][number] += sum(float(logits[row, step, token]) for step, token in enumerate(tokens[1:]))
        cache.crop(-fed.shape[1])  # back to the prefix for the next continuation
    return [_finite(row) for row in found]


def _finite(values: list[float]) -> list[float]:
    """The values, if all are finite: a NaN would pass for the largest value, and its class for the likeliest."""
    if not all(map(math.isfinite, values)):
        raise ModelError(
            "the model's log-likelihoods are NaN or infinite, so nothing can be measured: its weights are damaged, or "
            "its dtype overflows (try model.dtype=bfloat16 or float32)"
        )
    return values
