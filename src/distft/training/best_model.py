"""The best evaluation of a run: its checkpoint, which becomes the result, and the end of a run that improves no more.

transformers finds the best value and keeps it in the trainer's state, which checkpoints save. It counts the evaluations
since then in a callback that a resumed run starts from zero, and takes the best step's checkpoint for the best model
whether or not that step was saved. So distft counts, saves every new best, and loads it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from distft import upstream_api
from distft.config.recipe import Recipe
from distft.console import say
from distft.distributed.collectives import broadcast, together
from distft.distributed.strategies import Strategy
from distft.errors import InvariantError, StorageError
from distft.runs import manifest
from distft.runs.folder import RunFolder
from distft.training.invariants import fingerprint
from distft.training.selection import HIGHER_IS_BETTER, metric_of, patience, selects
from distft.training.stopping import StopTogether

if TYPE_CHECKING:
    from distft.training.trainer import Trainer


class BestModel(TrainerCallback):  # type: ignore[misc]
    """Judges every evaluation by rank 0's value of the metric, so that all ranks decide alike.

    `carried` is what the method of that name returned when the checkpoint that the run resumes from was saved, and
    `changed` receives what the run does differently from the recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        strategy: Strategy,
        folder: RunFolder,
        stop: StopTogether,
        carried: Mapping[str, Any],
        changed: Callable[[str], None],
    ) -> None:
        self.loads = bool(recipe.training.get("load_best_model_at_end"))
        self._judges, self._metric, self._patience = selects(recipe), metric_of(recipe), patience(recipe)
        self._threshold: float = recipe.training.get("early_stopping_threshold") or 0.0
        self._strategy, self._folder, self._stop, self._changed = strategy, folder, stop, changed
        self._unimproved: int = carried.get("unimproved", 0)
        self._weights: str | None = carried.get("weights")
        self._judged_by: str = carried.get("metric", self._metric)
        # Those that were best, from the first to the best of all. One whose checkpoint is lost is taken out again.
        self._best: list[tuple[float, int, str | None]] = []

    def carried(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the trainer's state."""
        weights = self._best[-1][2] if self._best else None
        return {"metric": self._metric, "unimproved": self._unimproved, "weights": weights}

    @property
    def _exhausted(self) -> bool:
        return self._patience is not None and self._unimproved >= self._patience

    # Trainer's events -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.best_global_step is not None and self._judged_by != self._metric:  # under run.force
            self._note(f"what was best by {self._judged_by} is forgotten: {self._metric} decides now")
            state.best_metric, state.best_global_step, self._unimproved = None, None, 0
        if state.best_global_step is not None:
            self._best = [(state.best_metric, state.best_global_step, self._weights)]
            if self.loads and not self._is_there(state.best_global_step):
                self._note(
                    f"the checkpoint of step {state.best_global_step}, whose {self._metric} of {state.best_metric:.6g} "
                    "was the best, is not there any more: the best of what follows counts"
                )
                self.forget(state.best_global_step, state)
        control.should_training_stop |= self._exhausted  # saved after its last evaluation, and not ended

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The model that run.train_time ends with is a candidate, as the trainer makes that of the last step one.
        ends = control.should_training_stop and not self._stop.stopped
        if self.loads and ends and args.eval_strategy == "steps" and args.eval_delay <= state.global_step:
            control.should_evaluate = True

    def judge(
        self, metrics: dict[str, float], model: Any, state: Any, control: Any, find_best: Callable[[], bool]
    ) -> bool:
        """Take an evaluation into account. `find_best`, the trainer's, updates its state by it. All ranks enter.

        Returns whether it is the best so far.
        """
        if not self._judges:
            return find_best()
        value = metrics[self._metric] = broadcast(metrics[self._metric], self._strategy.world)
        before, sign = state.best_metric, 1 if HIGHER_IS_BETTER[self._metric] else -1
        improved = math.isfinite(value) and (before is None or sign * (value - before) > self._threshold)
        self._unimproved = 0 if improved else self._unimproved + 1
        found = find_best()
        if found:
            self._best.append((value, state.global_step, _digest(model) if self.loads else None))
            control.should_save |= self.loads
        control.should_training_stop |= self._exhausted
        return found

    def forget(self, step: int, state: Any) -> None:
        """Let what was best before count again, if the checkpoint of the best `step` is lost. All ranks enter."""
        self._best = [best for best in self._best if best[1] != step]
        state.best_metric, state.best_global_step, _ = self._best[-1] if self._best else (None, None, None)

    def load(self, trainer: Trainer) -> None:
        """Give `trainer` the weights of the best step, after its last one. All ranks enter.

        Raises:
            StorageError: its checkpoint cannot be read.
            InvariantError: the weights that were loaded are not those that were evaluated.
        """
        state = trainer.state
        if not self.loads or state.best_global_step == state.global_step:
            return
        if state.best_global_step is None:
            self._note(f"no evaluation gave a finite {self._metric}: the result is the model of the last step")
            return
        checkpoint = self._folder.checkpoints / f"checkpoint-{state.best_global_step}"
        together(self._strategy.world, lambda: _check(checkpoint) if self._strategy.world.is_main else None)
        upstream_api.load_best_model(trainer, checkpoint)
        if self._best[-1][2] not in (None, _digest(trainer.model)):
            raise InvariantError(
                f"the weights loaded from {checkpoint} are not those whose {self._metric} was {state.best_metric:.6g}"
            )

    def facts(self, state: Any) -> dict[str, Any]:
        """Return the keys of `summary.json` about the best evaluation and why training ended."""
        if not self._judges or state.best_global_step is None:
            return {}
        best = {
            "metric": self._metric,
            "value": state.best_metric,
            "step": state.best_global_step,
            "is_result": self.loads or state.best_global_step == state.global_step,
        }
        early = self._exhausted and state.global_step < state.max_steps
        stopped = {"step": state.global_step, "of": state.max_steps, "evaluations": self._unimproved}
        return {"best": best, "stopped_early": stopped if early else None}

    def _note(self, text: str) -> None:
        self._changed(text)
        if self._strategy.world.is_main:
            say(text)

    def _is_there(self, step: int) -> bool:
        checkpoint = self._folder.checkpoints / f"checkpoint-{step}"
        return broadcast((checkpoint / manifest.NAME).is_file(), self._strategy.world)


def _check(checkpoint: Path) -> None:
    if (why := manifest.fault(checkpoint)) is not None:
        raise StorageError(
            f"training has finished, but {checkpoint}, which has its best model, cannot be read: {why}. The same "
            "command resumes from the last checkpoint, and takes the best of those that are left"
        )


def _digest(model: Any) -> str:
    """A hash of every trainable tensor, gathered if it is sharded. All ranks enter."""
    return hashlib.sha256(repr(sorted(fingerprint(model).items())).encode()).hexdigest()[:16]
