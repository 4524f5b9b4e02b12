"""What FSDP2 does with the layers of a model: they are gathered ahead, and kept until the backward if memory allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from distft.config.recipe import load_recipe
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import choose
from distft.distributed.strategies.fsdp2 import FSDP2, keep_layers, layers_of, prefetch
from distft.distributed.world import World

LAYERS = 5


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Any]:
    """A small model, sharded layer by layer as accelerate does it, in a group of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        made = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, vocab_size=64
            )
        )
        mesh = distributed.init_device_mesh("cpu", (1,))
        for layer in made.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(made, mesh=mesh)
        yield made
    finally:
        distributed.destroy_process_group()


def whole_after_forward(model: Any) -> list[bool]:
    """For each layer, whether its weights are unsharded between the forward and the backward pass."""
    loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    found = [not isinstance(layer.mlp.up_proj.weight, DTensor) for layer in model.model.layers]
    loss.backward()
    assert all(isinstance(layer.mlp.up_proj.weight, DTensor) for layer in model.model.layers), "sharded after a step"
    return found


def gathered(model: Any) -> list[tuple[int, tuple[int, ...]]]:
    """For each layer's forward: its number, and the later layers whose all-gather has been issued."""
    seen = []
    groups = [layer._get_fsdp_state()._fsdp_param_groups[0] for layer in model.model.layers]
    for number, layer in enumerate(model.model.layers):

        def look(*_: Any, number: int = number) -> None:
            asked = (n for n in range(number + 1, LAYERS) if groups[n]._all_gather_result is not None)
            seen.append((number, tuple(asked)))

        layer.input_layernorm.register_forward_pre_hook(look)
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    return seen


def test_layers_of_finds_the_sharded_layers_in_order(model: Any) -> None:
    assert [*map(id, layers_of(model))] == [*map(id, model.model.layers)]
    assert all(isinstance(layer, FSDPModule) for layer in layers_of(model))
    assert layers_of(torch.nn.Linear(2, 2)) == []


def test_prefetching_gathers_the_next_two_layers(model: Any) -> None:
    prefetch(model)
    assert gathered(model) == [(0, (1, 2)), (1, (2, 3)), (2, (3, 4)), (3, (4,)), (4, ())]


def test_without_prefetching_fsdp2_gathers_a_layer_when_it_reaches_it(model: Any) -> None:
    assert gathered(model) == [(number, ()) for number in range(LAYERS)]


def test_layers_stay_gathered_if_they_take_at_most_an_eighth_of_the_memory(model: Any) -> None:
    assert whole_after_forward(model) == [False] * LAYERS
    size = sum(parameter.numel() * 4 for layer in model.model.layers for parameter in layer.parameters())
    assert keep_layers(model, 8 * size - 8) is None
    assert whole_after_forward(model) == [False] * LAYERS
    assert keep_layers(model, 8 * size) == size
    assert whole_after_forward(model) == [True] * LAYERS


def test_prefetching_and_keeping_layers_do_not_change_gradients(model: Any) -> None:
    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        whole_after_forward(model)
        return [parameter.grad.full_tensor() for parameter in model.parameters()]

    before = gradients()
    prefetch(model)
    keep_layers(model, 1e12)
    assert all(torch.equal(one, other) for one, other in zip(before, gradients(), strict=True))


def test_a_user_s_resharding_setting_is_respected_and_distft_s_own_variables_do_not_count_as_one() -> None:
    """The processes of the batch-size probe inherit the environment of the run and must decide as the run does."""
    recipe = load_recipe(["recipe=tiny", "strategy=fsdp", "quantization=null"])
    world = World(world_size=2, local_world_size=2)
    environment: dict[str, str] = {}

    def may_keep_layers(environment: dict[str, str]) -> bool:
        strategy = choose(recipe, world, environment, Launcher())
        assert isinstance(strategy, FSDP2)
        return strategy.may_keep_layers

    assert may_keep_layers(environment)
    choose(recipe, world, environment, Launcher()).configure(environment)
    assert environment["FSDP_VERSION"] == "2", "accelerate's variables are set"
    assert may_keep_layers(environment)
    assert not may_keep_layers({**environment, "FSDP_RESHARD_AFTER_FORWARD": "true"})  # as a --config_file sets it
