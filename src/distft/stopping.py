"""Signals during training: all ranks agree on one step, save there, and stop."""

from __future__ import annotations

from typing import Any

from torch import distributed
from transformers import TrainerCallback

from distft.errors import Interrupted
from distft.outcome import STOP
from distft.world import World

_KEY = "distft/stop"


class StopTogether(TrainerCallback):  # type: ignore[misc]
    """A signal that any rank got stops all ranks after the same step, with a checkpoint.

    The rank that got it proposes the step after next in the process group's store. No rank can be beyond it by then: to
    finish the next step it needs that rank's gradients. The store answers on the host, so the device never waits.
    """

    def __init__(self, world: World) -> None:
        self._several = world.world_size > 1
        self._stopped: tuple[int, int] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        STOP.deferred = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        plan = self._plan(state.global_step)
        if plan is not None and state.global_step >= plan[0]:
            self._stopped = plan
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        STOP.deferred = False

    def _plan(self, step: int) -> tuple[int, int] | None:
        """The step to stop after and the signal that asked for it, if any rank was asked."""
        if not self._several:
            return None if STOP.signum is None else (step, STOP.signum)
        store = distributed.distributed_c10d._get_default_store()
        if STOP.signum is not None:
            store.compare_set(_KEY, "", f"{step + 2} {STOP.signum}")  # the first proposal stands
        if not store.check([_KEY]):
            return None
        at, signum = store.get(_KEY).decode().split()
        return int(at), int(signum)

    def raise_if_stopped(self) -> None:
        """End a run that was stopped before its last step.

        Raises:
            Interrupted: on every rank.
        """
        if self._stopped is not None:
            step, signum = self._stopped
            raise Interrupted(
                signum, f"after step {step}; its checkpoint is saved, and the same command goes on from there"
            )
