"""Autograd nodes for linears with LoRA adapters (Hu et al. 2021, arXiv:2106.09685), alone, in groups, or as a whole
MLP.

Notation, for a linear with weight W [out, in], adapter A [r, in] and B [out, r], and scaling s:

    y  = W x + s B A x
    dx = Wᵀ dy + Aᵀ dl     with l = A x and dl = s Bᵀ dy
    dA = dl xᵀ
    dB = s dy lᵀ

With LoRA dropout, the adapter reads d(x) instead of x. The same random mask is applied again in the backward.

Small products are added to large ones in place, linears with the same input share A x and accumulate dx in place, and
the MLP recomputes its inner activations in the backward. `distft.models.fused_lora` puts these nodes into a model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from distft.kernels.dropout import add_dropped_product, dropout, dropped_product
from distft.kernels.elementwise import dequantize, gated, gated_backward


def in_own_types(backward: Callable[..., Any]) -> Any:
    """A backward that computes in the types of its tensors, even if it is called under autocast."""

    @once_differentiable
    @functools.wraps(backward)
    def computed(ctx: Any, *grads: torch.Tensor) -> Any:
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)

    return computed


@dataclass(frozen=True)
class Spec:
    """What a node needs to know about a linear besides its tensors."""

    scaling: float
    """LoRA's scaling s."""
    quant_state: Any
    """bitsandbytes' QuantState of 4-bit weights; None otherwise."""
    dtype: torch.dtype
    """Type of the products."""
    int8: Any = None
    """bitsandbytes' module of 8-bit weights; its weight and bias are not among the tensors."""

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """W x + bias [tokens, out] for x [tokens, in]; 8-bit weights use LLM.int8()'s own product."""
        out: torch.Tensor
        if self.int8 is not None:
            out = self.int8(x)
        elif bias is None:
            out = x @ self.dense(weight).t()
        else:
            out = torch.addmm(bias.to(self.dtype), x, self.dense(weight).t())
        return out

    def dense(self, weight: torch.Tensor) -> torch.Tensor:
        """The frozen weight, dequantised [out, in]."""
        if self.int8 is not None:  # as in bitsandbytes' own backward (Dettmers et al. 2022, arXiv:2208.07339)
            state = self.int8.state
            codes: torch.Tensor = state.CB.to(self.dtype)
            return codes.mul_(state.SCB.unsqueeze(1) / 127)
        return weight.to(self.dtype) if self.quant_state is None else dequantize(weight, self.quant_state, self.dtype)


@dataclass
class Group:
    """Linears that share their input. `tensors` holds weight, bias, A [r, in] and B [out, r] of each in turn."""

    specs: tuple[Spec, ...]
    tensors: Sequence[Any]
    p: float
    seed: int

    def __post_init__(self) -> None:
        dtype = self.specs[0].dtype
        self.weights, self.biases = self.tensors[0::4], self.tensors[1::4]
        self.a = torch.cat([a.to(dtype) for a in self.tensors[2::4]])
        self.b = [b.to(dtype) for b in self.tensors[3::4]]
        self.ranks = [b.shape[1] for b in self.b]

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The output [tokens, out] of each linear for x [tokens, in], and A x [tokens, sum of ranks]."""
        low, outputs = self.low(x), []
        parts = torch.split(low, self.ranks, 1)
        for spec, weight, bias, b, part in zip(self.specs, self.weights, self.biases, self.b, parts, strict=True):
            outputs.append(spec.product(x, weight, bias).addmm_(part, b.t(), alpha=spec.scaling))
        return outputs, low

    def low(self, x: torch.Tensor) -> torch.Tensor:
        """A d(x) [tokens, sum of ranks]."""
        return dropped_product(x, self.a, self.p, self.seed)

    def grad_input(self, grads: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients dx [tokens, in] and dl [tokens, sum of ranks], from the gradients of the outputs."""
        grad_low = torch.cat(
            [_scaled_product(grad, b, spec.scaling) for grad, b, spec in zip(grads, self.b, self.specs, strict=True)], 1
        )
        grad_x = torch.zeros(())
        for number, (spec, weight, grad) in enumerate(zip(self.specs, self.weights, grads, strict=True)):
            dense = spec.dense(weight)
            grad_x = grad @ dense if number == 0 else grad_x.addmm_(grad, dense)
        return add_dropped_product(grad_x, grad_low, self.a, self.p, self.seed), grad_low

    def grad_adapters(
        self, x: torch.Tensor, low: torch.Tensor, grads: Sequence[torch.Tensor], grad_low: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """The gradients in the order of `tensors`; None for the frozen weights and biases."""
        grad_a = torch.split(grad_low.t() @ dropout(x, self.p, self.seed), self.ranks)
        found: list[torch.Tensor | None] = []
        for number, part in enumerate(torch.split(low, self.ranks, 1)):
            a, b = self.tensors[4 * number + 2], self.tensors[4 * number + 3]
            grad_b = _scaled_product(grads[number].t(), part, self.specs[number].scaling)
            found += [None, None, grad_a[number].to(a.dtype), grad_b.to(b.dtype)]
        return found


def _scaled_product(one: torch.Tensor, other: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling · one @ other in a single operation."""
    return torch.addmm(one.new_empty(()), one, other, beta=0, alpha=scaling)


class LoraLinears(torch.autograd.Function):
    """x [..., in] → [..., out] for each linear of a group."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, origin: Origin, specs: tuple[Spec, ...], p: float, seed: int, *tensors: Any
    ) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            outputs, low = Group(specs, tensors, p, seed).forward(rows)
        ctx.origin, ctx.specs, ctx.p, ctx.seed, ctx.shape = origin.norm, specs, p, seed, x.shape
        ctx.save_for_backward(origin.kept(rows), low, *tensors)
        return tuple(reshaped(out, x.shape) for out in outputs)

    @staticmethod
    @in_own_types
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        kept, low, *tensors = ctx.saved_tensors
        rows = recompute_input(ctx.origin, kept, ctx.shape)
        group = Group(ctx.specs, tensors, ctx.p, ctx.seed)
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_x, grad_low = group.grad_input(flat)
        return grad_x.view(ctx.shape), None, None, None, None, *group.grad_adapters(rows, low, flat, grad_low)


@dataclass(frozen=True)
class Mlp:
    """down(act(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202), with the linears in this order. Gate and up may be
    one linear, whose outputs are those of gate, then those of up.

    `activation` is one of `ACTIVATIONS`. `p` and `seeds` are the dropout rates and seeds for x and for the hidden
    activation.
    """

    activation: str
    specs: tuple[Spec, ...]
    p: tuple[float, float]
    seeds: tuple[int, int]
    tensors: Sequence[Any]

    def groups(self, number: int = 0) -> tuple[Group, Group]:
        """The group of gate and up, and the group of down. Each tile, by its `number`, has its own dropout masks."""
        return (
            Group(self.specs[:-1], self.tensors[:-4], self.p[0], self.seeds[0] + number),
            Group(self.specs[-1:], self.tensors[-4:], self.p[1], self.seeds[1] + number),
        )

    def hidden(self, inner: Sequence[torch.Tensor]) -> torch.Tensor:
        """act(gate) · up, from the outputs of the group of gate and up."""
        gate, up = _gate_and_up(inner)
        return gated(gate, up, self.activation)

    def backward(
        self,
        pair: Group,
        down: Group,
        rows: torch.Tensor,
        low: torch.Tensor,
        inner: Sequence[torch.Tensor],
        low_down: torch.Tensor,
        grad: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """The gradients of x and of the adapters, from the gradient of the output. On GPUs, it overwrites `inner`, the
        outputs of the group of gate and up."""
        grad_hidden, grad_low_down = down.grad_input([grad])
        gate, up = _gate_and_up(inner)
        *grads, hidden = gated_backward(grad_hidden, gate, up, self.activation)
        of_down = down.grad_adapters(hidden, low_down, [grad], grad_low_down)
        del hidden, grad_hidden
        if len(inner) == 1:
            grads = [inner[0] if grads[0] is gate else torch.cat(grads, 1)]
        grad_x, grad_low = pair.grad_input(grads)
        return grad_x, [*pair.grad_adapters(rows, low, grads, grad_low), *of_down]


def _gate_and_up(inner: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return inner[0].chunk(2, 1) if len(inner) == 1 else inner


class LoraMlp(torch.autograd.Function):
    """The MLP of x [..., in]; the backward recomputes act(gate) · up instead of keeping it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        origin: Origin,
        activation: str,
        specs: tuple[Spec, ...],
        p: tuple[float, float],
        seeds: tuple[int, int],
        *tensors: Any,
    ) -> Any:
        mlp = Mlp(activation, specs, p, seeds, tensors)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            pair, down = mlp.groups()
            inner, low = pair.forward(rows)
            (out,), low_down = down.forward(mlp.hidden(inner))
        ctx.origin, ctx.shape, ctx.settings = origin.norm, x.shape, (activation, specs, p, seeds)
        ctx.save_for_backward(origin.kept(rows), low, low_down, *inner, *tensors)
        return reshaped(out, x.shape)

    @staticmethod
    @in_own_types
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        kept, low, low_down, *rest = ctx.saved_tensors
        places = len(ctx.settings[1]) - 1
        inner, tensors = rest[:places], rest[places:]
        rows = recompute_input(ctx.origin, kept, ctx.shape)
        mlp = Mlp(*(*ctx.settings, tensors))
        grad_x, of_adapters = mlp.backward(*mlp.groups(), rows, low, inner, low_down, grad.reshape(-1, grad.shape[-1]))
        return grad_x.view(ctx.shape), None, None, None, None, None, *of_adapters


class TiledLoraMlp(torch.autograd.Function):
    """The MLP, `tile` tokens at a time and keeping only x: for a layer that is recomputed in the backward.

    The recomputing forward (`whole=False`) has nothing to compute: it returns an uninitialised tensor of the right
    shape, which nothing reads. The backward computes gate and up of each tile once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        origin: Origin,
        whole: bool,
        tile: int,
        activation: str,
        specs: tuple[Spec, ...],
        p: tuple[float, float],
        seeds: tuple[int, int],
        *tensors: Any,
    ) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        tile = math.ceil(len(rows) / max(math.ceil(len(rows) / tile), 1))  # equal tiles
        out = torch.empty_like(rows)
        if whole:
            with torch.autocast(x.device.type, enabled=False):
                mlp = Mlp(activation, specs, p, seeds, tensors)
                for number, (part, into) in enumerate(
                    zip(torch.split(rows, tile), torch.split(out, tile), strict=True)
                ):
                    pair, down = mlp.groups(number)
                    into.copy_(down.forward(mlp.hidden(pair.forward(part)[0]))[0][0])
        ctx.origin, ctx.tile, ctx.shape, ctx.settings = origin.norm, tile, x.shape, (activation, specs, p, seeds)
        ctx.save_for_backward(origin.kept(rows), *tensors)
        return reshaped(out, x.shape)

    @staticmethod
    @in_own_types
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        kept, *tensors = ctx.saved_tensors
        rows, grad = recompute_input(ctx.origin, kept, ctx.shape), grad.reshape(-1, grad.shape[-1])
        mlp = Mlp(*(*ctx.settings, tensors))
        total: list[torch.Tensor | None] = []
        grad_x = torch.empty_like(rows)
        for number, (part, grad_part, into) in enumerate(
            zip(torch.split(rows, ctx.tile), torch.split(grad, ctx.tile), torch.split(grad_x, ctx.tile), strict=True)
        ):
            pair, down = mlp.groups(number)
            inner, low = pair.forward(part)
            low_down = down.low(mlp.hidden(inner))
            grad_of_part, of_adapters = mlp.backward(pair, down, part, low, inner, low_down, grad_part)
            into.copy_(grad_of_part)
            before = total or [None] * len(of_adapters)
            total = [
                new if old is None or new is None else old + new for old, new in zip(before, of_adapters, strict=True)
            ]
        return grad_x.view(ctx.shape), None, None, None, None, None, None, None, *total


def reshaped(out: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`out` [tokens, columns], contiguous, with all dimensions of `shape` but its last one in place of the tokens.

    Not as a view: what a model changes in place may not be a view that a node has returned.
    """
    alias: torch.Tensor = out.new_empty(0).set_(out.view(*shape[:-1], -1))  # type: ignore[call-overload]
    return alias


@dataclass(frozen=True)
class Origin:
    """Where the input x of a node comes from: x = norm(source), if it is the output of a frozen norm.

    Then the node keeps `source` instead of x, which costs no memory, because the norm's own backward keeps it anyway.
    """

    norm: Callable[[torch.Tensor], torch.Tensor] | None = None
    source: torch.Tensor | None = None

    def kept(self, rows: torch.Tensor) -> torch.Tensor:
        """What the node keeps for its backward in place of its flattened input `rows`."""
        return rows if self.source is None else self.source


def recompute_input(
    norm: Callable[[torch.Tensor], torch.Tensor] | None, kept: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    """The input x [tokens, in] from what `Origin.kept` returned; `shape` is that of x before it was flattened."""
    if norm is not None:
        with torch.no_grad():
            kept = norm(kept).to(kept.dtype)
    return kept.reshape(-1, shape[-1])
