"""The budget of an experiment as the override that it means for each variant."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from distft.config.recipe import load_recipe
from distft.errors import Fault, RecipeError
from distft.experiments.schema import Budget
from distft.experiments.variants import Setting, Variant, run_arguments


def budget_faults(budget: Budget | None, path: Path) -> list[Fault]:
    """A fault unless the budget is given in exactly one unit."""
    amounts = _amounts(budget)
    if budget is None or len(amounts) == 1:
        return []
    expected = f"expected one of {', '.join(Budget.model_fields)}, got {' and '.join(amounts) or 'none'}"
    return [Fault(str(path), "budget", expected)]


def budget_settings(
    budget: Budget | None, variant: Variant, given: Mapping[str, str], path: Path, folder: Path, faults: list[Fault]
) -> list[Setting]:
    """The override that means the same as the budget. If there is none, a fault is added to `faults`."""
    amounts = _amounts(budget)
    if len(amounts) != 1:
        return []
    ((unit, amount),) = amounts.items()
    place = f"budget.{unit}"
    try:
        if unit == "minutes":
            return [Setting("run.train_time", _clock(amount), place)]
        steps = amount if unit == "steps" else _steps(unit, amount, variant, given, path, folder)
        return [Setting("training.max_steps", steps, place)]
    except _Refused as refusal:
        faults.append(Fault(str(path), place, refusal.problem + variant.suffix, refusal.hint))
    except RecipeError:
        pass  # reported with the run itself
    return []


class _Refused(Exception):
    def __init__(self, problem: str, hint: str = "") -> None:
        self.problem, self.hint = problem, hint


def _amounts(budget: Budget | None) -> dict[str, Any]:
    return {} if budget is None else {key: value for key, value in budget.model_dump().items() if value is not None}


def _clock(amount: float) -> str:
    seconds = Fraction(str(amount)) * 60
    if seconds.denominator != 1:
        raise _Refused(f"{amount} minutes are not a whole number of seconds")
    minutes, rest = divmod(int(seconds), 60)
    days, hours = divmod(minutes // 60, 24)
    clock = f"{hours:02}:{minutes % 60:02}:{rest:02}"
    return f"{days}-{clock}" if days else clock


def _steps(unit: str, amount: int, variant: Variant, given: Mapping[str, str], path: Path, folder: Path) -> int:
    """`amount` samples or tokens as optimizer steps of the variant's global batch."""
    words = run_arguments(variant, variant.settings, given, path.stem, path.stem)
    batching = load_recipe(words, folder=folder).batching
    size = batching.global_batch_size if unit == "samples" else batching.global_batch_tokens
    if size is None and unit == "samples":
        problem = "a global batch counted in tokens has no fixed number of samples"
        raise _Refused(problem, "give steps or tokens")
    if size is None:
        problem = "a global batch counted in samples has no fixed number of tokens"
        raise _Refused(problem, "give steps or samples, or count the batch in batching.global_batch_tokens")
    if unit == "tokens" and amount < size:
        raise _Refused(f"{amount} tokens are less than a global batch of {size}")
    if unit == "samples" and amount % size:
        below = amount // size * size
        near = f"{below} or {below + size}" if below else str(size)
        raise _Refused(f"{amount} samples are not a whole number of global batches of {size}", near)
    return amount // size
