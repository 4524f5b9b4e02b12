"""NaN and infinite losses and gradients: judged once a step, on all ranks alike, and named with the samples behind them."""

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
"""Steps that may be skipped one after another; where no step is good any more, the run has nothing to go on with."""
_SHOWN = 8  # samples that a message names


@dataclass
class BadNumbers:
    """Whether a step's losses and gradient norm are finite, and what to do where they are not (`run.on_bad_numbers`).

    The losses stay on the device until the step's gradients are whole; then one small gather tells every rank the losses of
    all, so that all of them decide alike. Where bad numbers stop the run, nothing waits for that: the numbers are looked at a
    step later, or before anything of their step is saved, logged or evaluated (`settle`). Only to skip a step must the device
    be waited for in each. `skipped` counts the steps of the run that were left out.
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
        """Take the loss of one micro-batch of this rank, on its device."""
        self._losses.append(loss.detach().float())

    def may_update(self, step: int, norm: torch.Tensor | float | None, accelerator: Accelerator) -> bool:
        """Whether optimizer step `step` (from 1) may update the weights. All ranks enter, with the norm that all share.

        Under fp16 an infinite norm is the loss scaler's way to find its scale, and bad only where that has come to its end.

        Raises:
            BadNumbersError: on every rank, where the recipe says stop (of the step before) or the last steps were all skipped.
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
        """Look at the numbers of the last step, if that is still to be done. All ranks enter.

        Raises:
            BadNumbersError: on every rank, where they are bad.
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
                f"{cause}\nNothing of this step is in a checkpoint. Mend or leave out these samples, or lower "
                "training.learning_rate; run.on_bad_numbers=skip goes on without such steps",
                {"samples": rows},
            )
        if self.in_a_row == IN_A_ROW:
            raise BadNumbersError(
                f"{cause}\nThis was the {IN_A_ROW}th step in a row that was skipped; lower training.learning_rate, or take another model.dtype "
                "than float16",
                {"samples": rows},
            )
        if self.world.is_main:
            say(f"{cause}\n  The step was skipped: weights and optimizer states are as they were before it")
        return False

    def _describe(self, step: int, everywhere: list[list[float]]) -> tuple[str, list[int]]:
        """Which losses are bad, and the samples of their micro-batches; the whole global batch's where only the norm is."""
        found, rows = [], []
        rounds = self.plan.micro_batches(step - 1, self.world.world_size)
        spare = len(everywhere[0]) - 1 - len(rounds)
        for rank, values in enumerate(everywhere):
            for index, loss in enumerate(values[:-1]):
                if not math.isfinite(loss):
                    found.append(f"the loss of micro-batch {index + 1} of {len(values) - 1} on rank {rank} is {loss}")
                    rows += rounds[index - spare][rank]
        if not found:
            found = [f"the gradient norm is {everywhere[0][-1]}, of finite losses"]
            rows = self.plan.samples(step - 1).tolist()
        shown = ",".join(map(str, rows[:_SHOWN]))
        recipe = shlex.quote(str(self.folder.recipe))
        return (
            f"step {step}: {'; '.join(found[:_SHOWN])}. Samples of the train split in it: {shorten(map(str, rows), _SHOWN, ',')}; look at them with "
            f"`distft data preview recipe={recipe} --rows {shown}`"
        ), rows


def _on_host(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy in host memory, and what says that it is there; nothing waits for it here."""
    if not tensor.is_cuda:
        return tensor, None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event
