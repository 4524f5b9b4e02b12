"""Which steps may update the weights, by the losses and the gradient norm that a step has. Runs are in tests/faults."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from distft import upstream_api
from distft.config.recipe import load_recipe
from distft.data.batch_plan import Plan
from distft.distributed.world import World
from distft.errors import BadNumbersError
from distft.runs.folder import RunFolder
from distft.training.nonfinite import IN_A_ROW, BadNumbers


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with upstream_api.own_accelerate_state():
        yield Accelerator(cpu=True)


def numbers(what: str = "skip") -> BadNumbers:
    recipe = load_recipe(["recipe=tiny", f"run.on_bad_numbers={what}"])
    plan = Plan([5] * 640, recipe.batching, recipe.run.seed)
    return BadNumbers(recipe, RunFolder(Path("run")), World(), plan)


def may_update(found: BadNumbers, step: int, loss: float, norm: float, accelerator: Accelerator) -> bool:
    """The answer for a step of four micro-batches, of which the third has `loss`."""
    for value in (2.0, 2.0, loss, 2.0):
        found.watch(torch.tensor(value))
    return found.may_update(step, torch.tensor(norm), accelerator)


BAD, GOOD = (math.nan, 1.0), (2.0, 1.0)


def test_a_good_step_ends_a_row_of_bad_ones(accelerator: Accelerator) -> None:
    """Scattered bad steps must not end a long run."""
    found, rows = numbers(), []
    for step, (loss, norm) in enumerate([BAD, BAD, GOOD, BAD], 1):
        assert may_update(found, step, loss, norm, accelerator) == ((loss, norm) == GOOD)
        rows.append(found.in_a_row)
    assert (rows, found.skipped) == ([1, 2, 0, 1], 3)


def test_the_tenth_bad_step_in_a_row_ends_the_run(accelerator: Accelerator) -> None:
    found = numbers()
    for step in range(1, IN_A_ROW):
        assert not may_update(found, step, *BAD, accelerator)
    with pytest.raises(BadNumbersError, match=r"(?s)step 10: .*10th consecutive step"):
        may_update(found, IN_A_ROW, *BAD, accelerator)


@pytest.mark.parametrize("what", ["stop", "skip"])
def test_an_infinite_norm_is_as_bad_as_a_loss(what: str, accelerator: Accelerator) -> None:
    found = numbers(what)
    if what == "skip":
        assert not may_update(found, 1, 2.0, math.inf, accelerator)
        return
    assert may_update(found, 1, 2.0, math.inf, accelerator), "judged a step later"
    with pytest.raises(BadNumbersError, match="step 1: all losses are finite, but the gradient norm is inf"):
        found.settle()


@pytest.mark.parametrize(
    ("scale", "loss", "norm", "expected"),
    [
        (65536.0, 2.0, math.inf, True),
        (1.0, 2.0, math.nan, True),
        (65536.0, math.nan, 1.0, False),
        (0.5, 2.0, math.inf, False),
        (0.5, 2.0, 1.0, True),
    ],
)
def test_under_fp16_an_infinite_norm_is_left_to_the_loss_scaler_until_its_scale_is_below_1(
    scale: float, loss: float, norm: float, expected: bool, accelerator: Accelerator
) -> None:
    """accelerate makes the scaler on GPUs only; it is the same class on the CPU."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    assert accelerator.scaler.get_scale() == scale
    found = numbers()
    assert may_update(found, 1, loss, norm, accelerator) == expected
    assert found.skipped == (not expected)
