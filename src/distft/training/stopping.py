"""Signals and deadlines during training: all ranks agree on one step and stop there, with a checkpoint or with the result."""

from __future__ import annotations

import signal
import time
from typing import Any

from transformers import TrainerCallback

from distft import upstream_api
from distft.distributed.signals import STOP
from distft.distributed.world import World
from distft.errors import Interrupted

_KEY = "distft/stop"
_ENOUGH = "run.train_time"


class StopTogether(TrainerCallback):  # type: ignore[misc]
    """A signal that any rank got, or a deadline that comes near, stops all ranks after the same step, with a checkpoint.

    The rank that was asked proposes the step after next in the process group's store. No rank can be beyond it by then: to
    finish the next step it needs that rank's gradients. The store answers on the host, so the device never waits.
    `began` is a Unix time, `max_time_s` what may pass from then on. Once `train_time_s` were trained, of which earlier starts had
    `trained_s`, the training ends as after its last step.
    """

    def __init__(
        self,
        world: World,
        began: float,
        max_time_s: float | None,
        train_time_s: float | None = None,
        trained_s: float = 0.0,
    ) -> None:
        self._several = world.world_size > 1
        self._left_s = None if train_time_s is None else train_time_s - trained_s
        self._enough: float | None = None
        self._stopped: tuple[int, str] | None = None
        self._deadline = None if max_time_s is None else began + max_time_s
        self._step_s = 0.0
        self._save_s = 0.0 if max_time_s is None else min(30.0, max_time_s / 10)  # until one has been measured
        self._clock = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        STOP.deferred = STOP.training = True
        self._enough = None if self._left_s is None else time.monotonic() + self._left_s

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self._step_s, self._clock = max(self._step_s, now - self._clock), now
        plan = self._plan(state.global_step)
        if plan is not None and state.global_step >= plan[0]:
            control.should_training_stop = True
            if plan[1] != _ENOUGH:
                self._stopped = plan
                control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._save_s = max(self._save_s, time.monotonic() - self._clock)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        STOP.deferred = STOP.training = False

    def _asked(self) -> str | None:
        """What asks this rank to stop, in words."""
        if STOP.signum is not None:
            return signal.Signals(STOP.signum).name
        # Two more steps and the save have to fit, each taken as long as the longest so far and half as long again.
        if self._deadline is not None and time.time() + 1.5 * (2 * self._step_s + self._save_s) > self._deadline:
            return "run.max_time"
        return _ENOUGH if self._enough is not None and time.monotonic() >= self._enough else None

    def _plan(self, step: int) -> tuple[int, str] | None:
        """The step to stop after and what asked for it, if any rank was asked."""
        asked = self._asked()
        if not self._several:
            return None if asked is None else (step, asked)
        store = upstream_api.default_store()
        if asked is not None:
            store.compare_set(_KEY, "", f"{step + 2} {asked}")  # the first proposal stands
        if not store.check([_KEY]):
            return None
        at, asked = store.get(_KEY).decode().split()
        return int(at), asked

    @property
    def stopped(self) -> bool:
        """Whether the run was stopped before its last step; the same on every rank."""
        return self._stopped is not None

    def raise_if_stopped(self, saved: int | None) -> None:
        """End a run that was stopped before its last step; `saved` is the step of the last checkpoint of this process.

        Raises:
            Interrupted: on every rank.
        """
        if self._stopped is not None:
            step, by = self._stopped
            kept = "its checkpoint is saved" if saved == step else "its checkpoint could not be saved, only older ones"
            raise Interrupted(by, f"after step {step}; {kept}, and the same command goes on from there")
