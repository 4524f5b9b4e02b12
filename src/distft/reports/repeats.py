"""What the file of an experiment asks of a report: repeats with seeds of their own, and the time to reach a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from distft.reports.results import DATA, HELD_OUT, Run
from distft.runs.figures import FIGURES

_OF_THE_SEED = ("run.seed", DATA, HELD_OUT)
"""Facts that the seed determines: it also decides which rows are held out."""
TO_LOSS = tuple(figure.key for figure in FIGURES if figure.until_loss)
"""Figures that only an experiment with a target has."""
_PAIRED = "one for each seed"


def pair_by_seed(runs: Sequence[Run]) -> list[Run]:
    """The runs, with the same value for each fact that the seed determines, so that those with different seeds are
    repeats. A fact that differs between runs with the same seed is left as it is."""
    by_seed: dict[object, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.facts.get("run.seed"), []).append(run)
    alike = [
        key
        for key in _OF_THE_SEED
        if all(len({run.facts[key] for run in those if key in run.facts}) <= 1 for those in by_seed.values())
    ]
    return [replace(run, facts={**run.facts, **{key: _PAIRED for key in alike if key in run.facts}}) for run in runs]


def target_of(runs: Sequence[Run], asked: float | Literal["worst"] | None) -> float | None:
    """The loss to reach, in nats: the one that is asked for, or the worst last one of the finished runs, which all of
    them reach. None if there is no evaluation, or no loss is asked for."""
    if asked != "worst":
        return asked
    last = [run.evaluated[-1][2] for run in runs if run.finished and run.evaluated]
    return max(filter(math.isfinite, last), default=None)


def with_target(runs: Sequence[Run], target: float | None) -> list[Run]:
    """The runs, with the figures of how long they took to the first evaluation whose loss is at most `target`:
    infinitely long for a finished run that never got there."""
    return list(runs) if target is None else [_reaching(run, target) for run in runs]


def _reaching(run: Run, target: float) -> Run:
    never = (math.inf, math.inf) if run.finished and run.evaluated else (None, None)
    reached = ((step, seconds) for step, seconds, loss in run.evaluated if loss <= target)
    return replace(run, figures={**run.figures, **dict(zip(TO_LOSS, next(reached, never), strict=True))})
