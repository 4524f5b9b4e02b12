"""Signals and deadlines during training: all ranks agree on a step and stop after it."""

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
_TRAIN_TIME = "run.train_time"


class StopTogether(TrainerCallback):  # type: ignore[misc]
    """Stops all ranks after the same step, with a checkpoint, on a signal to any rank or near the deadline.

    That rank proposes the step after next in the process group's store. No rank can be beyond it by then, because it
    needs the proposing rank's gradients to finish the next step. The store answers on the host, so the device never
    waits.

    The deadline is `max_time_s` after `began`, a Unix time. After `train_time_s` of training, `trained_s` of which were
    before a resume, training ends as it does after its last step.
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
        self._train_until: float | None = None
        self._stopped: tuple[int, str] | None = None
        self._deadline = None if max_time_s is None else began + max_time_s
        self._step_s = 0.0
        self._save_s = 0.0 if max_time_s is None else min(30.0, max_time_s / 10)  # until a save has been measured
        self._clock = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        STOP.deferred = STOP.training = True
        self._train_until = None if self._left_s is None else time.monotonic() + self._left_s

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self._step_s, self._clock = max(self._step_s, now - self._clock), now
        plan = self._plan(state.global_step)
        if plan is not None and state.global_step >= plan[0]:
            control.should_training_stop = True
            if plan[1] != _TRAIN_TIME:
                self._stopped = plan
                control.should_save, args.save_only_model = True, False  # the run resumes from this checkpoint

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._save_s = max(self._save_s, time.monotonic() - self._clock)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        STOP.deferred = STOP.training = False

    def _asked(self) -> str | None:
        """Return the name of what asks this rank to stop, or None."""
        if STOP.signum is not None:
            return signal.Signals(STOP.signum).name
        # Leave time for two more steps and a save, each 1.5 times as long as the longest so far.
        if self._deadline is not None and time.time() + 1.5 * (2 * self._step_s + self._save_s) > self._deadline:
            return "run.max_time"
        return _TRAIN_TIME if self._train_until is not None and time.monotonic() >= self._train_until else None

    def _plan(self, step: int) -> tuple[int, str] | None:
        """Return the step to stop after and what asks for it, or None if no rank is asked to stop."""
        asked = self._asked()
        if not self._several:
            return None if asked is None else (step, asked)
        store = upstream_api.default_store()
        if asked is not None:
            store.compare_set(_KEY, "", f"{step + 2} {asked}")  # the first proposal wins
        if not store.check([_KEY]):
            return None
        at, asked = store.get(_KEY).decode().split()
        return int(at), asked

    @property
    def stopped(self) -> bool:
        """Whether the run was stopped before its last step; the same on every rank."""
        return self._stopped is not None

    def raise_if_stopped(self, saved: int | None) -> None:
        """Raise if the run was stopped before its last step; `saved` is the step of this process's last checkpoint.

        Raises:
            Interrupted: on every rank.
        """
        if self._stopped is not None:
            step, by = self._stopped
            kept = "saved a checkpoint" if saved == step else "could not save a checkpoint, so an older one remains"
            raise Interrupted(by, f"after step {step}; {kept}. The same command resumes from it")
