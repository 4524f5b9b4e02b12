"""LoRA linears fused into one autograd node per group: queries, keys and values; a whole MLP; or a single linear.

PEFT computes y = W x + s B A x as separate operations, each of which reads and writes the whole activation. The nodes
in `distft.kernels.lora` add the small product in place, compute A x once for all linears that share the input x,
accumulate the gradients of x in place, and recompute the inner activations of an MLP. The gradients are those of PEFT's
modules; the tests check them in float64.

`fuse` gives the modules subclasses of their own classes (`FusedLinear`, `FusedMLP`, `TrackedNorm`); parameters and
names stay as they are.

One difference remains: with LoRA dropout, the linears of a group drop the same elements of their input, where PEFT
draws a mask for each.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from distft import upstream_api
from distft.kernels.dora import Scaled, row_norms
from distft.kernels.liger import use_plain_kernels
from distft.kernels.lora import LoraLinears, LoraMlp, Origin, Spec, TiledLoraMlp
from distft.kernels.subclass import FastForward, subclass_in_place
from distft.models.architectures import QKV, GatedMlp, gated_mlp, is_pre_norm
from distft.models.experts import Experts

TILE = 12_288
"""Largest number of tokens that the MLP of a checkpointed layer processes at once. Each tile dequantises the 4-bit
weights again: for 10,752 tokens of a 7B model, tiles of 4,096 cost 6.5% of the speed and save 0.2 GB."""


_LINEARS = {"Linear", "Linear4bit", "Linear8bitLt", "FalconLinear", "Conv1D"}
"""Names of the classes that compute W x + b: those of PyTorch and bitsandbytes, and transformers' own."""


def fuse(model: nn.Module) -> dict[str, int]:
    """Fuse the LoRA linears of `model` that the nodes support, in place.

    Returns:
        The number of fused groups by kind: `attention` (queries, keys and values), `mlp`, and `linear` (one by itself).
    """
    found = {"attention": 0, "mlp": 0, "linear": 0}
    for module in list(model.modules()):
        children: dict[str, Any] = dict(module.named_children())
        if all(_fits(children.get(name)) for name in QKV):
            LinearGroup([children.pop(name) for name in QKV])
            found["attention"] += 1
        mlp = gated_mlp(module)
        inner = [] if mlp is None else [children.get(name) for name in mlp.linears]
        if mlp is not None and all(_fits(child) and _magnitude_of(child) is None for child in inner):
            subclass_in_place(module, FusedMLP)
            module.computes = mlp  # type: ignore[assignment]
            for name in mlp.linears:
                children.pop(name)
            found["mlp"] += 1
        for child in children.values():
            if _fits(child):
                LinearGroup([child])
                found["linear"] += 1
    layer: Any
    for layer in model.modules():
        if is_pre_norm(layer):
            _track(layer.input_layernorm, layer.self_attn)
            _track(layer.post_attention_layernorm, layer.mlp)
    return found


def fused_linears(model: nn.Module) -> tuple[int, int]:
    """How many of the model's linears with an adapter are computed by fused nodes, and how many there are. Neither
    embeddings nor experts that are one parameter are linears."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    fused: set[int] = set()
    for module in model.modules():
        if isinstance(module, FusedLinear | FusedMLP) and not module.plain:
            fused |= {id(member) for member in module.members() if isinstance(member, LoraLayer)}
    adapters = [m for m in model.modules() if isinstance(m, LoraLayer) and not isinstance(m, ParamWrapper)]
    adapted = [m for m in adapters if m.lora_A]  # an adapter of embeddings has its parameters elsewhere
    return len(fused), len(adapted)


def use_plain_modules(model: nn.Module, plain: bool = True) -> None:
    """Let the modules of PEFT and transformers compute what `fuse` and `use_fast_kernels` have replaced, or the fused
    nodes and kernels again."""
    use_plain_kernels(model, plain)
    for module in _replaced(model):
        module.plain = plain


def uses_plain_modules(model: nn.Module) -> bool:
    """Whether `use_plain_modules` is in effect."""
    return any(module.plain for module in _replaced(model))


def has_plain_modules(model: nn.Module) -> bool:
    """Whether `use_plain_modules` makes a difference."""
    return any(True for _ in _replaced(model))


def _replaced(model: nn.Module) -> Iterator[Any]:
    kinds = FusedLinear | FusedMLP | Experts | FastForward
    yield from (module for module in model.modules() if isinstance(module, kinds))


def keeps_int8_products(model: nn.Module) -> bool:
    """Whether a forward keeps 8-bit products alive that activation checkpointing cannot see.

    bitsandbytes' own node of an 8-bit linear holds them outside of autograd's saved tensors. Only reentrant
    checkpointing, whose first forward builds no graph, releases them.
    """
    fused: set[int] = set()
    for module in model.modules():
        if isinstance(module, FusedLinear | FusedMLP) and not module.plain:
            fused |= {id(member.base_layer) for member in module.members() if hasattr(member, "base_layer")}
    return any(
        type(module).__name__ == "Linear8bitLt" and not hasattr(module, "base_layer") and id(module) not in fused
        for module in model.modules()
    )


def _fits(module: Any) -> bool:
    """Whether `module` is a LoRA linear with one adapter, over a frozen dense, 4-bit or 8-bit linear, that uses no
    feature which only PEFT's own forward implements."""
    from peft.tuners import lora

    kinds = [lora.Linear, *(getattr(lora, name) for name in ("Linear4bit", "Linear8bitLt") if hasattr(lora, name))]
    if type(module) not in kinds:
        return False
    adapters = list(module.lora_A)
    return (
        module.active_adapters == adapters
        and len(adapters) == 1
        and (not module.lora_variant or _is_plain_dora(module))
        and type(module.base_layer).__name__ in _LINEARS
        and module.fan_in_fan_out == (type(module.base_layer) is Conv1D)
        and isinstance(module.lora_A[adapters[0]], nn.Linear)
        and module.lora_B[adapters[0]].bias is None
        and not any(parameter.requires_grad for parameter in module.base_layer.parameters())
    )


def _is_plain_dora(module: Any) -> bool:
    """Whether all that PEFT does besides is to scale the rows of W + s B A. With dropout, it scales W d(x) as well."""
    (adapter,) = module.active_adapters
    return (
        type(module.lora_variant.get(adapter)).__name__ == "DoraLinearVariant"
        and not module.ephemeral_gpu_offload
        and not isinstance(module.lora_dropout[adapter], nn.Dropout)
        and type(module.base_layer).__name__ != "Linear8bitLt"
    )


def _magnitude_of(module: Any) -> Any:
    """DoRA's trained magnitudes [out] of a LoRA linear, or None."""
    (adapter,) = module.lora_A
    return module.lora_magnitude_vector[adapter].weight if adapter in module.lora_magnitude_vector else None


class LinearGroup:
    """LoRA linears with the same input. The first to be called computes the outputs of all; the others pick theirs
    up."""

    def __init__(self, members: list[Any]) -> None:
        self.members = members
        self.norm: NormOutput | None = None
        self._input: Any = None
        self._ready: dict[Any, torch.Tensor] = {}
        for member in members:  # each holds its group, so a copy of the model has groups of its own
            subclass_in_place(member, FusedLinear)
            member.group = self

    def output_of(self, member: Any, x: torch.Tensor) -> torch.Tensor:
        """The output of `member` for x [..., in]."""
        if self._input is not x or member not in self._ready:
            self._input, self._ready = x, dict(zip(self.members, self._outputs(x), strict=True))
        out = self._ready.pop(member)
        if not self._ready:
            self._input = None
        return out

    def _outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        specs, tensors, p = _parts(self.members, x.dtype)
        magnitudes, biases = [_magnitude_of(member) for member in self.members], tensors[1::4]
        tensors[1::4] = [bias if m is None else None for bias, m in zip(biases, magnitudes, strict=True)]
        y: list[torch.Tensor] = list(
            LoraLinears.apply(  # type: ignore[no-untyped-call]
                *_input(x, specs[0].dtype, self.norm), specs, p, _seed(p), *tensors
            )
        )
        for at, (m, spec) in enumerate(zip(magnitudes, specs, strict=True)):
            if m is not None:
                weight, _, a, b = tensors[4 * at : 4 * at + 4]
                norms = row_norms(spec.dense(weight), a, b, spec.scaling)
                y[at] = Scaled.apply(y[at], m / norms, biases[at])  # type: ignore[no-untyped-call]
        return tuple(out.to(x.dtype) for out in y)


class FusedLinear(nn.Module):
    """Mixin for PEFT's LoRA linears: y = W x + s B A x, computed together with the linears of its group."""

    group: LinearGroup
    plain: bool = False
    """Leave the computation to PEFT's module."""

    def members(self) -> list[Any]:
        return self.group.members

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor
        if args or kwargs or self.plain or self.disable_adapters or self.merged:
            out = super().forward(x, *args, **kwargs)
        else:
            out = self.group.output_of(self, x)
        return out


class FusedMLP(nn.Module):
    """Mixin for gated MLPs: down(act(gate(x)) · up(x)) as one node."""

    computes: GatedMlp
    norm: NormOutput | None = None
    plain: bool = False
    """Leave the computation to the MLP's own modules."""
    ends_checkpoint: bool = False
    """Nothing in the backward needs the output once more, so a recomputation leaves it out."""

    def members(self) -> list[Any]:
        return [getattr(self, name) for name in self.computes.linears]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        members = self.members()
        out: torch.Tensor
        # After PEFT's unload, the members are plain linears without an adapter.
        if self.plain or any(getattr(member, "disable_adapters", True) or member.merged for member in members):
            out = super().forward(x)
            return out
        specs, tensors, p = _parts(members[:-1], x.dtype)
        down_specs, down_tensors, p_down = _parts(members[-1:], x.dtype)
        specs, tensors = specs + down_specs, tensors + down_tensors
        arguments = (self.computes.activation, specs, (p, p_down), (_seed(p), _seed(p_down)), *tensors)
        source = _input(x, specs[0].dtype, self.norm)
        if self.ends_checkpoint:
            whole = not upstream_api.in_backward()
            out = TiledLoraMlp.apply(*source, whole, TILE, *arguments)  # type: ignore[no-untyped-call]
        else:
            out = LoraMlp.apply(*source, *arguments)  # type: ignore[no-untyped-call]
        return out.to(x.dtype)


class TrackedNorm(nn.Module):
    """Mixin for frozen norms: remembers which input the latest output came from."""

    output: NormOutput

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.normalize(x)
        if torch.is_grad_enabled() and y.dtype == x.dtype:
            self.output.record(y, x.detach())
        return y

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x [..., hidden], without remembering anything."""
        y: torch.Tensor = super().forward(x)
        return y


class NormOutput:
    """The input of a norm's latest output, for as long as that output lives.

    The nodes keep the norm's input instead of its output: the norm's own backward keeps it anyway.
    """

    _output: weakref.ref[torch.Tensor] | None = None
    _source: torch.Tensor | None = None

    def __init__(self, norm: TrackedNorm) -> None:
        self._norm = norm

    def __getstate__(self) -> dict[str, Any]:
        return {"_norm": self._norm}

    def record(self, output: torch.Tensor, source: torch.Tensor) -> None:
        self._output, self._source = weakref.ref(output, self._forget), source

    def _forget(self, _: Any) -> None:
        self._output = self._source = None

    def origin_of(self, x: torch.Tensor) -> Origin:
        """Where x comes from, if it is the latest output."""
        if self._output is None or self._output() is not x:
            return Origin()
        return Origin(self._norm.normalize, self._source)


def _track(norm: nn.Module, consumer: nn.Module) -> None:
    """Tell the fused modules of `consumer` that they read the output of `norm`, if the norm is frozen."""
    if any(parameter.requires_grad for parameter in norm.parameters()):
        return
    subclass_in_place(norm, TrackedNorm)
    output = norm.output = NormOutput(norm)  # type: ignore[arg-type, assignment]
    for module in consumer.modules():
        if isinstance(module, FusedLinear):
            module.group.norm = output
        elif isinstance(module, FusedMLP):
            module.norm = output


def _input(x: torch.Tensor, dtype: torch.dtype, norm: NormOutput | None) -> tuple[torch.Tensor, Origin]:
    """x in `dtype`, and where it comes from."""
    if x.dtype != dtype:
        return x.to(dtype), Origin()
    return x, Origin() if norm is None else norm.origin_of(x)


def _parts(members: list[Any], computing: torch.dtype) -> tuple[tuple[Spec, ...], list[Any], float]:
    """Specs, tensors and dropout rate of PEFT's modules, read anew in every forward: FSDP2 exchanges the parameters for
    whole ones for the duration of a layer's forward."""
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
            frozen = [base.weight.t() if type(base) is Conv1D else base.weight, base.bias]
        specs.append(Spec(member.scaling[adapter], state, dtype, int8))
        tensors += [*frozen, member.lora_A[adapter].weight, member.lora_B[adapter].weight]
        drop = member.lora_dropout[adapter]
        p = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
    return tuple(specs), tensors, p


def _seed(p: float) -> int:
    """A seed from the CPU generator, which needs no wait for a device, and whose state checkpoints save and activation
    checkpointing restores."""
    return int(torch.randint(2**31 - 1, ())) if p else 0
