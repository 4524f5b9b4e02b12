"""What FSDP2 does with the layers of a model: gathered ahead, and whole until the backward where there is memory."""

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
from distft.distributed.strategies.base import Strategy
from distft.distributed.strategies.fsdp2 import keep_layers, layers_of, prefetch
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
    """Of each layer, whether its weights are whole between the forward and the backward."""
    loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    found = [not isinstance(layer.mlp.up_proj.weight, DTensor) for layer in model.model.layers]
    loss.backward()
    assert all(isinstance(layer.mlp.up_proj.weight, DTensor) for layer in model.model.layers), "sharded after a step"
    return found


def gathered(model: Any) -> list[tuple[int, tuple[int, ...]]]:
    """Of each layer's forward: its number, and which layers beyond it are already asked for."""
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


def test_the_layers_of_a_model_are_its_own(model: Any) -> None:
    assert [*map(id, layers_of(model))] == [*map(id, model.model.layers)]
    assert all(isinstance(layer, FSDPModule) for layer in layers_of(model))
    assert layers_of(torch.nn.Linear(2, 2)) == []


def test_two_layers_beyond_the_one_at_work_are_asked_for(model: Any) -> None:
    prefetch(model)
    assert gathered(model) == [(0, (1, 2)), (1, (2, 3)), (2, (3, 4)), (3, (4,)), (4, ())]


def test_by_itself_fsdp2_asks_when_it_comes_to_a_layer(model: Any) -> None:
    assert gathered(model) == [(number, ()) for number in range(LAYERS)]


def test_layers_stay_whole_where_they_take_less_than_an_eighth_of_the_memory(model: Any) -> None:
    assert whole_after_forward(model) == [False] * LAYERS
    size = sum(parameter.numel() * 4 for layer in model.model.layers for parameter in layer.parameters())
    assert keep_layers(model, 8 * size - 8) is None
    assert whole_after_forward(model) == [False] * LAYERS
    assert keep_layers(model, 8 * size) == size
    assert whole_after_forward(model) == [True] * LAYERS


def test_gradients_are_those_without_it(model: Any) -> None:
    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        whole_after_forward(model)
        return [parameter.grad.full_tensor() for parameter in model.parameters()]

    before = gradients()
    prefetch(model)
    keep_layers(model, 1e12)
    assert all(torch.equal(one, other) for one, other in zip(before, gradients(), strict=True))


def test_who_says_when_to_shard_again_is_obeyed_and_what_distft_sets_by_itself_is_nobody() -> None:
    """The probe's processes inherit the environment of the run: they must decide as the run does."""
    recipe = load_recipe(["recipe=tiny", "strategy=fsdp", "quantization=null"])
    world = World(world_size=2, local_world_size=2)
    environment: dict[str, str] = {}
    how = Strategy.choose(recipe, world, environment, Launcher())
    assert how.may_keep_layers
    how.configure(environment)
    assert environment["FSDP_VERSION"] == "2", "what accelerate reads is there"
    assert Strategy.choose(recipe, world, environment, Launcher()).may_keep_layers
    theirs = {**environment, "FSDP_RESHARD_AFTER_FORWARD": "true"}  # as a --config_file puts it there
    assert not Strategy.choose(recipe, world, theirs, Launcher()).may_keep_layers
