"""The same recipe is the same optimisation under every strategy and on any number of processes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from distft.runs.folder import RunFolder
from distft.runs.samples import Samples
from distft.training.checkpoints import read_tensors

from .conftest import Train, needs_compiler

STEPS = 12
# fp32, dropout 0, and the loss on the responses alone, so that the samples' trained lengths differ (1 to 60 tokens).
RECIPE = (
    "recipe=tiny",
    "quantization=null",
    "batching.global_batch_size=8",
    "batching.micro_batch=2",
    "lora.lora_dropout=0",
    "training.completion_only_loss=true",
    f"training.max_steps={STEPS}",
    "training.logging_steps=1",
    "training.eval_strategy=no",
    "training.save_strategy=no",
    "evaluation.before_and_after=false",
    "training.lr_scheduler_type=constant",
    "training.warmup_steps=0",
)
SGD = ("training.optim=sgd", "training.learning_rate=0.3")  # clipped at norm 1 by default, which the norms here exceed
ADAMW = ("training.optim=adamw_torch", "training.learning_rate=1e-3")
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
PACKS = ("batching.micro_batch_tokens=200",)
ANSWERS = ("evaluation.samples={number: 2, max_new_tokens: 8}",)


@pytest.fixture(scope="module")
def initial(base: Trajectory) -> Mapping[str, torch.Tensor]:
    """The adapter before any update, within 1e-29 or so: a learning rate of 0 is refused."""
    return base.adapter


@pytest.fixture(scope="module")
def base(train: Train) -> Trajectory:
    """A run that changes nothing, within 1e-29 or so, on one process."""
    words = ("training.max_steps=1", "training.optim=sgd", "training.learning_rate=1e-30")
    return Trajectory(train, *words, *ANSWERS, nproc=1)


class Trajectory:
    """What each step says of itself (loss, unclipped gradient norm, metrics over all ranks), and the final adapter."""

    def __init__(self, train: Train, *overrides: str, nproc: int) -> None:
        ended = train(*RECIPE, *overrides, nproc=nproc)
        assert ended.code == 0, ended.stderr[-3000:]
        self.summary = ended.folder.read_summary()
        self.records = [record for record in ended.folder.read_metrics() if "loss" in record]
        self.folder = ended.folder.path
        result = ended.folder.adapter if ended.folder.adapter.is_dir() else ended.folder.model
        self.adapter = read_tensors(Path(result))

    def of(self, key: str) -> list[float]:
        """One figure of every step."""
        return [record[key] for record in self.records]

    def assert_same_steps(self, other: Trajectory, steps: int = STEPS) -> None:
        """The same samples in each step; losses, norms and metrics within 1e-4 relative."""
        assert len(self.records) == len(other.records) == steps
        for key in ("samples", "tokens"):
            assert self.of(key) == other.of(key), key
        for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
            assert self.of(key) == pytest.approx(other.of(key), rel=1e-4), key

    def assert_like(self, other: Trajectory, initial: Mapping[str, torch.Tensor], update: float) -> None:
        """The same steps, and each tensor's total update within `update` in norm."""
        self.assert_same_steps(other)
        assert set(self.adapter) == set(other.adapter) == set(initial)
        for name, start in initial.items():
            ours, theirs = self.adapter[name] - start, other.adapter[name] - start
            assert theirs.norm() > 0, f"{name} never moved"
            assert (ours - theirs).norm() <= update * theirs.norm(), name


Reference = Callable[[tuple[str, ...]], Trajectory]


@pytest.fixture(scope="module")
def reference(train: Train) -> Reference:
    """The trajectory of padded rows on one process with an optimizer, run once."""
    return functools.cache(lambda optimizer: Trajectory(train, *optimizer, nproc=1))


@pytest.mark.parametrize(("optimizer", "tolerance"), [(SGD, 1e-4), (ADAMW, 1e-2)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_the_same_steps(
    strategy: str,
    optimizer: tuple[str, ...],
    tolerance: float,
    reference: Reference,
    base: Trajectory,
    initial: Mapping[str, torch.Tensor],
    train: Train,
) -> None:
    """Also if it answers held-out prompts before and after, which the reference does not."""
    needs_compiler(strategy)
    ours = Trajectory(train, f"strategy={strategy}", *optimizer, *ANSWERS, nproc=2)
    answers, of_base = (Samples.read(RunFolder(run.folder)) for run in (ours, base))
    assert answers is not None and of_base is not None and any(of_base.answers[0].texts)
    assert [(each.when, each.step) for each in answers.answers] == [("before", 0), ("after", STEPS)]
    assert (answers.prompts, answers.answers[0]) == (of_base.prompts, of_base.answers[0])
    assert (ours.summary["strategy"], ours.summary["world_size"]) == (strategy, 2)
    assert reference(optimizer).summary["strategy"] == "single"
    ours.assert_like(reference(optimizer), initial, tolerance)


# In bf16 the gradients that ranks exchange are rounded too. Only the loss of the first step does not depend on them.
BF16 = ("model.dtype=bfloat16", "training.bf16=true", "training.max_steps=1", *ADAMW)


@pytest.fixture(scope="module")
def ddp_in_bf16(train: Train) -> Trajectory:
    return Trajectory(train, "strategy=ddp", *BF16, nproc=2)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_the_loss_of_bf16_is_as_exact_as_that_of_ddp(strategy: str, ddp_in_bf16: Trajectory, train: Train) -> None:
    """accelerate would have the outputs of FSDP2 in bf16, and so each loss rounded to 8 bits."""
    needs_compiler(strategy)
    ours = Trajectory(train, f"strategy={strategy}", *BF16, nproc=2)
    for key in ("loss", "entropy"):
        assert ours.of(key) == pytest.approx(ddp_in_bf16.of(key), rel=1e-4), key


def test_a_whole_model_learns_under_ddp_what_it_learns_under_fsdp(train: Train) -> None:
    """In mixed precision both update fp32 weights. Updates of bf16 weights would be rounded away at this rate."""
    words = ("lora=null", "model.dtype=bfloat16", "training.optim=adamw_torch", "training.learning_rate=2e-5")
    ddp, fsdp = (Trajectory(train, f"strategy={strategy}", *words, nproc=2) for strategy in ("ddp", "fsdp"))
    assert [run.summary["strategy"] for run in (ddp, fsdp)] == ["ddp", "fsdp"]
    assert ddp.of("loss") == pytest.approx(fsdp.of("loss"), rel=2e-3)
    config = json.loads((Path(ddp.folder / "model" / "config.json")).read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16" == str(next(iter(ddp.adapter.values())).dtype).removeprefix("torch.")


@pytest.mark.parametrize(("strategy", "processes"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_packs_take_the_steps_of_padded_rows(
    strategy: str, processes: int, reference: Reference, initial: Mapping[str, torch.Tensor], train: Train
) -> None:
    ours = Trajectory(train, f"strategy={strategy}", *PACKS, *SGD, nproc=processes)
    assert (ours.summary["strategy"], ours.summary["micro_batch_tokens"]) == (strategy, 200)
    ours.assert_like(reference(SGD), initial, 1e-4)


def test_only_the_global_batch_matters(initial: Mapping[str, torch.Tensor], train: Train) -> None:
    """1 process × accumulation 8, 2 × 4, and one micro-batch of 8."""
    whole = Trajectory(train, *SGD, "batching.micro_batch=8", nproc=1)
    for processes, accumulation in ((1, 8), (2, 4)):
        other = Trajectory(train, *SGD, "batching.micro_batch=1", nproc=processes)
        assert other.summary["gradient_accumulation_steps"] == accumulation
        other.assert_like(whole, initial, 1e-4)


# 9 samples in global batches of 8: the second step of an epoch has one, and so nothing for a second process.
REMAINDER = ("data.max_samples=12", "training.max_steps=-1", "training.num_train_epochs=2", *SGD)


@pytest.fixture(scope="module")
def remainder(train: Train) -> Trajectory:
    return Trajectory(train, *REMAINDER, nproc=1)


@pytest.mark.parametrize(
    ("strategy", "way"),
    [("ddp", ()), ("ddp", PACKS), ("fsdp", PACKS)],
    ids=["ddp padded", "ddp packed", "fsdp packed"],
)
def test_the_last_step_of_an_epoch_has_what_is_left_and_a_rank_may_have_nothing(
    strategy: str, way: tuple[str, ...], remainder: Trajectory, train: Train
) -> None:
    ours = Trajectory(train, f"strategy={strategy}", *way, *REMAINDER, nproc=2)
    assert ours.of("samples") == [8, 9, 17, 18]
    ours.assert_same_steps(remainder, steps=4)
