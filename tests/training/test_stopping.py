"""The step at which all ranks stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from torch import distributed
from transformers import TrainerControl, TrainerState

from distft.distributed.signals import STOP
from distft.distributed.world import World
from distft.training import stopping
from distft.training.stopping import StopTogether


@pytest.fixture
def store() -> Iterator[None]:
    """The store of a process group, in which the ranks of a run meet: here, all of them are in this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


class Rank:
    """One of two ranks."""

    def __init__(self, rank: int) -> None:
        self.stop = StopTogether(World(rank=rank, local_rank=rank, world_size=2, local_world_size=2), 0.0, None)
        self.control = TrainerControl()

    def end(self, step: int, signum: int | None = None) -> tuple[bool, bool]:
        """End optimizer step `step`, this rank having received `signum`: whether to stop, and whether to save."""
        STOP.signum = signum
        try:
            self.stop.on_step_end(SimpleNamespace(), TrainerState(global_step=step), self.control)
        finally:
            STOP.signum = None
        return self.control.should_training_stop, self.control.should_save


def test_a_rank_that_is_a_step_ahead_stops_at_the_same_step(store: None) -> None:
    """On GPUs, a rank's host has ended step 4 before another's has ended step 3: it cannot be stopped at step 4."""
    ahead, behind = Rank(0), Rank(1)
    for step in (1, 2, 3):
        assert ahead.end(step) == (False, False)
    for step in (1, 2):
        assert behind.end(step) == (False, False)
    assert ahead.end(4) == (False, False)
    assert behind.end(3, signal.SIGTERM) == (False, False)
    assert behind.end(4, signal.SIGTERM) == (False, False)
    assert ahead.end(5) == behind.end(5, signal.SIGTERM) == (True, True)
    assert ahead.stop._stopped == behind.stop._stopped == (5, "SIGTERM")


def test_the_first_proposal_holds_for_all(store: None) -> None:
    one, other = Rank(0), Rank(1)
    assert one.end(3, signal.SIGTERM) == other.end(4, signal.SIGINT) == one.end(4) == (False, False)
    assert one.end(5) == other.end(5, signal.SIGINT) == (True, True)
    assert one.stop._stopped == other.stop._stopped == (5, "SIGTERM")


@pytest.mark.parametrize(("save_s", "stops_after"), [(5.0, 6), (22.0, 3)])
def test_a_run_stops_while_there_is_time_for_two_more_steps_and_a_save(
    save_s: float, stops_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 10 s, the second of them with a save, and 100 s in all: half as much again as two steps and the longest
    save must be left. Until a save is measured, it counts as 10 s."""
    now = [1000.0]
    monkeypatch.setattr(stopping, "time", SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0]))
    stop, control, at = StopTogether(World(), 1000.0, 100.0), TrainerControl(), 0
    while not control.should_training_stop:
        at += 1
        state = TrainerState(global_step=at)
        stop.on_step_begin(None, state, control)
        now[0] += 10.0
        stop.on_step_end(SimpleNamespace(), state, control)
        if at == 2:
            now[0] += save_s
            stop.on_save(None, state, control)
    now[0] += save_s
    assert (at, control.should_save, stop._stopped) == (stops_after, True, (stops_after, "run.max_time"))
    assert now[0] < 1100
