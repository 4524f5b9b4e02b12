"""The gated activation of experts with all that surrounds it in one pass: the bias before it, and the score that an
expert has for a token.

inner [S, 2·I] are the outputs of gate and up of S tokens-for-experts, side by side or in turn; the result [S, I] is
score · act(gate + bias) · (up + bias).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from distft.kernels.elementwise import ACTIVATIONS, KINDS, on_triton

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

try:
    import triton
    import triton.language as tl

    from distft.kernels.elementwise import _activation
except ImportError:  # not part of PyTorch's CPU builds
    triton = None


@dataclass(frozen=True)
class Gate:
    """act(gate) · up, with one of `ACTIVATIONS`; or as in gpt-oss, `clamped`: gate and up take turns and are clamped to
    `limit`, and the result is gate · σ(alpha · gate) · (up + 1)."""

    activation: str = "silu"
    clamped: bool = False
    alpha: float = 1.0
    limit: float = 0.0

    def __call__(self, inner: torch.Tensor) -> torch.Tensor:
        """[S, 2·I] → [S, I], by PyTorch."""
        if not self.clamped:
            gate, up = inner.chunk(2, -1)
            return ACTIVATIONS[self.activation](gate) * up
        gate, up = inner[..., ::2].clamp(max=self.limit), inner[..., 1::2].clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)


def recognised(function: Callable[[torch.Tensor], torch.Tensor], alpha: Any = None, limit: Any = None) -> Gate | None:
    """The gate that `function` computes, found by trying it out; None if it is none of them."""
    candidates = [Gate(activation) for activation in ACTIVATIONS]
    if isinstance(alpha, float) and isinstance(limit, int | float):
        candidates.append(Gate(clamped=True, alpha=alpha, limit=float(limit)))
    inner = 12 * torch.arange(96, dtype=torch.float64).mul(0.7).sin().view(4, 24)
    try:
        found = function(inner)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return next((gate for gate in candidates if torch.allclose(found, gate(inner), rtol=1e-9, atol=1e-9)), None)


class ScaledGate(torch.autograd.Function):
    """inner [S, 2·I], scores [S, 1], and the frozen biases [E, 2·I] of the experts [S], if they have any → [S, I].

    On GPUs, the gradient of `inner` overwrites it.
    """

    @staticmethod
    def forward(
        ctx: Any, inner: torch.Tensor, scores: torch.Tensor, gate: Gate, bias: torch.Tensor | None, expert: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inner, scores, bias, expert)
        ctx.gate = gate
        if not on_triton(inner):
            return (gate(inner if bias is None else inner + bias[expert]) * scores).to(inner.dtype)
        out = inner.new_empty(inner.shape[0], inner.shape[1] // 2)
        grid, arguments, options = _arguments(out.shape[1], gate, bias)
        _scaled_gate[(grid * len(out),)](
            inner, scores, inner if bias is None else bias, expert, out, *arguments, **options
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        inner, scores, bias, expert = ctx.saved_tensors
        gate, grad = ctx.gate, grad.contiguous()
        if not on_triton(inner):
            with torch.enable_grad():
                x, s = inner.detach().requires_grad_(), scores.detach().requires_grad_()
                out = (gate(x if bias is None else x + bias[expert]) * s).to(inner.dtype)
            return *torch.autograd.grad(out, (x, s), grad), None, None, None
        each, arguments, options = _arguments(grad.shape[1], gate, bias)
        parts = torch.empty(len(grad), each, dtype=torch.float32, device=grad.device)
        _scaled_gate_backward[(each * len(grad),)](
            inner, scores, inner if bias is None else bias, expert, grad, parts, *arguments, **options
        )
        return inner, parts.sum(1, keepdim=True).to(scores.dtype), None, None, None


def _arguments(columns: int, gate: Gate, bias: torch.Tensor | None) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """Programs per row, and what all kernels are given."""
    elements = min(max(int(triton.next_power_of_2(columns)), 128), 2048 if gate.clamped else 4096)
    options = {
        "ELEMENTS": elements,
        "KIND": 3 if gate.clamped else KINDS[gate.activation],
        "BIAS": bias is not None,
        "num_warps": max(elements // 512, 1),
    }
    return triton.cdiv(columns, elements), (columns, gate.alpha, gate.limit), options


if triton is not None:

    @triton.jit
    def _pairs(values, columns, start, ELEMENTS: tl.constexpr, KIND: tl.constexpr):
        """The gate and up of a row of `values`, from column `start` on. Those that take turns are read together."""
        if KIND == 3:
            both = 2 * start + tl.arange(0, 2 * ELEMENTS)
            found = tl.load(values + both, mask=both < 2 * columns, other=0.0).to(tl.float32)
            e, g = tl.split(tl.reshape(found, (ELEMENTS, 2)))
        else:
            column = start + tl.arange(0, ELEMENTS)
            e = tl.load(values + column, mask=column < columns, other=0.0).to(tl.float32)
            g = tl.load(values + columns + column, mask=column < columns, other=0.0).to(tl.float32)
        return e, g

    @triton.jit
    def _load(inner, bias, expert, columns, ELEMENTS: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr):
        """Row and first column of a program, and its gate and up."""
        program, each = tl.program_id(0).to(tl.int64), tl.cdiv(columns, ELEMENTS)
        row, start = program // each, (program % each) * ELEMENTS
        e, g = _pairs(inner + row * 2 * columns, columns, start, ELEMENTS, KIND)
        if BIAS:
            of_expert = bias + tl.load(expert + row).to(tl.int64) * 2 * columns
            added_e, added_g = _pairs(of_expert, columns, start, ELEMENTS, KIND)
            e, g = e + added_e, g + added_g
        return row, start, e, g

    @triton.jit
    def _value(e, g, alpha, limit, KIND: tl.constexpr):
        """act(e) and the factor by which it is multiplied, their slopes in e and g."""
        if KIND == 3:
            x, factor = tl.minimum(e, limit), tl.minimum(tl.maximum(g, -limit), limit) + 1
            share = tl.sigmoid(alpha * x)
            act, slope = x * share, tl.where(e <= limit, share + alpha * x * share * (1 - share), 0.0)
            of_factor = tl.where((g <= limit) & (g >= -limit), 1.0, 0.0)
        else:
            act, slope = _activation(e, KIND)
            factor, of_factor = g, tl.zeros_like(g) + 1.0
        return act, slope, factor, of_factor

    @triton.jit
    def _scaled_gate(
        inner,
        scores,
        bias,
        expert,
        out,
        columns,
        alpha,
        limit,
        ELEMENTS: tl.constexpr,
        KIND: tl.constexpr,
        BIAS: tl.constexpr,
    ):
        row, start, e, g = _load(inner, bias, expert, columns, ELEMENTS, KIND, BIAS)
        column = start + tl.arange(0, ELEMENTS)
        act, _, factor, _ = _value(e, g, alpha, limit, KIND)
        score = tl.load(scores + row).to(tl.float32)
        value = (act * factor * score).to(out.dtype.element_ty)
        tl.store(out + row * columns + column, value, mask=column < columns)

    @triton.jit
    def _scaled_gate_backward(
        inner,
        scores,
        bias,
        expert,
        grad,
        parts,
        columns,
        alpha,
        limit,
        ELEMENTS: tl.constexpr,
        KIND: tl.constexpr,
        BIAS: tl.constexpr,
    ):
        row, start, e, g = _load(inner, bias, expert, columns, ELEMENTS, KIND, BIAS)
        column = start + tl.arange(0, ELEMENTS)
        act, slope, factor, of_factor = _value(e, g, alpha, limit, KIND)
        d = tl.load(grad + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        tl.store(parts + tl.program_id(0).to(tl.int64), tl.sum(d * act * factor, 0))
        d *= tl.load(scores + row).to(tl.float32)
        of_gate = (d * factor * slope).to(inner.dtype.element_ty)
        of_up = (d * act * of_factor).to(inner.dtype.element_ty)
        into = inner + row * 2 * columns
        if KIND == 3:
            both = 2 * start + tl.arange(0, 2 * ELEMENTS)
            tl.store(into + both, tl.interleave(of_gate, of_up), mask=both < 2 * columns)
        else:
            tl.store(into + column, of_gate, mask=column < columns)
            tl.store(into + columns + column, of_up, mask=column < columns)
