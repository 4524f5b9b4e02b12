"""Collective operations on Python objects, and agreeing on failures so that no rank waits for one that has left.

Every function here must be called by all ranks, in the same order.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Literal, TypeVar

from distft.distributed.signals import STOP
from distft.distributed.world import World
from distft.errors import DistftError, Interrupted

T = TypeVar("T")


def gather(value: T, world: World) -> list[T]:
    """Return the `value` of every rank, in rank order, on all ranks. The values must be picklable."""
    if world.world_size == 1:
        return [value]
    from torch import distributed

    everywhere = [value] * world.world_size
    distributed.all_gather_object(everywhere, value)
    return everywhere


def broadcast(value: T, world: World) -> T:
    """Return the `value` of rank 0 on all ranks. It must be picklable."""
    if world.world_size == 1:
        return value
    from torch import distributed

    shared = [value]
    distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def reduce(numbers: Sequence[float], how: Literal["max", "sum"], world: World) -> list[float]:
    """Return the element-wise maximum or sum of `numbers` over all ranks, on all ranks."""
    columns = zip(*gather(numbers, world), strict=True)
    return [max(column) if how == "max" else sum(column) for column in columns]


def first_failure(failure: T | None, world: World) -> tuple[int, T] | None:
    """Return the lowest rank that has a `failure`, with that failure, on all ranks; None if no rank has one."""
    return next(((rank, found) for rank, found in enumerate(gather(failure, world)) if found is not None), None)


def together(world: World, work: Callable[[], T]) -> T:
    """Run `work` on every rank. If it raises on any rank, or any rank has received a signal, every rank raises.

    Starts the process group if there is none yet. It does so after `work`, so that slow work does not count towards
    the timeout.

    Raises:
        DistftError: this rank's own error, or that of the lowest rank that has one.
    """
    error: DistftError | None = None
    result: T | None = None
    try:
        result = work()
    except DistftError as caught:
        error = caught
    if error is None and STOP.deferred and STOP.signum is not None:
        error = Interrupted(signal.Signals(STOP.signum).name)
    if world.world_size > 1:
        _start_process_group(world)
        first = first_failure(error, world)
        if error is None and first is not None:
            error = first[1]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _start_process_group(world: World) -> None:
    """Start it the way the trainer will, unless it is running already."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=world.timeout_s))
