"""Pairs of answers: the same optimisation under every strategy, on any number of processes, packed or padded."""

from __future__ import annotations

import pytest

from distft.training.preference import FIGURES
from distft.training.rated import RatedTrainer

from ..training.test_reference import trained_adapter
from .conftest import Train
from .test_same_optimisation import Trajectory

DPO = (
    *("recipe=dpo", "training.completion_only_loss=null", "model.dtype=float32", "data.max_samples=40"),
    *("training.max_steps=3", "training.optim=sgd", "training.learning_rate=0.01"),
)
PACKED = ("batching.micro_batch_tokens=1024",)
PADDED = ("batching.micro_batch_tokens=null", "batching.micro_batch=2")


@pytest.fixture(scope="module")
def single(train: Train) -> Trajectory:
    return Trajectory(train, *DPO, *PADDED, "strategy=single", nproc=1)


@pytest.mark.parametrize(
    ("strategy", "way"),
    [("ddp", PACKED), ("fsdp", PACKED), ("zero2", PADDED)],
    ids=lambda value: str(value)[:8],
)
def test_every_strategy_learns_from_the_same_pairs(
    strategy: str, way: tuple[str, ...], single: Trajectory, train: Train
) -> None:
    found = Trajectory(train, *DPO, *way, f"strategy={strategy}", nproc=2)
    assert len(found.records) == len(single.records) == 3
    for key in ("samples", "tokens"):
        assert found.of(key) == single.of(key), key
    for key in ("loss", "grad_norm", "entropy", *FIGURES):
        assert found.of(key) == pytest.approx(single.of(key), rel=1e-4, abs=1e-5), key
    assert single.of("rewards/margins")[0] == 0 < single.of("rewards/margins")[1]


def test_kto_compares_with_the_whole_global_batch_on_any_number_of_processes(train: Train) -> None:
    """Its estimate of KL pairs each prompt with another's answer: on two ranks, in four micro-batches or one."""
    kto = (*DPO, "recipe=kto", "batching.global_batch_size=8", "preference.beta=0.5", "training.learning_rate=0.3")
    kto = (*kto, "preference.undesirable_weight=0.1")  # so that KL is positive
    single = Trajectory(train, *kto, *PACKED, "strategy=single", nproc=1)
    found = Trajectory(train, *kto, *PADDED, "strategy=fsdp", nproc=2)
    assert len(found.records) == len(single.records) == 3
    for key in ("samples", "tokens"):
        assert found.of(key) == single.of(key), key
    for key in ("loss", "grad_norm", "entropy", *RatedTrainer.measured, "rewards/margins"):
        assert found.of(key) == pytest.approx(single.of(key), rel=1e-4, abs=1e-5), key
    assert single.of("kl")[0] == 0 < max(single.of("kl"))


@pytest.fixture(scope="module")
def on_adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Training that starts from an adapter, and holds to it."""
    return (*DPO, f"adapter={trained_adapter(tmp_path_factory.mktemp('start'))}")


@pytest.fixture(scope="module")
def alone(train: Train, on_adapter: tuple[str, ...]) -> Trajectory:
    return Trajectory(train, *on_adapter, *PADDED, "strategy=single", nproc=1)


@pytest.mark.parametrize(
    ("strategy", "way"), [("ddp", PACKED), ("fsdp", PACKED), ("zero2", PADDED)], ids=lambda value: str(value)[:8]
)
def test_every_strategy_holds_to_the_adapter_that_it_starts_from(
    strategy: str, way: tuple[str, ...], on_adapter: tuple[str, ...], alone: Trajectory, train: Train
) -> None:
    found = Trajectory(train, *on_adapter, *way, f"strategy={strategy}", nproc=2)
    for key in ("samples", "tokens"):
        assert found.of(key) == alone.of(key), key
    for key in ("loss", "grad_norm", "entropy", *FIGURES):
        assert found.of(key) == pytest.approx(alone.of(key), rel=1e-4, abs=1e-5), key
    assert found.of("rewards/chosen")[0] == 0 == found.of("rewards/margins")[0] < found.of("rewards/margins")[1]
    assert found.summary["start_digest"] == alone.summary["start_digest"]
