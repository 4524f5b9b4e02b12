"""Callbacks around the first step: invariants, FSDP2's prefetching, and the loss on the held-out split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from distft.config.recipe import Recipe
from distft.console import say
from distft.distributed.strategies import Strategy
from distft.errors import InvariantError
from distft.text import count
from distft.training import invariants
from distft.training.metrics import perplexity
from distft.training.nonfinite import BadNumbers

if TYPE_CHECKING:
    from distft.training.trainer import Trainer


class Invariants(TrainerCallback):  # type: ignore[misc]
    """Checks the prepared model before step 1, and its adapter after the first update. If one rank fails, all stop.

    `updated` says whether any step of the run, including those before a resume, has updated the weights. `packed` are
    checksums of packed weights before they were sharded.
    """

    def __init__(
        self,
        strategy: Strategy,
        recipe: Recipe,
        trainable: int,
        numbers: BadNumbers,
        updated: bool = False,
        packed: Mapping[str, int] | None = None,
    ) -> None:
        self._strategy, self._recipe, self._trainable, self._numbers = strategy, recipe, trainable, numbers
        self.updated, self._packed = updated, packed or {}
        self._before: dict[str, int] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        invariants.check_prepared(model, self._recipe, self._strategy, self._trainable)
        invariants.check_packed(model, self._strategy, self._packed)
        self._before = invariants.fingerprint(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        self._learning_rate = max(lr_scheduler.get_last_lr()) if lr_scheduler is not None else 0.0

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        # A loss scaler that is looking for its scale skips steps without further notice.
        skipped = self._numbers.in_a_row or getattr(optimizer, "step_was_skipped", False)
        if self._before is not None and self._learning_rate > 0 and not skipped:
            invariants.check_updated(model, self._strategy, self._before, self._learning_rate)
            self._before, self.updated = None, True

    def check_ended(self, steps: int) -> None:
        """Check, after the last of `steps` steps, that any of them has updated the weights.

        Raises:
            InvariantError: none has; the same on every rank.
        """
        if not self.updated:
            raise InvariantError(
                f"none of the {count(steps, 'step')} updated the weights: the learning rate was 0, or the step was "
                "skipped. There is nothing to save; train for more steps, or lower training.warmup_steps"
            )


class FSDPPrefetch(TrainerCallback):  # type: ignore[misc]
    """Lets FSDP2 gather layers ahead of time, and reports to `record` what that changes; no-op for other strategies."""

    def __init__(self, strategy: Strategy, memory_limit_gib: float | None, record: Callable[[str], None]) -> None:
        self._strategy, self._limit_gib, self._record = strategy, memory_limit_gib, record

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        note = self._strategy.prefetch(model, self._limit_gib)
        if note:
            self._record(note)
            if self._strategy.world.is_main:
                say(note)


class HeldOutLoss(TrainerCallback):  # type: ignore[misc]
    """Measures the loss on the held-out split, and what comes with it, before the first step of a run; a resumed run
    has it in `before`; older checkpoints have the loss alone."""

    def __init__(self, samples: Any, before: dict[str, float] | float | None) -> None:
        self._samples = samples
        self.before = {"loss": before, "perplexity": perplexity(before)} if isinstance(before, float | int) else before
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> None:
        """Measure with `trainer`, which can only be built once its callbacks are."""
        self._trainer = trainer

    def measure(self) -> dict[str, float]:
        """Return the loss of the held-out split: of texts, the mean negative log-likelihood in nats per token, with its
        perplexity; of pairs, the mean loss, with the rewards. All ranks enter."""
        assert self._trainer is not None
        found = self._trainer.evaluate(self._samples, metric_key_prefix="test")
        return {key: float(found[f"test_{key}"]) for key in self._trainer.figures}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.before is None and state.global_step == 0:
            self.before = self.measure()
