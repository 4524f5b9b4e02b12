"""The experts of a mixture, which transformers keeps in 3-D parameters: in 4 bits, with adapters, in grouped products.

transformers' classes read `self.gate_up_proj` and `self.down_proj`, and PEFT's wrapper for a parameter adds the
adapter's product to the weight. `Experts` gives a module of such a class weights of 4 bits, which read as dense ones,
and computes all experts at once from the packed weights and the adapter's factors, without a dense copy of either that
outlives the product (`distft.kernels.grouped`). Names and parameters stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from distft import upstream_api
from distft.kernels.elementwise import dequantize
from distft.kernels.gates import Gate, ScaledGate, recognised
from distft.kernels.grouped import ALIGNMENT, FrozenProduct, Routing, is_available, low_rank_product
from distft.kernels.subclass import subclass_in_place


def expert_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of `module` that hold one matrix for each of its experts, by name."""
    number = getattr(module, "num_experts", None)
    own = module.named_parameters(recurse=False)
    packed = vars(module).get("states", {})
    return {name: p for name, p in own if name in packed or (p.ndim == 3 and p.shape[0] == number)}


def quantize(module: nn.Module, states: Mapping[str, Any]) -> None:
    """Make `module` one whose weights are packed in 4 bits. `states` has the QuantState of each by its name."""
    _extend(module)
    module.states = dict(states)  # type: ignore[assignment]


def dequantize_experts(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Unpack the weights of all experts in `model` that have 4 bits."""
    module: Any
    for module in model.modules():
        if isinstance(module, Experts):
            dense, module.states = {name: module.dense(name) for name in module.states}, {}
            for name, weight in dense.items():
                weight = weight if dtype is None else weight.to(dtype)
                setattr(module, name, nn.Parameter(weight, requires_grad=False))


@contextmanager
def seen_dense(model: nn.Module) -> Iterator[None]:
    """Let the packed weights of experts read as dense ones: PEFT looks at a weight's shape to put an adapter on it.
    FSDP2 reads the same attributes, and means the parameters as they are."""
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    for module in experts:
        module.reads_dense = True
    try:
        yield
    finally:
        for module in experts:
            module.reads_dense = False


def fuse_experts(model: nn.Module) -> None:
    """Compute the experts of `model` in grouped products, wherever these compute the same."""
    for module in model.modules():
        if _fits(module):
            _extend(module)
            module.fused = True  # type: ignore[assignment]
            module.gate = _gate_of(module)  # type: ignore[assignment]
    adapt_experts(model)


def adapt_experts(model: nn.Module) -> None:
    """Let the wrappers that PEFT has put around extended experts leave their computation to these."""
    from peft.tuners.lora import ParamWrapper

    wrappers: list[Any] = [module for module in model.modules() if type(module) is ParamWrapper]
    for module in wrappers:
        experts = module.get_base_layer()
        if isinstance(experts, Experts) and module.parameter_name in expert_weights(experts):
            subclass_in_place(module, AdaptedWeight)


def fuses_experts(model: nn.Module) -> bool:
    """Whether the model has experts that are computed in grouped products."""
    return any(isinstance(module, Experts) and module.fused and not module.plain for module in model.modules())


@contextmanager
def eager_experts(model: Any) -> Iterator[None]:
    """Let transformers compute experts one by one, where they are not computed in grouped products of `Experts`."""
    if not any(map(upstream_api.has_standard_experts, model.modules())):
        yield
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = upstream_api.experts_implementation(base.config)
    base.set_experts_implementation("eager")
    try:
        yield
    finally:
        base.set_experts_implementation(before)


def fused_expert_layers(model: nn.Module) -> tuple[int, int]:
    """In how many layers experts are computed in grouped products, and how many layers have any."""
    found = [module for module in model.modules() if expert_weights(module)]
    return sum(isinstance(each, Experts) and each.fused and not each.plain for each in found), len(found)


def _extend(module: nn.Module) -> None:
    if not isinstance(module, Experts):
        subclass_in_place(module, Experts)


def _fits(module: nn.Module) -> bool:
    """Whether `module` is of a class for which transformers has several implementations, which is how it says what the
    class computes, and whether grouped products can read its weights."""
    weights = expert_weights(module)
    if set(weights) != {"gate_up_proj" if getattr(module, "has_gate", False) else "up_proj", "down_proj"}:
        return False
    if not upstream_api.has_standard_experts(module) or getattr(module, "has_post_expert_norm", False):
        return False
    first = next(iter(weights.values()))
    if any(weight.requires_grad for weight in weights.values()) or not is_available(first.device):
        return False
    states = vars(module).get("states", {})
    shapes = [states[name].shape if name in states else weight.shape for name, weight in weights.items()]
    return all(size % ALIGNMENT == 0 for shape in shapes for size in shape[1:])


def _gate_of(module: Any) -> Gate | None:
    """The module's gated activation, if the kernels have it and a bias before it is not trained."""
    if not module.has_gate or (module.has_bias and module.gate_up_proj_bias.requires_grad):
        return None
    return recognised(upstream_api.expert_gate(module), *(getattr(module, name, None) for name in ("alpha", "limit")))


@dataclass(frozen=True)
class Adapter:
    """The factors of one weight's adapter: `a` [E, r, in] and `b` [E, out, r]. The weight is [E, out, in], or
    [E, in, out] if `transposed`."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the adapter's product, in the type of the weight, as PEFT computes it."""
        left, right = (self.a.transpose(-2, -1), self.b.transpose(-2, -1)) if self.transposed else (self.b, self.a)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(weight, left.to(weight.dtype), right.to(weight.dtype), alpha=self.scaling)


class Experts(nn.Module):
    """Mixin for transformers' experts."""

    states: Mapping[str, Any] = MappingProxyType({})
    """bitsandbytes' QuantState of each weight that is packed in 4 bits."""
    adapters: Mapping[str, Adapter] = MappingProxyType({})
    """The adapters of weights, for the duration of a forward."""
    fused: bool = False
    """Compute in grouped products."""
    gate: Gate | None = None
    """The gated activation, if the kernels have it."""
    plain: bool = False
    """Leave the computation to transformers' and PEFT's modules."""
    reads_dense: bool = False
    """Whether packed weights read as dense ones."""
    num_experts: Any
    has_gate: Any
    has_bias: Any
    act_fn: Any
    is_transposed: Any

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        return self.dense(name) if self.reads_dense and name in self.states else value

    def dense(self, name: str) -> torch.Tensor:
        """The weight `name`, dequantised if it is packed."""
        weight: Any = super().__getattr__(name)
        with torch.no_grad():
            return dequantize(weight, self.states[name], self.states[name].dtype) if name in self.states else weight

    def forward(self, x: torch.Tensor, *routing: Any, **named: Any) -> torch.Tensor:
        out: torch.Tensor
        if self.fused and not self.plain and (len(routing), len(named)) == (2, 0):
            out = self._grouped(x, *routing)
        else:
            with self._whole():
                out = super().forward(x, *routing, **named)
        return out

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Dense weights with their adapters, computed once, in place of the parameters."""
        whole = {}
        for name in {**self.states, **self.adapters}:
            weight, adapter = self.dense(name), self.adapters.get(name)
            whole[name] = weight if adapter is None else adapter.added_to(weight)
        vars(self).update(whole)
        try:
            yield
        finally:
            for name in whole:
                del vars(self)[name]

    def _grouped(self, x: torch.Tensor, experts: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As transformers' own implementations, for x [T, hidden], the numbers of each token's experts [T, k] and their
        scores; but the scores weight the inner activation, which is smaller than the output."""
        first = "gate_up_proj" if self.has_gate else "up_proj"
        routing, dtype = Routing(experts, self.num_experts), self._computing(first, x.device.type)
        inner, weights = self._product(first, routing.spread(x.to(dtype)), routing), routing.sorted(scores)
        biases = [getattr(self, f"{name}_bias") if self.has_bias else None for name in (first, "down_proj")]
        if self.gate is not None:
            inner = ScaledGate.apply(inner, weights, self.gate, biases[0], routing.expert_of)  # type: ignore[no-untyped-call]
        else:
            inner = inner if biases[0] is None else inner + biases[0][routing.expert_of].to(inner.dtype)
            inner = upstream_api.expert_gate(self)(inner) if self.has_gate else self.act_fn(inner)
            inner = (inner * weights).to(dtype)
        out = routing.collect(self._product("down_proj", inner, routing))
        if biases[1] is not None:
            shares = scores.new_zeros(len(x), self.num_experts).scatter(1, experts, scores)
            out = out + (shares.to(dtype) @ biases[1].to(dtype)).to(out.dtype)
        return out.to(x.dtype)

    def _computing(self, name: str, device: str) -> torch.dtype:
        """The type of products: that of the weights, or of autocast."""
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        owner: Any = self.states.get(name, getattr(self, name))
        dtype: torch.dtype = owner.dtype
        return dtype

    def _product(self, name: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """W x for each row of x [S, in] with its expert's weights."""
        weight, state, adapter = getattr(self, name), self.states.get(name), self.adapters.get(name)
        out: torch.Tensor = FrozenProduct.apply(x, weight, state, self.is_transposed, routing.ends)  # type: ignore[no-untyped-call]
        if adapter is not None:
            out += low_rank_product(x, adapter.a, adapter.b, adapter.scaling, routing.ends)
        return out


class AdaptedWeight(nn.Module):
    """Mixin for PEFT's wrapper of a parameter: it hands the adapter to the experts, instead of adding it to the weight.

    Wrappers of several weights are nested. PEFT's own forward would leave its parametrization behind where the weights
    are packed.
    """

    active_adapters: Any
    base_layer: Any
    disable_adapters: Any
    get_base_layer: Any
    lora_A: Any
    lora_B: Any
    merged: Any
    num_experts: Any
    parameter_name: Any
    scaling: Any

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor
        experts = self.get_base_layer()
        known = isinstance(experts, Experts) and (experts.states or (experts.fused and not experts.plain))
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not known or self.merged or len(active) > 1:
            out = super().forward(x, *args, **kwargs)
        elif self.disable_adapters or not active:
            out = self.base_layer(x, *args, **kwargs)
        else:
            before = dict(experts.adapters)  # the class's own mapping cannot be copied with a model
            experts.adapters = {**before, self.parameter_name: self._adapter(active[0])}
            try:
                out = self.base_layer(x, *args, **kwargs)
            finally:
                experts.adapters = before
        return out

    def _adapter(self, name: str) -> Adapter:
        """PEFT's layout: the experts' A are stacked as rows, and of B's columns, E in a row have the same rank."""
        number, a, b = self.num_experts, self.lora_A[name].weight, self.lora_B[name].weight
        experts = self.get_base_layer()
        return Adapter(
            a.reshape(number, -1, a.shape[-1]),
            b.reshape(b.shape[0], -1, number).permute(2, 0, 1),
            self.scaling[name],
            bool(getattr(experts, "is_transposed", False)),
        )
