"""Find NaN and infinite losses and gradients once per step, identically on all ranks, and report their samples."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from distft.config.recipe import Recipe
from distft.console import say
from distft.data.batch_plan import Plan
from distft.distributed.world import World
from distft.errors import BadNumbersError
from distft.runs.folder import RunFolder
from distft.text import shorten

IN_A_ROW = 10
"""Consecutive skipped steps that end the run: its weights no longer give finite numbers."""
_LISTED = 8
"""At most this many samples and losses are listed in a message."""


@dataclass
class BadNumbers:
    """Checks whether a step's losses and gradient norm are finite, and acts on `run.on_bad_numbers` if not.

    The losses stay on the device until the step's gradients are complete. One small gather then gives all ranks the
    losses of all, so that all decide identically. If non-finite numbers stop the run, nothing waits for the device:
    they are checked a step later, or before anything of their step is saved, logged or evaluated (`settle`). Only
    skipping needs the answer in the same step. `skipped` counts the skipped steps of the run.
    """

    recipe: Recipe
    folder: RunFolder
    world: World
    plan: Plan
    skipped: int = 0
    in_a_row: int = 0
    _losses: list[torch.Tensor] = field(default_factory=list)
    _waiting: tuple[int, torch.Tensor, torch.cuda.Event | None] | None = None

    def watch(self, loss: torch.Tensor) -> None:
        """Remember the loss of one micro-batch of this rank; it stays on the device."""
        self._losses.append(loss.detach().float())

    def may_update(self, step: int, norm: torch.Tensor | float | None, accelerator: Accelerator) -> bool:
        """Return whether optimizer step `step` (from 1) may update the weights. All ranks enter, with the shared norm.

        Under fp16, infinite norms are how the loss scaler finds its scale; they count only once the scale is below 1.

        Raises:
            BadNumbersError: on every rank, if the recipe says to stop (for the previous step) or too many consecutive
                steps were skipped.
        """
        self.settle()
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        scaler = accelerator.scaler
        if norm is None or (scaler is not None and scaler.get_scale() >= 1):
            norm = 0.0
        losses, self._losses = self._losses, []
        device = losses[0].device
        mine = torch.stack([*losses, torch.as_tensor(norm, dtype=torch.float32, device=device)])
        everywhere = accelerator.gather(mine[None]) if self.world.world_size > 1 else mine[None]
        if self.recipe.run.on_bad_numbers == "stop":
            self._waiting = step, *_on_host(everywhere)
            return True
        return self._judge(step, everywhere)

    def settle(self) -> None:
        """Check the numbers of the last step, if that has not been done. All ranks enter.

        Raises:
            BadNumbersError: on every rank, if they are not finite.
        """
        if self._waiting is not None:
            (step, everywhere, copied), self._waiting = self._waiting, None
            if copied is not None:
                copied.synchronize()
            self._judge(step, everywhere)

    def _judge(self, step: int, everywhere: torch.Tensor) -> bool:
        if bool(everywhere.isfinite().all()):
            self.in_a_row = 0
            return True
        cause, rows = self._describe(step, everywhere.tolist())
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.recipe.run.on_bad_numbers == "stop":
            raise BadNumbersError(
                f"{cause}\nNo checkpoint contains this step. Correct or remove these samples, or lower "
                "training.learning_rate; with run.on_bad_numbers=skip, training skips such steps and continues",
                {"samples": rows},
            )
        if self.in_a_row == IN_A_ROW:
            raise BadNumbersError(
                f"{cause}\nThis was the {IN_A_ROW}th consecutive step to be skipped; lower training.learning_rate, or "
                "use a model.dtype other than float16",
                {"samples": rows},
            )
        if self.world.is_main:
            say(f"{cause}\n  The step was skipped; weights and optimizer states are unchanged")
        return False

    def _describe(self, step: int, everywhere: list[list[float]]) -> tuple[str, list[int]]:
        """Return which losses are not finite, and the samples behind them; all samples, if only the norm is not."""
        found, rows = [], []
        rounds = self.plan.micro_batches(step - 1, self.world.world_size)
        spare = len(everywhere[0]) - 1 - len(rounds)
        for rank, values in enumerate(everywhere):
            for index, loss in enumerate(values[:-1]):
                if not math.isfinite(loss):
                    found.append(f"the loss of micro-batch {index + 1} of {len(values) - 1} on rank {rank} is {loss}")
                    rows += rounds[index - spare][rank]
        if not found:
            found = [f"all losses are finite, but the gradient norm is {everywhere[0][-1]}"]
            rows = self.plan.samples(step - 1).tolist()
        shown = ",".join(map(str, rows[:_LISTED]))
        recipe = shlex.quote(str(self.folder.recipe))
        listed = shorten(map(str, rows), _LISTED, ",")
        return (
            f"step {step}: {'; '.join(found[:_LISTED])}. Its samples in the train split: {listed}; to see them: "
            f"`distft data preview recipe={recipe} --rows {shown}`"
        ), rows


def _on_host(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Start a copy to host memory; return it with the event that completes it (None if it is complete)."""
    if not tensor.is_cuda:
        return tensor, None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event
