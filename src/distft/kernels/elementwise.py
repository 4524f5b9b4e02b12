"""Memory-bound kernels in Triton, each with the same computation in PyTorch for devices without Triton.

`dequantize` unpacks 4-bit weights at memory bandwidth. `gated` and `gated_backward` compute the gated activation of an
MLP in a single pass each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import gelu, silu

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

try:
    import triton
    import triton.language as tl
except ImportError:  # not part of PyTorch's CPU builds
    triton = None


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu_tanh": functools.partial(gelu, approximate="tanh"),
    "gelu": gelu,
}
"""Activations of gated MLPs, by the name that the kernels have for them."""
KINDS = {name: number for number, name in enumerate(ACTIVATIONS)}
"""By what number the kernels know them."""


def on_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton is installed and supports the device of `tensor`."""
    return triton is not None and tensor.is_cuda


def dequantize(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [state.shape] in `dtype`, from bitsandbytes' 4-bit `packed` (two values per byte, any storage
    type).

    `state` is bitsandbytes' QuantState: each block of `state.blocksize` values shares one scale. With double
    quantisation (Dettmers et al. 2023, arXiv:2305.14314), the scales are stored as 8-bit codes of their difference from
    the mean.
    """
    if not on_triton(packed) or dtype not in (torch.bfloat16, torch.float16):
        from bitsandbytes.functional import dequantize_4bit

        dense: torch.Tensor = dequantize_4bit(packed, state)
        return dense.to(dtype)
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    blocks = triton.cdiv(out.numel(), state.blocksize)
    scales, second = state.absmax, state.state2 if state.nested else None
    _dequantize[(triton.cdiv(blocks, _BLOCKS),)](
        packed.view(torch.uint8),
        out,
        state.code,
        scales,
        second.code if second else scales,
        second.absmax if second else scales,
        state.offset if second else scales,
        blocks,
        out.numel(),
        BLOCKS=_BLOCKS,
        HALF=state.blocksize // 2,
        GROUP=second.blocksize if second else 1,
        NESTED=second is not None,
        num_warps=4,
        enable_fp_fusion=False,  # bitsandbytes rounds a scale before it adds the mean
    )
    return out


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) · up [rows, columns] (Shazeer 2020, arXiv:2002.05202), for one of `ACTIVATIONS`.

    Both are contiguous, or halves of the columns of one tensor. The result is contiguous.
    """
    if not on_triton(gate):
        return ACTIVATIONS[activation](gate) * up
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grid, layout = _rows(gate)
    _gated[grid](gate, up, out, *layout, ELEMENTS=_ELEMENTS, KIND=KINDS[activation], num_warps=8)
    return out


def gated_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, and act(gate) · up again, from the gradient `grad` of act(gate) · up.

    That is, dgate = grad · up · act'(gate) and dup = grad · act(gate). All have the same shape; `grad` is contiguous.
    On GPUs, the results overwrite `gate`, `up` and `grad`.
    """
    if not on_triton(gate):
        with torch.enable_grad():
            x = gate.detach().requires_grad_()
            act = ACTIVATIONS[activation](x)
        (grad_gate,) = torch.autograd.grad(act, x, grad * up)
        return grad_gate, grad * act.detach(), act.detach() * up
    grid, layout = _rows(gate)
    _gated_backward[grid](grad, gate, up, *layout, ELEMENTS=_ELEMENTS, KIND=KINDS[activation], num_warps=8)
    return gate, up, grad


def _rows(gate: torch.Tensor) -> tuple[tuple[int], tuple[int, int]]:
    """The grid of the element-wise kernels, and the columns and the stride of a row of `gate`. A contiguous tensor is
    one long row."""
    columns = gate.numel() if gate.is_contiguous() else gate.shape[1]
    rows = gate.numel() // max(columns, 1)
    return (rows * triton.cdiv(columns, _ELEMENTS),), (columns, gate.stride(0))


_BLOCKS = 128
"""Quantisation blocks per program of `_dequantize`: 8,192 values with the usual block size of 64."""
_ELEMENTS = 4096
"""Values per program of the element-wise kernels."""

if triton is not None:

    @triton.jit
    def _dequantize(
        packed,
        out,
        code,
        scales,
        scales_code,
        scales_scales,
        scales_mean,
        blocks,
        size,
        BLOCKS: tl.constexpr,
        HALF: tl.constexpr,
        GROUP: tl.constexpr,
        NESTED: tl.constexpr,
    ):
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < blocks
        if NESTED:
            index = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
            group = tl.load(scales_scales + block // GROUP, mask=inside, other=0.0)
            scale = tl.load(scales_code + index) * group + tl.load(scales_mean)
        else:
            scale = tl.load(scales + block, mask=inside, other=0.0)
        at = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
        byte = tl.load(packed + at, mask=at < (size + 1) // 2, other=0).to(tl.int32)
        high = tl.load(code + (byte >> 4)) * scale[:, None]  # the high half holds the first of two values
        low = tl.load(code + (byte & 15)) * scale[:, None]
        at = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
        tl.store(out + at, tl.interleave(high, low).to(out.dtype.element_ty), mask=at < size)

    @triton.jit
    def _activation(e, KIND: tl.constexpr):
        """The activation at e, and its derivative, in fp32."""
        if KIND == 2:
            share = 0.5 * (1 + tl.erf(e * 0.7071067811865476))
            slope = share + e * 0.3989422804014327 * tl.exp(-0.5 * e * e)
        elif KIND == 1:  # (1 + tanh(u / 2)) / 2 is the sigmoid of u
            share = tl.sigmoid(1.5957691216057308 * (e + 0.044715 * e * e * e))
            slope = share + e * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * e * e)
        else:
            share = tl.sigmoid(e)
            slope = share + e * share * (1 - share)
        return e * share, slope

    @triton.jit
    def _place(columns, stride, ELEMENTS: tl.constexpr):
        """Where a program reads gate and up, and where it reads and writes contiguous tensors; and its mask."""
        program, each = tl.program_id(0).to(tl.int64), tl.cdiv(columns, ELEMENTS)
        row, column = program // each, (program % each) * ELEMENTS + tl.arange(0, ELEMENTS)
        return row * stride + column, row * columns + column, column < columns

    @triton.jit
    def _gated(gate, up, out, columns, stride, ELEMENTS: tl.constexpr, KIND: tl.constexpr):
        at, dense, inside = _place(columns, stride, ELEMENTS)
        e = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(up + at, mask=inside, other=0.0)
        act, _ = _activation(e, KIND)
        tl.store(out + dense, act.to(g.dtype) * g, mask=inside)

    @triton.jit
    def _gated_backward(grad, gate, up, columns, stride, ELEMENTS: tl.constexpr, KIND: tl.constexpr):
        at, dense, inside = _place(columns, stride, ELEMENTS)
        d = tl.load(grad + dense, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(up + at, mask=inside, other=0.0)
        act, slope = _activation(e, KIND)
        act = act.to(g.dtype)
        tl.store(grad + dense, act * g, mask=inside)
        tl.store(gate + at, (d * g * slope).to(g.dtype), mask=inside)
        tl.store(up + at, (d * act).to(g.dtype), mask=inside)
