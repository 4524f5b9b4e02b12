"""The table of architectures against the installed transformers: every listed class computes what the table says."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.activations import ACT2FN

from distft.kernels.elementwise import ACTIVATIONS
from distft.models.architectures import ARCHITECTURES, Architecture, gated_mlp, is_pre_norm

HIDDEN = 32
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
}
FULL_ATTENTION = {"layer_types": ["full_attention"]}
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4},
    "dots1": {"first_k_dense_replace": 1},
    "qwen3_5": FULL_ATTENTION,
    "qwen3_5_moe": FULL_ATTENTION,
    "qwen3_next": FULL_ATTENTION,
}
"""What some families need besides the sizes."""
MULTIMODAL = {"gemma3", "qwen3_5", "qwen3_5_moe"}


def built(family: str, suffix: str) -> nn.Module:
    """A module of random weights of the class of `family` that ends in `suffix`."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cls = getattr(module, ARCHITECTURES[family].prefix + suffix)
    model_type = f"{family}_text" if family in MULTIMODAL else family
    config: Any = AutoConfig.for_model(model_type, **SIZES, **MORE.get(family, {}))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    values = {"config": config, "layer_idx": 0, "hidden_size": HIDDEN, "intermediate_size": 48, "hidden_act": "silu"}
    wanted = {
        name: values.get(name, config)
        for name, parameter in inspect.signature(cls).parameters.items()
        if name in values or parameter.default is inspect.Parameter.empty
    }
    found: nn.Module = cls(**wanted)
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.3)
    return found.eval()


def listed(**flags: bool) -> list[str]:
    return [
        family
        for family, known in ARCHITECTURES.items()
        if all(getattr(known, flag) == value for flag, value in flags.items())
    ]


@pytest.mark.parametrize("family", listed(gated_mlp=True))
def test_a_listed_mlp_computes_a_gated_mlp(family: str) -> None:
    mlp: Any = built(family, "MLP")
    act = "activation_fn" if hasattr(mlp, "activation_fn") else "act_fn"
    x = torch.randn(3, HIDDEN)
    for name, module in {"silu": nn.SiLU(), "gelu_tanh": ACT2FN["gelu_new"], "gelu": nn.GELU()}.items():
        setattr(mlp, act, module)
        known = gated_mlp(mlp)
        assert known is not None and known.activation == name
        assert {name for name, _ in mlp.named_children()} == {*known.linears, act}
        outputs = torch.cat([getattr(mlp, linear)(x) for linear in known.linears[:-1]], 1)
        gate, up = outputs.chunk(2, 1)
        torch.testing.assert_close(mlp(x), mlp.down_proj(ACTIVATIONS[name](gate) * up))
    setattr(mlp, act, nn.ReLU())
    assert gated_mlp(mlp) is None


@pytest.mark.parametrize("family", listed(pre_norm=True))
def test_a_listed_layer_adds_attention_and_mlp_of_norms(family: str) -> None:
    """Its norms feed its attention and its MLP alone, and no backward needs the output of the MLP."""
    layer: Any = built(family, "DecoderLayer")
    assert is_pre_norm(layer)
    x = torch.randn(1, 3, HIDDEN)
    seen: dict[str, torch.Tensor] = {}

    def constant(name: str, value: torch.Tensor) -> Any:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen[name] = hidden_states
            return (value, None) if name == "self_attn" else value

        return forward

    def output(attention: torch.Tensor, mlp: torch.Tensor) -> torch.Tensor:
        layer.self_attn.forward = constant("self_attn", attention)
        layer.mlp.forward = constant("mlp", mlp)
        found = layer(x, position_embeddings=None)
        return found[0] if isinstance(found, tuple) else found

    zero, attention, mlp = torch.zeros_like(x), torch.randn_like(x), torch.randn_like(x)
    torch.testing.assert_close(output(zero, zero), x)
    torch.testing.assert_close(seen["self_attn"], layer.input_layernorm(x))
    torch.testing.assert_close(seen["mlp"], layer.post_attention_layernorm(x))
    scaled = output(attention, zero) - x
    torch.testing.assert_close(seen["mlp"], layer.post_attention_layernorm(x + scaled))
    torch.testing.assert_close(scaled * attention.norm(), attention * scaled.norm())
    scaled = output(zero, mlp) - x
    torch.testing.assert_close(scaled * mlp.norm(), mlp * scaled.norm())


def test_a_layer_with_more_modules_is_not_pre_norm() -> None:
    layer: Any = built("llama", "DecoderLayer")
    layer.extra = nn.Identity()
    assert not is_pre_norm(layer)


def test_an_unlisted_class_is_not_trusted() -> None:
    class LlamaMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
            self.act_fn = nn.SiLU()

    assert gated_mlp(LlamaMLP()) is None


def test_a_listed_class_whose_forward_has_changed_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp: Any = built("llama", "MLP")
    layer: Any = built("llama", "DecoderLayer")
    assert gated_mlp(mlp) and is_pre_norm(layer)
    original, of_layer = type(mlp).forward, type(layer).forward
    monkeypatch.setattr(type(mlp), "forward", lambda self, x: 1.5 * original(self, x))
    assert gated_mlp(mlp) is None
    monkeypatch.setattr(type(layer), "forward", lambda self, *args, **kwargs: of_layer(self, *args, **kwargs).square())
    assert not is_pre_norm(layer)


def test_trying_a_module_out_changes_neither_it_nor_the_random_numbers() -> None:
    layer: Any = built("llama", "DecoderLayer").train()
    children, state = dict(layer.named_children()), torch.get_rng_state()
    assert is_pre_norm(layer) and gated_mlp(layer.mlp) and layer.training
    assert dict(layer.named_children()) == children and torch.equal(torch.get_rng_state(), state)


def test_the_table_is_sorted_and_says_something_of_each_family() -> None:
    assert list(ARCHITECTURES) == sorted(ARCHITECTURES)
    assert Architecture("", gated_mlp=False, pre_norm=False) not in ARCHITECTURES.values()
