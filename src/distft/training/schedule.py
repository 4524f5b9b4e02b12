"""The learning rate of every step, known before the first one, and what is wrong with it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType
from trl import SFTConfig

from distft.config.recipe import Recipe
from distft.errors import Fault
from distft.text import count

_TYPE, _OPTIONS, _WARMUP = "training.lr_scheduler_type", "training.lr_scheduler_kwargs", "training.warmup_steps"
_BY_RESULT = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
"""Schedules that follow the evaluations: only their first learning rate is known."""
_WITHOUT_OPTIONS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
"""Schedules for which transformers ignores `lr_scheduler_kwargs`."""
_GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
"""Parameters of a schedule that the trainer sets."""
_AT_MOST = 100_000
"""Of a run with more steps than this, look at no more than this many, evenly spaced."""


def total_steps(recipe: Recipe, per_epoch: int) -> int:
    """The optimizer steps of a run with `per_epoch` of them in an epoch."""
    limit: int = recipe.training.get("max_steps", -1)
    epochs: float = recipe.training.get("num_train_epochs", 3.0)
    return limit if limit > 0 else math.ceil(epochs * per_epoch)


def order_notes(recipe: Recipe, per_epoch: int) -> list[str]:
    """Say so if a curriculum ends before its hardest samples."""
    steps, data = total_steps(recipe, per_epoch), recipe.data
    if data.order == "shuffled" or steps >= per_epoch:
        return []
    return [
        f"data.order={data.order}: training ends after {steps:,} of the {per_epoch:,} steps of its first epoch, so "
        "that the hardest samples are never trained; train for an epoch, or lower data.max_samples"
    ]


def learning_rates(arguments: SFTConfig, steps: int) -> list[float]:
    """The learning rate of each of `steps` optimizer steps, built as the trainer builds it, on a dummy parameter.

    Of a schedule that follows the evaluations, only the first; of a very long run, every n-th (`_stride`). Raises what
    transformers raises.
    """
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=dummy,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    if arguments.lr_scheduler_type in _BY_RESULT:
        return [arguments.learning_rate]
    (factor,) = schedule.lr_lambdas  # `step` computes the same, ten times slower
    return [arguments.learning_rate * factor(step) for step in range(0, steps, _stride(steps))]


def _stride(steps: int) -> int:
    return -(-steps // _AT_MOST)


def schedule_faults(recipe: Recipe, arguments: SFTConfig, steps: int | None) -> list[Fault]:
    """What is wrong with the schedule over `steps` optimizer steps in all; with None, whatever their number is."""

    def fault(key: str, problem: str, hint: str = "") -> Fault:
        return Fault(recipe.source.of(key), key, problem, hint)

    kind = arguments.lr_scheduler_type
    if kind in _WITHOUT_OPTIONS and arguments.lr_scheduler_kwargs:
        return [fault(_OPTIONS, f"{kind.value} takes no options", "remove them, or use another lr_scheduler_type")]
    try:
        total = steps or 10_000
        rates = learning_rates(arguments, total)
    except Exception as error:  # transformers checks little, so whatever the options cause
        key = _OPTIONS if arguments.lr_scheduler_kwargs else _TYPE
        return [fault(key, f"{kind.value}: {error}", _options(kind))]
    target = arguments.learning_rate
    for step, rate in zip(range(1, total + 1, _stride(total)), rates, strict=False):
        if not math.isfinite(rate) or rate < 0 or rate > target * (1 + 1e-6):
            key = _OPTIONS if arguments.lr_scheduler_kwargs else "training.learning_rate"
            return [fault(key, f"the learning rate of step {step} would be {rate:g}; expected 0 to {target:g}")]
    if target == 0:
        return [fault("training.learning_rate", "a learning rate of 0 trains nothing")]
    if steps is None or max(rates) > 0:
        return []
    if (warmup := arguments.get_warmup_steps(steps)) > 0:
        problem = f"the warm-up takes {warmup:,} of {count(steps, 'step')}, and the learning rate never rises above 0"
        return [fault(_WARMUP, problem, "set training.warmup_steps=0, or train for more steps")]
    return [fault(_OPTIONS, f"the learning rate is 0 in every one of {count(steps, 'step')}", _options(kind))]


def schedule_notes(arguments: SFTConfig, steps: int) -> list[str]:
    """What a user may not expect of a schedule without faults, over `steps` optimizer steps in all."""
    rates, warmup, target = learning_rates(arguments, steps), arguments.get_warmup_steps(steps), arguments.learning_rate
    kind = arguments.lr_scheduler_type.value
    notes = []
    if warmup and rates[0] == target:
        notes.append(f"training.warmup_steps has no effect: {kind} has no warm-up")
    if max(rates) < target * (1 - 1e-6):
        notes.append(
            f"the learning rate never reaches {target:g}: its highest is {max(rates):.3g}, and the warm-up takes "
            f"{warmup:,} of {count(steps, 'step')}"
        )
    idle = _zeros(rates[1:]) * _stride(steps)  # a warm-up begins with 0
    if idle:
        notes.append(f"the learning rate is 0 in {count(idle, 'step')} of {steps:,}: they train nothing")
    return notes


def _zeros(rates: Sequence[float]) -> int:
    return sum(rate == 0 for rate in rates)


def _options(kind: SchedulerType) -> str:
    """The options that a schedule takes, for a message."""
    found = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters.values()
    names = [
        f"{one.name} (required)" if one.default is one.empty else one.name
        for one in found
        if one.name not in _GIVEN and one.kind is not one.VAR_KEYWORD
    ]
    return f"training.lr_scheduler_kwargs of {kind.value}: {', '.join(names)}" if names else ""
