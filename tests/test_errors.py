"""Errors travel between processes: ranks exchange them, and `distft.train` reads them from its workers."""

from __future__ import annotations

import pickle

import pytest

from distft.errors import (
    BadNumbersError,
    DistftError,
    ExperimentError,
    Fault,
    Interrupted,
    MissingExtraError,
    OutOfMemory,
    RankLost,
    RecipeError,
)

FAULTS = [Fault("recipe.yaml", "lora.r", "must be positive"), Fault("command line", "lorra", "unknown key", "lora")]


@pytest.mark.parametrize(
    "error",
    [
        RecipeError(FAULTS),
        ExperimentError(FAULTS),
        MissingExtraError("charts", "matplotlib", "report"),
        BadNumbersError("NaN at step 3", {"step": 3}),
        OutOfMemory("out of memory on rank 1", {"micro_batch": 4}, restart=True),
        RankLost(1, "rank 1 died"),
        Interrupted("SIGTERM", "after step 2"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_its_message_and_attributes(error: DistftError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy), copy.restart) == (str(error), vars(error), error.restart)
