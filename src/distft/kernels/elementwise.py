"""Memory-bound kernels in Triton, each with the same computation in PyTorch for devices without Triton.

`dequantize` unpacks 4-bit weights at memory bandwidth. `swiglu` and `swiglu_backward` compute the gated activation of
Llama-like MLPs in a single pass each.
"""

from __future__ import annotations

from typing import Any

import torch

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

try:
    import triton
    import triton.language as tl
except ImportError:  # not part of PyTorch's CPU builds
    triton = None


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


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up (Shazeer 2020, arXiv:2002.05202), for contiguous tensors of the same shape."""
    if not on_triton(gate):
        return torch.nn.functional.silu(gate) * up
    out = torch.empty_like(gate)
    _swiglu[(triton.cdiv(gate.numel(), _ELEMENTS),)](gate, up, out, gate.numel(), ELEMENTS=_ELEMENTS, num_warps=8)
    return out


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, and silu(gate) · up again, from the gradient `grad` of silu(gate) · up.

    With σ the sigmoid, dgate = grad · up · (σ + silu(gate) · (1 - σ)) and dup = grad · silu(gate). All have the same
    shape. On GPUs, the results overwrite `gate`, `up` and `grad`.
    """
    if not on_triton(gate):
        sigmoid, silu = torch.sigmoid(gate), torch.nn.functional.silu(gate)
        return grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu, silu * up
    _swiglu_backward[(triton.cdiv(gate.numel(), _ELEMENTS),)](
        grad, gate, up, gate.numel(), ELEMENTS=_ELEMENTS, num_warps=8
    )
    return gate, up, grad


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
    def _swiglu(gate, up, out, size, ELEMENTS: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        inside = at < size
        e = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(up + at, mask=inside, other=0.0)
        tl.store(out + at, (e * tl.sigmoid(e)).to(g.dtype) * g, mask=inside)

    @triton.jit
    def _swiglu_backward(grad, gate, up, size, ELEMENTS: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        inside = at < size
        d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(up + at, mask=inside, other=0.0)
        sigmoid = tl.sigmoid(e)
        silu = (e * sigmoid).to(g.dtype)
        tl.store(grad + at, silu * g, mask=inside)
        tl.store(gate + at, (d * g * (sigmoid + e * sigmoid * (1 - sigmoid))).to(g.dtype), mask=inside)
        tl.store(up + at, (d * silu).to(g.dtype), mask=inside)
