"""What is judged or measured over all ranks: two real processes with gloo, of which only the second is unlike."""

from __future__ import annotations

from typing import Any

import pytest

from ..distributed.conftest import on_two_ranks

PROGRAM = """
import json, math, os
from pathlib import Path
from types import SimpleNamespace

import psutil, torch
from accelerate import Accelerator
from transformers import TrainerControl, TrainerState

from distft.config.recipe import load_recipe
from distft.data.batch_plan import Plan
from distft.distributed.strategies.ddp import DDP
from distft.distributed.world import World
from distft.errors import BadNumbersError, InvariantError
from distft.runs.folder import RunFolder
from distft.training.best_model import BestModel
from distft.training.invariants import check_prepared, check_updated, fingerprint
from distft.training.metrics import Telemetry
from distft.training.nonfinite import BadNumbers
from distft.training.throughput import Work

world, found = World.from_environment(os.environ), {}
accelerator = Accelerator(cpu=True)

# Losses: four micro-batches, the second of rank 1 is NaN.
for what in ("skip", "stop"):
    recipe = load_recipe(["recipe=tiny", "batching.micro_batch=2", f"run.on_bad_numbers={what}"])
    plan = Plan([5] * 640, recipe.batching)
    numbers = BadNumbers(recipe, RunFolder(Path("run")), world, plan)
    for index in range(4):
        numbers.watch(torch.tensor(math.nan if (world.rank, index) == (1, 1) else 2.0))
    found[what] = numbers.may_update(1, torch.tensor(1.0), accelerator)
    try:
        numbers.settle()
        found[f"{what} settled"] = numbers.in_a_row
    except BadNumbersError as error:
        found[f"{what} settled"] = str(error).split(". ")[0]

# Memory: rank 1 holds 600 MiB more, which is far more than two processes differ by otherwise.
more = bytearray(b"1") * (600 * 2**20) if world.rank == 1 else None
telemetry = Telemetry(RunFolder(Path("run")), recipe, world, plan, Work(1.0))
found["own"] = psutil.Process().memory_info().rss / 2**30
found["worst"] = telemetry.memory()["host_rss_gib"]
found["by rank"] = telemetry._by_rank["host_rss_by_rank_gib"]

# Invariants: rank 1 has another model.
def error_of(check, *args):
    try:
        check(*args)
    except InvariantError as error:
        return str(error).split(";")[0]

ddp = DDP(world, False, "ddp")
model = torch.nn.Linear(4, 4)
torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(model.bias)
before = fingerprint(model)
found["prepared"] = error_of(check_prepared, model, recipe, ddp, 20 + world.rank)
model.weight.data += 1e-3 * (1 + world.rank)
found["updated"] = error_of(check_updated, model, ddp, before, 1e-3)
model.weight.data[:] = 2
found["alike"] = error_of(check_updated, model, ddp, before, 1e-3)

# Evaluations: rank 1 has other values of the metric.
recipe = load_recipe(["recipe=tiny", "training.early_stopping_patience=1"])
best = BestModel(recipe, ddp, RunFolder(Path("run")), SimpleNamespace(stopped=False), {}, print)
state, control = TrainerState(max_steps=9), TrainerControl()
for state.global_step, values in enumerate([(3.0, 3.0), (2.0, 4.0), (2.5, 1.0)], 1):
    metrics = {"eval_loss": values[world.rank]}

    def find_best():
        better = metrics["eval_loss"] < (state.best_metric or math.inf)
        if better:
            state.best_metric, state.best_global_step = metrics["eval_loss"], state.global_step
        return better

    best.judge(metrics, model, state, control, find_best)
found["best"] = [state.best_global_step, state.best_metric, control.should_training_stop]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each of two ranks has found."""
    return on_two_ranks(PROGRAM)


def test_a_bad_loss_of_one_rank_is_judged_by_all(ranks: list[dict[str, Any]]) -> None:
    """Rank 0, whose own losses are finite, must leave out the same step."""
    assert [rank["skip"] for rank in ranks] == [False, False]
    assert [rank["skip settled"] for rank in ranks] == [1, 1]
    cause = "step 1: the loss of micro-batch 2 of 4 on rank 1 is nan"
    assert [rank["stop settled"] for rank in ranks] == [cause, cause]


def test_memory_is_that_of_the_worst_rank(ranks: list[dict[str, Any]]) -> None:
    one, other = (rank["own"] for rank in ranks)
    assert other - one > 0.2
    for rank in ranks:
        assert rank["worst"] == pytest.approx(other, abs=0.05)
        assert rank["by rank"] == pytest.approx([one, other], abs=0.05)


def test_a_fault_in_the_model_of_one_rank_is_raised_on_all(ranks: list[dict[str, Any]]) -> None:
    """Rank 0 has what it expects."""
    expected = "20 parameters are trainable; the adapter (or model) has 21 (rank 1, strategy ddp)"
    assert [rank["prepared"] for rank in ranks] == [expected.split(";")[0]] * 2


def test_weights_that_differ_after_an_update_stop_all_ranks(ranks: list[dict[str, Any]]) -> None:
    expected = "weight differs between rank 0 and rank 1 after one update (rank 0, strategy ddp)"
    assert [rank["updated"] for rank in ranks] == [expected, expected]
    assert [rank["alike"] for rank in ranks] == [None, None]


def test_ranks_that_measured_different_values_decide_by_those_of_rank_0(ranks: list[dict[str, Any]]) -> None:
    assert [rank["best"] for rank in ranks] == [[2, 2.0, True]] * 2
