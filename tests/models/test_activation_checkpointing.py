"""Checkpointing by layer changes no gradient, recomputes only what is needed, and uses as few layers as possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from distft.kernels import lora as lora_nodes
from distft.models import fused_lora as fused
from distft.models.activation_checkpointing import checkpoint_layers, layers_of, layers_to_checkpoint

LAYERS = 4


def model_of(device: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    model = model.to(device, dtype)
    assert fused.fuse(model) == {"attention": LAYERS, "mlp": LAYERS, "linear": LAYERS}
    return model.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.arange(2 * 17, device=model.device).view(2, 17) % 100
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("count", [1, 2, LAYERS, LAYERS + 3])
def test_checkpointing_changes_no_gradient(count: int, offload: bool, reentrant: bool) -> None:
    model = model_of("cpu")
    kept = gradients(model)
    if reentrant:
        model.enable_input_require_grads()
    assert checkpoint_layers(model, count, offload=offload, reentrant=reentrant) == min(count, LAYERS)
    assert sum(layer.gradient_checkpointing for layer in layers_of(model)) == min(count, LAYERS)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, kept[name], rtol=1e-12, atol=1e-14), name
    assert checkpoint_layers(model, 0, offload=False) == 0
    assert not any(layer.gradient_checkpointing for layer in layers_of(model))


def test_the_last_product_of_a_checkpointed_layer_is_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    forward = lora_nodes.Group.forward

    def counted(group: lora_nodes.Group, x: torch.Tensor) -> Any:
        nonlocal made
        made += 1
        return forward(group, x)

    monkeypatch.setattr(lora_nodes.Group, "forward", counted)
    model = model_of("cpu")
    gradients(model)
    groups = 4  # queries, keys and values; the attention's output; gate and up; down
    assert made == groups * LAYERS
    checkpoint_layers(model, LAYERS, offload=False)
    made = 0
    gradients(model)
    assert made == groups * LAYERS + (groups - 1) * LAYERS


def test_as_few_layers_as_possible_are_checkpointed() -> None:
    model = model_of("cpu", torch.float32)
    room = [layers_to_checkpoint(model, 4_096, free, trainable=1_000) for free in range(2**29, 2**30, 2**22)]
    assert room == sorted(room, reverse=True)
    # Checkpointing a single layer saves nothing: during its recomputation, all its activations exist anyway.
    assert set(room) == {0, *range(2, LAYERS + 1)}
    assert layers_to_checkpoint(model, 8_192, 2**30, 1_000) >= layers_to_checkpoint(model, 4_096, 2**30, 1_000)


@pytest.mark.gpu
def test_offloaded_inputs_come_back_unchanged() -> None:
    model = model_of("cuda", torch.float32)
    kept = gradients(model)
    checkpoint_layers(model, LAYERS, offload=True)
    for _ in range(2):
        for name, gradient in gradients(model).items():
            assert torch.allclose(gradient, kept[name], rtol=1e-4, atol=1e-6), name
