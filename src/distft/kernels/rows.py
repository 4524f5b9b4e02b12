"""Sums of chosen rows in one pass over them."""

from __future__ import annotations

import torch

from distft.kernels.elementwise import on_triton

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

try:
    import triton
    import triton.language as tl
except ImportError:  # not part of PyTorch's CPU builds
    triton = None


def sum_rows(x: torch.Tensor, rows: torch.Tensor, number: int) -> torch.Tensor:
    """x [S, hidden], rows [T · number] → [T, hidden]: for each place, the sum of `number` rows of x in their order,
    in fp32 at least on a GPU."""
    if not on_triton(x):
        return x[rows].view(-1, number, x.shape[-1]).sum(1)
    x = x.contiguous()
    hidden, span = x.shape[1], 1024
    out = x.new_empty(len(rows) // number, hidden)
    spans = triton.cdiv(hidden, span)
    _sum_rows[(len(out) * spans,)](x, rows, out, hidden, spans, NUMBER=number, SPAN=span, num_warps=4)
    return out


if triton is not None:

    @triton.jit
    def _sum_rows(x, rows, out, hidden, spans, NUMBER: tl.constexpr, SPAN: tl.constexpr):
        program = tl.program_id(0).to(tl.int64)
        place, column = program // spans, (program % spans) * SPAN + tl.arange(0, SPAN)
        inside = column < hidden
        total = tl.zeros((SPAN,), tl.float32)
        for number in range(NUMBER):
            row = tl.load(rows + place * NUMBER + number).to(tl.int64)
            total += tl.load(x + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place * hidden + column, total.to(out.dtype.element_ty), mask=inside)
