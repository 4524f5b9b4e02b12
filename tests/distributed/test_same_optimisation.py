"""The same recipe is the same optimisation under every strategy and on any number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from distft.checkpoint import read_tensors

from .conftest import Train, needs_compiler

STEPS = 12
# fp32, dropout 0, and the loss on the responses alone, so that the samples' trained lengths differ (1 to 60 tokens).
RECIPE = (
    "recipe=tiny", "quantization=null", "lora.lora_dropout=0", "training.completion_only_loss=true",
    f"training.max_steps={STEPS}", "training.logging_steps=1", "training.eval_strategy=no", "training.save_strategy=no",
    "evaluation.before_and_after=false", "training.lr_scheduler_type=constant", "training.warmup_steps=0",
)  # fmt: skip
SGD = ("training.optim=sgd", "training.learning_rate=0.3")  # clipped at norm 1 by default, which the norms here exceed
ADAMW = ("training.optim=adamw_torch", "training.learning_rate=1e-3")
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")


@pytest.fixture(scope="module")
def initial(train: Train) -> Mapping[str, torch.Tensor]:
    """The adapter before any update: a run with learning rate 0."""
    ended = train(*RECIPE, "training.max_steps=1", "training.optim=sgd", "training.learning_rate=0.0")
    assert ended.code == 0, ended.stderr[-3000:]
    return read_tensors(ended.folder.adapter)


class Trajectory:
    """Loss and unclipped gradient norm of each step, and the final adapter."""

    def __init__(self, train: Train, *overrides: str, nproc: int) -> None:
        ended = train(*RECIPE, *overrides, nproc=nproc)
        assert ended.code == 0, ended.stderr[-3000:]
        self.summary = ended.folder.read_summary()
        records = [record for record in ended.folder.read_metrics() if "loss" in record]
        self.losses = [record["loss"] for record in records]
        self.norms = [record["grad_norm"] for record in records]
        self.adapter = read_tensors(Path(ended.folder.adapter))

    def assert_like(self, other: Trajectory, initial: Mapping[str, torch.Tensor], update: float) -> None:
        """Losses and norms within 1e-4 relative, each tensor's total update within `update` in norm."""
        assert len(self.losses) == len(other.losses) == STEPS
        assert self.losses == pytest.approx(other.losses, rel=1e-4)
        assert self.norms == pytest.approx(other.norms, rel=1e-4)
        assert set(self.adapter) == set(other.adapter) == set(initial)
        for name, start in initial.items():
            ours, theirs = self.adapter[name] - start, other.adapter[name] - start
            assert theirs.norm() > 0, f"{name} never moved"
            assert (ours - theirs).norm() <= update * theirs.norm(), name


@pytest.fixture(scope="module", params=[("sgd", SGD, 1e-4), ("adamw", ADAMW, 1e-2)], ids=lambda param: param[0])
def reference(request: pytest.FixtureRequest, train: Train) -> tuple[tuple[str, ...], float, Trajectory]:
    _, optimizer, tolerance = request.param
    return optimizer, tolerance, Trajectory(train, *optimizer, nproc=1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_the_same_steps(
    strategy: str,
    reference: tuple[tuple[str, ...], float, Trajectory],
    initial: Mapping[str, torch.Tensor],
    train: Train,
) -> None:
    needs_compiler(strategy)
    optimizer, tolerance, single = reference
    ours = Trajectory(train, f"strategy={strategy}", *optimizer, nproc=2)
    assert (ours.summary["strategy"], ours.summary["world_size"]) == (strategy, 2)
    assert single.summary["strategy"] == "single"
    ours.assert_like(single, initial, tolerance)


def test_only_the_global_batch_matters(initial: Mapping[str, torch.Tensor], train: Train) -> None:
    """1 process × accumulation 8, 2 × 4, and one micro-batch of 8."""
    batch = ("batching.global_batch_size=8", *SGD)
    whole = Trajectory(train, *batch, "batching.micro_batch=8", nproc=1)
    for processes, accumulation in ((1, 8), (2, 4)):
        other = Trajectory(train, *batch, "batching.micro_batch=1", nproc=processes)
        assert other.summary["gradient_accumulation_steps"] == accumulation
        other.assert_like(whole, initial, 1e-4)


def test_the_last_step_of_an_epoch_has_what_is_left(train: Train) -> None:
    """168 samples in global batches of 16: the eleventh step has 8, on one process and on two.

    On two, the empty rows leave the last rank a last batch whose tokens TRL's own count forgets.
    """
    shape = ("data.max_samples=210", "training.max_steps=-1", "training.num_train_epochs=1", *SGD)
    runs = [
        train(*RECIPE, *shape, f"batching.micro_batch={micro}", nproc=processes)
        for micro, processes in ((8, 1), (4, 2))
    ]
    records = [[record for record in run.folder.read_metrics() if "loss" in record] for run in runs]
    for found in records:
        assert [record["samples"] for record in found] == [*range(16, 161, 16), 168]
    for one, two in zip(*records, strict=True):
        assert one["tokens"] == two["tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
