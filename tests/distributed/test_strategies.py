"""What the strategies do differently, without starting processes."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from distft.config.files import read_yaml
from distft.config.recipe import Recipe, load_recipe
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import Strategy, choose, strategy_for
from distft.distributed.strategies.selection import STRATEGIES
from distft.distributed.world import World
from distft.errors import LaunchError
from distft.paths import packaged

TWO = World(world_size=2, local_world_size=2)
SECOND = World(rank=1, local_rank=1, world_size=2, local_world_size=2)


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distft.distributed.strategies.selection.visible_devices", lambda: 0)


def recipe_for(strategy: str, *overrides: str) -> Recipe:
    return load_recipe(["recipe=tiny", f"strategy={strategy}", "quantization=null", *overrides])


def strategy(name: str, world: World = TWO, *, on_gpu: bool = False) -> Strategy:
    return strategy_for(recipe_for(name), world, on_gpu=on_gpu)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("single", "whole"),
        ("ddp", "whole"),
        ("fsdp", "sharded by fsdp"),
        ("zero2", "zero2 on 2 processes"),
        ("zero3", "zero3 on 2 processes"),
    ],
)
def test_the_checkpoint_format_is_the_one_in_manifests_of_earlier_versions(name: str, expected: str) -> None:
    assert STRATEGIES[name](TWO, False, name).checkpoint_format == expected


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_a_single_process_falls_back_and_says_so(name: str) -> None:
    chosen = choose(recipe_for(name), World(), {}, Launcher())
    assert (chosen.name, chosen.requested, chosen.shards) == ("single", name, frozenset())
    assert chosen.notes == [
        f"one process: falling back from {name} to single on the CPU; same global batch, same optimisation"
    ]
    assert strategy("single", World()).notes == []


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_reads_its_own_config_file(name: str) -> None:
    """`accelerate launch --config_file` would set the same variables."""
    config = read_yaml(packaged(f"accelerate_configs/{name}.yaml"))
    variables = STRATEGIES[name].accelerate_environment(config)
    assert (variables.get("ACCELERATE_USE_FSDP") == "true") == (config["distributed_type"] == "FSDP")
    assert (variables.get("ACCELERATE_USE_DEEPSPEED") == "true") == (config["distributed_type"] == "DEEPSPEED")
    if name == "zero3":
        assert variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
        assert variables["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "true"


def test_a_user_s_config_file_takes_precedence() -> None:
    environment = {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
    strategy("zero3").configure(environment)
    assert environment["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] == "cpu"
    assert strategy("zero3").offloads_parameters(environment) and not strategy("ddp").offloads_parameters(environment)


def test_a_single_process_ignores_the_variables_of_a_sharding_launcher() -> None:
    environment = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "true"}
    strategy("fsdp", World()).configure(environment)
    assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(environment)


@pytest.mark.parametrize(("name", "expected"), [("ddp", {"": 1}), ("zero2", {"": 1}), ("fsdp", None), ("zero3", None)])
def test_weights_are_loaded_onto_the_process_s_own_gpu_unless_they_are_sharded(name: str, expected: Any) -> None:
    recipe = recipe_for(name)
    assert strategy(name, SECOND, on_gpu=True).device_map(recipe) == expected
    assert strategy(name, SECOND).device_map(recipe) is None, "on the CPU"


def test_fsdp_loads_4_bit_weights_onto_the_gpu() -> None:
    recipe = load_recipe(["recipe=tiny", "strategy=fsdp", "quantization.bnb_4bit_quant_storage=float32"])
    assert strategy("fsdp", SECOND, on_gpu=True).device_map(recipe) == {"": 1}


def test_only_deepspeed_casts_frozen_weights_to_the_dtype_of_mixed_precision() -> None:
    recipe = recipe_for("zero2", "training.bf16=true")
    assert strategy("zero2").cast_dtypes(recipe) == {torch.bfloat16}
    assert strategy("zero2").cast_dtypes(recipe_for("zero2", "training.bf16=false")) == frozenset()
    assert strategy("ddp").cast_dtypes(recipe) == frozenset()


def test_only_deepspeed_needs_the_accumulation_steps_up_front() -> None:
    environment: dict[str, str] = {}
    strategy("ddp").accumulate(environment, 4)
    assert environment == {}
    strategy("zero2").accumulate(environment, 4)
    assert environment == {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}


def test_fsdp_rejects_a_parameter_that_is_not_sharded() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert "parameter w is not sharded (a Parameter" in (strategy("fsdp").parameter_fault("w", parameter) or "")
    assert strategy("ddp").parameter_fault("w", parameter) is None


def test_deepspeed_without_a_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(LaunchError, match="no C\\+\\+ compiler"):
        choose(recipe_for("zero2"), TWO, {}, Launcher())


def test_single_on_several_processes_is_an_error() -> None:
    with pytest.raises(LaunchError, match="2 processes were started; start one"):
        choose(recipe_for("single"), TWO, {}, Launcher())


@pytest.mark.parametrize(
    ("devices", "world", "message"),
    [(2, World(), "one process sees 2 GPUs"), (1, TWO, "2 processes on this machine, which has 1 visible GPU;")],
)
def test_processes_that_do_not_fit_the_gpus_are_an_error(
    devices: int, world: World, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distft.distributed.strategies.selection.visible_devices", lambda: devices)
    with pytest.raises(LaunchError, match=message):
        choose(recipe_for("ddp"), world, {}, Launcher())
