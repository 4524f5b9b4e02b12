"""What distft knows about the modules of transformers' architectures, beyond their names.

Replacing a module's forward is correct only if the forward computes what its submodules suggest. Falcon-H1's MLP, for
example, has Llama's linears and multiplies their outputs by constants. So the classes whose computation is known are
listed here, and each module is tried out as well, with small stand-ins for its submodules: a name alone proves nothing
about another version of transformers. A model that is not listed trains correctly, but a little slower: its linears are
fused one by one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distft.kernels.elementwise import ACTIVATIONS

QKV = ("q_proj", "k_proj", "v_proj")
"""Linears of an attention module that share their input."""
_GATED_MLPS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))
"""Linears of a gated MLP, down(act(gate(x)) · up(x)), in the order of their computation. Gate and up may be one."""
_ACTIVATIONS = ("act_fn", "activation_fn")
"""Names of a gated MLP's activation."""
_PRE_NORM = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


@dataclass(frozen=True)
class Architecture:
    """The classes `<prefix>MLP` and `<prefix>DecoderLayer` of one family of models."""

    prefix: str
    gated_mlp: bool = True
    """The MLP computes down(act(gate(x)) · up(x)) and nothing else."""
    pre_norm: bool = True
    """The layer computes x += attention(norm(x)); x += mlp(norm(x)), up to constant factors of the two summands."""


ARCHITECTURES = {
    "arcee": Architecture("Arcee", gated_mlp=False),
    "bamba": Architecture("Bamba", pre_norm=False),
    "cohere": Architecture("Cohere", pre_norm=False),
    "cohere2": Architecture("Cohere2", pre_norm=False),
    "cwm": Architecture("Cwm"),
    "deepseek_v2": Architecture("DeepseekV2"),
    "deepseek_v3": Architecture("DeepseekV3"),
    "diffllama": Architecture("DiffLlama"),
    "dots1": Architecture("Dots1"),
    "ernie4_5": Architecture("Ernie4_5"),
    "ernie4_5_moe": Architecture("Ernie4_5_Moe"),
    "exaone4": Architecture("Exaone4", pre_norm=False),
    "gemma": Architecture("Gemma"),
    "gemma2": Architecture("Gemma2", pre_norm=False),
    "gemma3": Architecture("Gemma3", pre_norm=False),
    "glm": Architecture("Glm"),
    "glm4": Architecture("Glm4", pre_norm=False),
    "glm4_moe": Architecture("Glm4Moe"),
    "granite": Architecture("Granite"),
    "helium": Architecture("Helium"),
    "hunyuan_v1_dense": Architecture("HunYuanDenseV1"),
    "hunyuan_v1_moe": Architecture("HunYuanMoEV1"),
    "jamba": Architecture("Jamba", pre_norm=False),
    "llama": Architecture("Llama"),
    "minimax_m2": Architecture("MiniMaxM2", gated_mlp=False),
    "ministral": Architecture("Ministral"),
    "ministral3": Architecture("Ministral3"),
    "mistral": Architecture("Mistral"),
    "mixtral": Architecture("Mixtral", gated_mlp=False),
    "nemotron": Architecture("Nemotron", gated_mlp=False),
    "olmo": Architecture("Olmo"),
    "olmo2": Architecture("Olmo2", pre_norm=False),
    "olmo3": Architecture("Olmo3", pre_norm=False),
    "olmoe": Architecture("Olmoe"),
    "phi3": Architecture("Phi3"),
    "phimoe": Architecture("Phimoe", gated_mlp=False),
    "qwen2": Architecture("Qwen2"),
    "qwen2_moe": Architecture("Qwen2Moe"),
    "qwen3": Architecture("Qwen3"),
    "qwen3_5": Architecture("Qwen3_5"),
    "qwen3_5_moe": Architecture("Qwen3_5Moe"),
    "qwen3_moe": Architecture("Qwen3Moe"),
    "qwen3_next": Architecture("Qwen3Next"),
    "seed_oss": Architecture("SeedOss", gated_mlp=False),
    "smollm3": Architecture("SmolLM3"),
    "starcoder2": Architecture("Starcoder2", gated_mlp=False),
}
"""By the name of the package in `transformers.models`."""


def _class_names(suffix: str, families: list[str]) -> frozenset[str]:
    return frozenset(
        f"transformers.models.{family}.modeling_{family}.{ARCHITECTURES[family].prefix}{suffix}" for family in families
    )


_MLPS = _class_names("MLP", [family for family, known in ARCHITECTURES.items() if known.gated_mlp])
_LAYERS = _class_names("DecoderLayer", [family for family, known in ARCHITECTURES.items() if known.pre_norm])


@dataclass(frozen=True)
class GatedMlp:
    """What a gated MLP computes: down(act(gate(x)) · up(x)), and nothing else."""

    linears: tuple[str, ...]
    """Names of its linears in the order of their computation; gate and up may be one."""
    activation: str
    """One of the kernels' `ACTIVATIONS`."""


def gated_mlp(module: nn.Module) -> GatedMlp | None:
    """What `module` computes, if that is a gated MLP with an activation that the kernels have."""
    names = {name for name, _ in module.named_children()}
    linears = next((linears for linears in _GATED_MLPS if names.issuperset(linears)), None)
    act = next((name for name in _ACTIVATIONS if hasattr(module, name)), None)
    if linears is None or act is None or _name(module) not in _MLPS:
        return None
    candidates = (GatedMlp(linears, activation) for activation in ACTIVATIONS)
    return next((each for each in candidates if _tries_out(functools.partial(_is_gated, act, each), module)), None)


def is_pre_norm(layer: nn.Module) -> bool:
    """Whether `layer` is x += attention(norm(x)); x += mlp(norm(x)), so that nothing in its backward needs the output
    of its MLP, and its norms feed its attention and its MLP alone."""
    names = {name for name, _ in layer.named_children()} - set(_idle_dropouts(layer))
    return _name(layer) in _LAYERS and names == _PRE_NORM and _tries_out(_adds_its_mlp_last, layer)


def _idle_dropouts(layer: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in layer.named_children() if isinstance(module, nn.Dropout) and module.p == 0}


def _tries_out(check: Callable[[Any], bool], module: nn.Module) -> bool:
    try:
        return check(module)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False  # its forward expects something else


def _is_gated(act: str, known: GatedMlp, mlp: Any) -> bool:
    """Whether `mlp`, whose activation is its module `act`, computes what is `known`."""

    def linear(number: int, inputs: int, outputs: int) -> Callable[[torch.Tensor], torch.Tensor]:
        weight = torch.arange(number, number + inputs * outputs, dtype=torch.float64).cos().view(inputs, outputs)
        return lambda x: x @ weight

    *pair, down = known.linears
    linears = {name: linear(number, 3, 10 // len(pair)) for number, name in enumerate(pair)} | {down: linear(5, 5, 3)}
    x = torch.arange(6, dtype=torch.float64).sin().view(2, 3)
    gate, up = torch.cat([linears[name](x) for name in pair], -1).chunk(2, -1)
    expected = linears[down](ACTIVATIONS[known.activation](gate) * up)
    return torch.allclose(_forward(mlp, {**linears, act: getattr(mlp, act)}, x), expected, rtol=1e-9, atol=1e-9)


def _adds_its_mlp_last(layer: Any) -> bool:
    """Whether the gradients do not depend on what the MLP returns."""
    x = torch.arange(6, dtype=torch.float64).sin().view(1, 2, 3).requires_grad_()

    def gradients(of_mlp: torch.Tensor) -> torch.Tensor:
        def attention(*args: Any, hidden_states: Any = None, **_: Any) -> Any:
            return (args[0] if args else hidden_states).square(), None

        def norm(y: torch.Tensor) -> torch.Tensor:
            return y.sin()

        parts = {"input_layernorm": norm, "self_attn": attention, "post_attention_layernorm": norm, "mlp": of_mlp.add}
        found = _forward(layer, parts | _idle_dropouts(layer), x, position_embeddings=None)
        out = found[0] if isinstance(found, tuple) else found
        return torch.cat(torch.autograd.grad((out * x.detach().cos()).sum(), (x, of_mlp)))

    with torch.enable_grad():
        one, other = (gradients(torch.full_like(x, value).requires_grad_()) for value in (0.0, 7.0))
    return torch.equal(one, other)


def _forward(module: nn.Module, parts: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of `module` in evaluation mode with `parts` in place of its submodules; `module` does not change."""
    trial = copy.copy(module)
    vars(trial).update(_modules=parts, training=False)
    return type(module).forward(trial, *args, **kwargs)


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
