"""LoRA linears as one autograd node each group: the queries, keys and values of a layer, its MLP, and every linear alone.

PEFT computes y = W x + s B A x as separate operations, each of which reads and writes the whole activation. Here the small
product is added in place, as one operation; what shares an input shares A x; the gradients of the input are summed in place;
and an MLP keeps no activation that its backward can make again. The gradients are those of PEFT's module (the tests check
them in float64).

With LoRA dropout the linears of a group drop the same places of their shared input; PEFT draws for each of them.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from distft.kernels.lora import LoraLinears, LoraMlp, Origin, Spec, TiledLoraMlp
from distft.models.activation_checkpointing import is_pre_norm, recomputing

_SIBLINGS = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
TILE = 12_288
"""Tokens that the MLP of a checkpointed layer takes at once, at most. 4-bit weights are unpacked for each tile: at 10,752 tokens of a 7B
model, tiles of 4,096 cost 6.5% of the speed for 0.2 GB."""
_SILU = (nn.SiLU, type(ACT2FN["silu"]))  # transformers has a class of its own


def _marked(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A norm's forward, whose output says where it comes from."""
    y: torch.Tensor = module.unmarked(x)
    if torch.is_grad_enabled() and y.dtype == x.dtype:
        y.origin = Origin(module, x.detach())  # type: ignore[attr-defined]
    return y


def fuse(model: nn.Module) -> dict[str, int]:
    """Give the LoRA linears of `model` the nodes above, where they are of a kind that these know. Returns how many modules of
    each kind there are: `attention` (queries, keys and values together), `mlp`, `linear` (alone)."""
    found = {"attention": 0, "mlp": 0, "linear": 0}
    module: Any
    for module in list(model.modules()):
        children: dict[str, Any] = dict(module.named_children())
        if all(_fits(children.get(name)) for name in _SIBLINGS):
            Siblings([children.pop(name) for name in _SIBLINGS])
            found["attention"] += 1
        if _gated(module) and all(_fits(children.get(name)) for name in _MLP):
            for name in _MLP:
                children.pop(name).is_fused = True
            module.forward = types.MethodType(_mlp, module)
            found["mlp"] += 1
        for child in children.values():
            if _fits(child):
                Siblings([child])
                found["linear"] += 1
    layer: Any
    for layer in model.modules():  # norms whose outputs are the inputs of these groups alone, in a layer as we know it
        if is_pre_norm(layer):
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                if not any(parameter.requires_grad for parameter in norm.parameters()):
                    norm.unmarked, norm.forward = norm.forward, types.MethodType(_marked, norm)
    return found


def keeps_int8_products(model: nn.Module) -> bool:
    """Whether any 8-bit linear runs in bitsandbytes' own node, which holds on to what it has computed beside the tensors that
    checkpointing knows of: only the reentrant kind, whose first forward builds no graph, is rid of it."""
    ours = {id(module.base_layer) for module in model.modules() if getattr(module, "is_fused", False)}
    return any(
        type(m).__name__ == "Linear8bitLt" and not hasattr(m, "base_layer") and id(m) not in ours
        for m in model.modules()
    )


def _fits(module: Any) -> bool:
    """A LoRA linear of one adapter over a frozen dense, 4-bit or 8-bit linear, and nothing that only PEFT's own forward does."""
    from peft.tuners.lora import Linear

    kinds: tuple[type, ...] = (Linear,)
    try:
        from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
    except ImportError:
        pass
    else:
        kinds = (Linear, Linear4bit, Linear8bitLt)
    if type(module) not in kinds:
        return False
    adapters = list(module.lora_A)
    return (
        module.active_adapters == adapters and len(adapters) == 1 and not module.lora_variant and not module.fan_in_fan_out
        and type(module.base_layer).__name__ in ("Linear", "Linear4bit", "Linear8bitLt") and isinstance(module.lora_A[adapters[0]], nn.Linear)
        and module.lora_B[adapters[0]].bias is None and not any(p.requires_grad for p in module.base_layer.parameters())
    )  # fmt: skip


def _gated(module: nn.Module) -> bool:
    """down(silu(gate(x)) · up(x)) and nothing beside it: a forward that names anything else (Falcon-H1's multipliers, say)
    computes something else."""
    code = getattr(type(module).forward, "__code__", None)
    named = set(code.co_names) if code else set()
    return named == {*_MLP, "act_fn"} and isinstance(getattr(module, "act_fn", None), _SILU)


class Siblings:
    """Linears with one input: the first that is called computes all, the others find theirs ready."""

    def __init__(self, members: list[Any]) -> None:
        self._members = members
        self._input: Any = None
        self._ready: dict[Any, torch.Tensor] = {}
        for member in members:  # each holds what its forward needs, so that a copy of the model has its own
            member.siblings, member.forward = self, types.MethodType(_linear, member)
            member.is_fused = True

    def output_of(self, member: Any, x: torch.Tensor) -> torch.Tensor:
        if self._input is not x or member not in self._ready:
            self._input, self._ready = x, dict(zip(self._members, _linears(self._members, x), strict=True))
        out = self._ready.pop(member)
        if not self._ready:
            self._input = None
        return out


def _linear(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    out: torch.Tensor
    if args or kwargs or module.disable_adapters or module.merged:
        out = type(module).forward(module, x, *args, **kwargs)
    else:
        out = module.siblings.output_of(module, x)
    return out


def _linears(members: list[Any], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    specs, tensors, p = _parts(members, x.dtype)
    y: tuple[torch.Tensor, ...] = LoraLinears.apply(  # type: ignore[no-untyped-call]
        *_input(x, specs[0].dtype), specs, p, _seed(p), *tensors
    )
    return tuple(out.to(x.dtype) for out in y)


def _mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    members = [getattr(module, name) for name in _MLP]
    # Linears that PEFT has unloaded are plain ones, and know of no adapter.
    if any(getattr(member, "disable_adapters", True) or member.merged for member in members):
        out: torch.Tensor = type(module).forward(module, x)
        return out
    specs, tensors, p = _parts(members[:2], x.dtype)
    more_specs, more_tensors, p_down = _parts(members[2:], x.dtype)
    arguments = (specs + more_specs, (p, p_down), (_seed(p), _seed(p_down)), *tensors, *more_tensors)
    if getattr(module, "output_ends_checkpoint", False):
        out = TiledLoraMlp.apply(*_input(x, specs[0].dtype), not recomputing(), TILE, *arguments)  # type: ignore[no-untyped-call]
    else:
        out = LoraMlp.apply(*_input(x, specs[0].dtype), *arguments)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)


def _input(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Origin]:
    return (x, getattr(x, "origin", None) or Origin()) if x.dtype == dtype else (x.to(dtype), Origin())


def _parts(members: list[Any], computing: torch.dtype) -> tuple[tuple[Spec, ...], list[Any], float]:
    """Of PEFT's modules as they are now (FSDP2 puts the whole parameters in place for the time of a layer's forward)."""
    specs, tensors, p = [], [], 0.0
    for member in members:
        (adapter,) = member.lora_A
        base = member.base_layer
        state = getattr(base, "quant_state", None) or getattr(base.weight, "quant_state", None)
        int8 = base if base.weight.dtype == torch.int8 and state is None else None
        if int8 is not None:
            dtype, frozen = computing, [None, None]
        else:
            dtype = base.weight.dtype if state is None else getattr(base, "compute_dtype", None) or state.dtype
            frozen = [base.weight, base.bias]
        specs.append(Spec(member.scaling[adapter], state, dtype, int8))
        tensors += [*frozen, member.lora_A[adapter].weight, member.lora_B[adapter].weight]
        drop = member.lora_dropout[adapter]
        p = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
    return tuple(specs), tensors, p


def _seed(p: float) -> int:
    """From the CPU's generator, whose state a checkpoint keeps and activation checkpointing restores; no wait for a device."""
    return int(torch.randint(2**31 - 1, ())) if p else 0
