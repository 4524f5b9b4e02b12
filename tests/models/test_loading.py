"""Loading, merging and checkpointing quantised models."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch

from distft.config.recipe import load_recipe
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import Strategy, choose
from distft.distributed.world import World
from distft.models.activation_checkpointing import layers_of, set_up_checkpointing
from distft.models.adapter import keep_adapter_in_fp32
from distft.models.export import merge
from distft.models.fused_lora import keeps_int8_products
from distft.models.loading import load_base, load_model

FOUR = ["quantization.load_in_4bit=true"]
EIGHT = ["quantization.load_in_4bit=false", "quantization.load_in_8bit=true"]
DEQUANTISED = [*FOUR, "quantization.dequantize_at_load=true"]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distft.distributed.strategies.selection.visible_devices", lambda: 0)


def loaded(*overrides: str) -> tuple[Any, Any, Strategy]:
    recipe = load_recipe(["recipe=tiny", "strategy=single", "lora.lora_dropout=0.0", *overrides])
    strategy = choose(recipe, World(), {}, Launcher())
    return load_model(recipe, strategy), recipe, strategy


def kinds(model: Any) -> set[str]:
    return {
        type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear) and not hasattr(m, "base_layer")
    }


def learn(model: Any) -> list[torch.Tensor]:
    """The logits, and the gradients of the adapter."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.randint(5, 200, (2, 31), generator=torch.Generator().manual_seed(1))
    out = model.train()(input_ids=ids, labels=ids)
    out.loss.backward()
    return [out.logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def test_weights_dequantised_at_load_compute_what_4_bit_weights_do() -> None:
    packed, _, _ = loaded(*FOUR)
    dense, recipe, strategy = loaded(*DEQUANTISED)
    assert "Linear4bit" in kinds(packed) and kinds(dense) == {"Linear"}
    assert recipe.bits == 16 and not getattr(dense, "is_loaded_in_4bit", False)
    keep_adapter_in_fp32(dense, recipe, strategy)
    assert {p.dtype for p in dense.parameters() if p.requires_grad} == {torch.float32}
    found, expected = learn(dense), learn(packed)
    assert len(found) == len(expected) > 10 and all(tensor.abs().sum() > 0 for tensor in expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    plain, _, _ = loaded("quantization=null")
    assert not torch.equal(learn(plain)[0], expected[0]), "4-bit weights must differ from the original ones"


@pytest.mark.parametrize("overrides", [FOUR, DEQUANTISED], ids=["4 bits", "dequantised"])
def test_no_4_bit_linear_may_be_repacked_for_a_kernel_without_a_gradient(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes marks its linears on CPUs with AVX512-BF16; here they are marked on every CPU."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    assert bitsandbytes.nn.Linear4bit(2, 2).support_avx512bf16_for_cpu
    base = load_base(load_recipe(["recipe=tiny", *overrides]))
    marks = [module.support_avx512bf16_for_cpu for module in base.modules() if "Linear4bit" in type(module).__name__]
    assert marks == ([] if overrides == DEQUANTISED else [False] * 28)


def test_merging_does_not_depend_on_dequantisation_at_load(tmp_path: Any) -> None:
    model, packed, _ = loaded(*FOUR)
    _, unpacked, _ = loaded(*DEQUANTISED)
    learn(model)
    model.save_pretrained(tmp_path / "adapter")
    found = []
    for name, recipe in (("packed", packed), ("unpacked", unpacked)):
        merge(recipe, tmp_path / "adapter", tmp_path / name)
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(("kernels", "reentrant"), [("auto", False), ("plain", True)])
def test_checkpointing_releases_8_bit_products(kernels: str, reentrant: bool) -> None:
    """bitsandbytes' own nodes keep theirs where non-reentrant checkpointing cannot see them."""
    model, recipe, strategy = loaded(*EIGHT, f"model.kernels={kernels}", "training.gradient_checkpointing=true")
    assert "Linear8bitLt" in kinds(model) and keeps_int8_products(model) == reentrant
    expected = learn(model)
    model.zero_grad()
    assert set_up_checkpointing(model, recipe, strategy, 64) == len(layers_of(model))
    found = learn(model)
    assert all(torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7) for ours, theirs in zip(found, expected, strict=True))
    ids = torch.arange(5, 36).view(1, -1)
    assert not any("8bit" in name for name in nodes(model(input_ids=ids, labels=ids).loss.grad_fn))


def nodes(last: Any) -> set[str]:
    """The names of all nodes in the graph that ends in `last`."""
    found, waiting = set(), [last]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return {node.name() for node in found}
