"""Collectives on Python objects, and failures that all ranks learn of: two real processes with gloo."""

from __future__ import annotations

from typing import Any

import pytest

from distft.distributed.collectives import broadcast, first_failure, gather, reduce, together
from distft.distributed.signals import STOP
from distft.distributed.world import World
from distft.errors import DataError, Interrupted

from .conftest import on_two_ranks

PROGRAM = """
import json, os, signal
from distft.distributed.collectives import broadcast, first_failure, gather, reduce, together
from distft.distributed.signals import STOP
from distft.distributed.world import World
from distft.errors import DataError, DistftError

world = World.from_environment(os.environ)
rank = world.rank
found = {}

def fails_on(ranks):
    def work():
        if rank in ranks:
            raise DataError(f"no data on rank {rank}")
        return rank
    return work

def error_of(work):
    try:
        return together(world, work)
    except DistftError as error:
        return f"{type(error).__name__}: {error}"

found["together"] = together(world, lambda: 10 + rank)
found["one fails"] = error_of(fails_on({1}))
found["both fail"] = error_of(fails_on({0, 1}))
found["gather"] = gather({"rank": rank}, world)
found["broadcast"] = broadcast(f"from {rank}", world)
found["max"], found["sum"] = reduce([rank, -rank], "max", world), reduce([rank, 1.5], "sum", world)
found["first failure"] = first_failure("broken" if rank == 1 else None, world)
found["no failure"] = first_failure(None, world)
STOP.deferred = True
if rank == 1:
    STOP.signum = signal.SIGTERM
found["signal"] = error_of(lambda: None)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each of two ranks has found."""
    return on_two_ranks(PROGRAM)


def test_together_returns_each_rank_s_own_result(ranks: list[dict[str, Any]]) -> None:
    assert [rank["together"] for rank in ranks] == [10, 11]


def test_a_failure_of_one_rank_is_raised_on_all(ranks: list[dict[str, Any]]) -> None:
    assert [rank["one fails"] for rank in ranks] == ["DataError: no data on rank 1"] * 2


def test_a_rank_that_failed_raises_its_own_error(ranks: list[dict[str, Any]]) -> None:
    assert [rank["both fail"] for rank in ranks] == [f"DataError: no data on rank {rank}" for rank in (0, 1)]


def test_a_deferred_signal_to_one_rank_interrupts_all(ranks: list[dict[str, Any]]) -> None:
    assert [rank["signal"] for rank in ranks] == ["Interrupted: stopped by SIGTERM"] * 2


def test_values_are_gathered_broadcast_and_reduced_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["gather"] == [{"rank": 0}, {"rank": 1}]
        assert rank["broadcast"] == "from 0"
        assert (rank["max"], rank["sum"]) == ([1, 0], [1, 3.0])


def test_the_first_failure_is_known_to_all_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [rank["first failure"] for rank in ranks] == [[1, "broken"]] * 2
    assert [rank["no failure"] for rank in ranks] == [None] * 2


def test_a_single_process_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise DataError("no data")

    alone = World()
    assert gather(1, alone) == [1] and broadcast(1, alone) == 1 and reduce([1.0, 2.0], "sum", alone) == [1.0, 2.0]
    assert first_failure("broken", alone) == (0, "broken") and first_failure(None, alone) is None
    assert together(alone, lambda: 3) == 3
    with pytest.raises(DataError, match="no data"):
        together(alone, fail)
    monkeypatch.setattr(STOP, "deferred", True)
    monkeypatch.setattr(STOP, "signum", 15)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        together(alone, lambda: None)
