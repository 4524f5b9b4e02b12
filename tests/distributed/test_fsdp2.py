"""What FSDP2 does with the layers of a model: they are gathered ahead, and kept until the backward if memory allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import distributed
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from distft import upstream_api
from distft.config.recipe import load_recipe
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import choose
from distft.distributed.strategies.fsdp2 import FSDP2, keep_layers, layers_of, prefetch
from distft.distributed.world import World
from distft.errors import InvariantError
from distft.training.invariants import check_packed, packed_checksums

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


def every_bit_pattern() -> torch.Tensor:
    """All 65,536 numbers of 16 bits, the NaNs among them, as packed 4-bit weights may have them."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).unsqueeze(1)


def gather_packed_weights(rank: int, folder: str) -> None:
    """Gather weights as FSDP2 does in a forward pass, on two GPUs, and compare their bits."""
    distributed.init_process_group("nccl", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.cuda.set_device(rank)
    try:
        upstream_api.gather_bytes()
        module = torch.nn.Linear(4, 4, bias=False, device="cuda", dtype=torch.bfloat16)
        module.packed = torch.nn.Parameter(every_bit_pattern().cuda(), requires_grad=False)
        fully_shard(module, mesh=distributed.init_device_mesh("cuda", (2,)))
        module.unshard()
        assert torch.equal(module.packed.view(torch.int16).cpu(), every_bit_pattern().view(torch.int16))
    finally:
        distributed.destroy_process_group()


@pytest.mark.gpu(2)
def test_packed_weights_keep_their_bits_on_gpus(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(gather_packed_weights, (str(tmp_path),), nprocs=2)


def test_shards_of_packed_weights_are_gathered_as_bytes(model: Any) -> None:
    upstream_api.gather_bytes()
    metadata = _fsdp_collectives._get_all_gather_input_metadatas
    one, two = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.bfloat16)
    assert metadata([[one], [two]]) == ([[torch.bfloat16]] * 2, [[3], [5]], torch.uint8)
    before = [parameter.full_tensor() for parameter in model.model.layers[0].parameters()]
    model.model.layers[0].unshard()
    assert all(map(torch.equal, before, model.model.layers[0].parameters()))


def test_packed_weights_that_change_stop_the_run(model: Any) -> None:
    strategy = FSDP2(World(), False, "fsdp")
    packed = torch.nn.Module()
    layer = Linear4bit(64, 64, bias=False, quant_storage=torch.bfloat16).to("cpu")
    packed.layers = torch.nn.ModuleList([torch.nn.Sequential(layer)])
    before = packed_checksums(packed)
    assert [*before] == ["layers.0.0.weight"]
    fully_shard(packed.layers[0], mesh=distributed.init_device_mesh("cpu", (1,)))
    check_packed(packed, strategy, before)
    layer.weight.to_local().view(torch.int16)[5] ^= 1
    with pytest.raises(InvariantError, match=r"changed the bits of 1 packed weight, layers\.0\.0\.weight first"):
        check_packed(packed, strategy, before)
