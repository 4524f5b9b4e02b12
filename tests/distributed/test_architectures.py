"""Six architectures take the same steps under every strategy. Each run of the tests takes a sample of the pairs; `-m
thorough` takes all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.families import saved

from .conftest import Train, needs_compiler

FAMILIES = ("bloom", "gemma3_text", "gpt_neox", "gpt_oss", "mixtral", "qwen3")
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
EVERY_TIME = {("gemma3_text", "zero3")}
"""test_same_optimisation.py has a Llama under every strategy, and test_experts.py a mixture of experts."""
WORDS = (
    "recipe=tiny",
    "quantization=null",
    "data.max_samples=40",
    "lora.r=4",
    "lora.lora_dropout=0",
    "batching.global_batch_size=8",
    "batching.micro_batch_tokens=512",
    "training.max_steps=3",
    "training.logging_steps=1",
    "training.eval_strategy=no",
    "training.save_strategy=no",
    "training.lr_scheduler_type=constant",
    "training.warmup_steps=0",
    "training.optim=sgd",
    "training.learning_rate=0.3",
    "evaluation.before_and_after=false",
)

_OF_EXPERTS = (
    "training.router_aux_loss_coef=0",  # a product of means over a micro-batch, which differ between world sizes
    "lora.target_modules=[q_proj,v_proj]",  # ZeRO-3 trains no adapters on experts
)

Steps = list[tuple[float, float]]
Taken = Callable[[str, str], Steps]


@pytest.fixture(scope="module")
def steps(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """Loss and gradient norm of each step of a family under a strategy, run once."""

    @functools.cache
    def model(family: str) -> Path:
        return saved(family, tmp_path_factory.mktemp(family))

    @functools.cache
    def taken(family: str, strategy: str) -> Steps:
        words = [*WORDS, *(_OF_EXPERTS if family in ("gpt_oss", "mixtral") else ())]
        processes = 1 if strategy == "single" else 2
        ended = train(*words, f"model.name={model(family)}", f"strategy={strategy}", nproc=processes)
        assert ended.code == 0, ended.stderr[-3000:]
        summary = ended.folder.read_summary()
        assert (summary["strategy"], summary["world_size"]) == (strategy, processes)
        return [(each["loss"], each["grad_norm"]) for each in ended.folder.read_metrics() if "loss" in each]

    return taken


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        pytest.param(family, strategy, marks=() if (family, strategy) in EVERY_TIME else pytest.mark.thorough)
        for family in FAMILIES
        for strategy in STRATEGIES
    ],
)
def test_an_architecture_takes_the_same_steps_under_a_strategy(family: str, strategy: str, steps: Taken) -> None:
    needs_compiler(strategy)
    found, expected = steps(family, strategy), steps(family, "single")
    assert len(found) == len(expected) == 3
    for step, alone in zip(found, expected, strict=True):
        assert step == pytest.approx(alone, rel=1e-4)
