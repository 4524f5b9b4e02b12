"""The trackers of a run: on rank 0 only, and never able to fail the run."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from distft.config.recipe import Recipe
from distft.console import say
from distft.distributed.world import World
from distft.runs.folder import RunFolder
from distft.runs.wandb import logged_step, lost_to_signal, start_wandb


class GuardedTracker(TrainerCallback):  # type: ignore[misc]
    """Forwards the trainer's events to a tracker's callback. After its first failure, it is dropped with a warning.

    Args:
        name: what messages call the tracker.
        tracker: the callback that transformers has for it.
        seen: the last step that the tracker has from earlier starts of this run. Repeated steps are left out.
        records: what earlier starts logged (`metrics.jsonl`). Records after `seen`, which the tracker lacks because
            the run was killed, are logged when training begins.
    """

    def __init__(
        self, name: str, tracker: TrainerCallback, seen: int = -1, records: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._name, self._seen = name, seen
        self._tracker: TrainerCallback | None = tracker
        self._missed = [record for record in records if record["step"] > seen]

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forward("on_init_end", args, state, control, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forward("on_train_begin", args, state, control, **kwargs)
        for record in self._missed:
            then = copy.copy(state)
            then.global_step = record["step"]
            # Lists are figures per rank, which only metrics.jsonl has.
            logs = {key: value for key, value in record.items() if key != "step" and not isinstance(value, list)}
            self._forward("on_log", args, then, control, logs=logs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forward("on_step_end", args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.global_step > self._seen or "train_runtime" in logs:
            self._forward("on_log", args, state, control, logs=logs, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forward("on_evaluate", args, state, control, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forward("on_save", args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forward("on_train_end", args, state, control, **kwargs)

    def _forward(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, event)(*args, **kwargs)
        except Exception as error:  # whatever a tracker raises, training continues
            self._tracker = None
            if lost_to_signal(error):
                say(
                    f"the signal ended {self._name}'s service too; it receives the missing records when the run resumes"
                )
            else:
                say(
                    f"warning: {self._name} failed and gets no more records; metrics.jsonl still has every figure "
                    f"({type(error).__name__}: {error})"
                )


def trackers(recipe: Recipe, folder: RunFolder, world: World) -> list[TrainerCallback]:
    """The trackers that the recipe reports to, on rank 0; none elsewhere. Starts or continues the W&B run."""
    if not world.is_main:
        return []
    found: list[TrainerCallback] = []
    for name in recipe.tracking.report_to:
        seen, records = -1, []
        if name == "wandb" and importlib.util.find_spec(name) is None:
            say("wandb is not installed (pip install 'distft[wandb]') and is left out; metrics.jsonl has every figure")
            continue
        try:
            if name == "wandb":
                seen, records = logged_step(start_wandb(recipe, folder), folder), folder.read_metrics()
            if name == "tensorboard":
                os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.path / "tensorboard"))
            (callback,) = get_reporting_integration_callbacks([name])
            found.append(GuardedTracker(name, callback(), seen, records))
        except Exception as error:  # whatever a tracker raises, training continues
            say(
                f"warning: {name} cannot be used and is left out; metrics.jsonl has every figure "
                f"({type(error).__name__}: {error})"
            )
    return found
