"""LoRA dropout and the small products next to it, each in one pass over the large tensor (Triton on GPUs, else
PyTorch).

The mask depends only on the seed, the row and the column, so the backward regenerates it and nothing is kept.

On GPUs it comes from Philox with seven rounds, the fewest that pass its authors' tests (Salmon et al. 2011,
doi:10.1145/2063384.2063405). Random numbers, not memory, are the bottleneck here, so one call serves eight values with
16 bits each; the dropout probability is therefore accurate to 1/131,072.
"""

from __future__ import annotations

from typing import Any

import torch

from distft.kernels.elementwise import on_triton

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

try:
    import triton
    import triton.language as tl
except ImportError:  # not part of PyTorch's CPU builds
    triton = None


def dropout(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """d(x): x [rows, columns] with each value zeroed with probability `p`, and the others divided by 1 - p."""
    if p == 0:
        return x
    if not on_triton(x):
        generator = torch.Generator(x.device).manual_seed(seed)
        kept = torch.rand(x.shape, device=x.device, generator=generator) >= p
        return x * kept / (1 - p)
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, span = 8, 128
    _dropout[_grid(x, rows, span)](x, out, *_mask_arguments(x, p, seed), ROWS=rows, SPAN=span, num_warps=4)
    return out


def dropped_product(x: torch.Tensor, a: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """d(x) aᵀ [rows, rank], for x [rows, columns] and a [rank, columns]."""
    if p == 0 or not _fits(x, a):
        return dropout(x, p, seed) @ a.t()
    x, a, rank = x.contiguous(), a.contiguous(), a.shape[0]
    out = x.new_empty(x.shape[0], rank)
    rows, span = _tile(rank)
    _dropped_product[(triton.cdiv(x.shape[0], rows),)](
        x,
        a,
        out,
        *_mask_arguments(x, p, seed),
        rank,
        ROWS=rows,
        SPAN=span,
        RANK=_padded(rank),
        num_warps=4 if rank <= 64 else 8,
        num_stages=3 if rank <= 128 else 2,  # fits into the 99 KB of shared memory of a consumer GPU
    )
    return out


def add_dropped_product(out: torch.Tensor, low: torch.Tensor, a: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Add d(low a) to `out` [rows, columns] in place, for low [rows, rank] and a [rank, columns]; returns `out`."""
    if p == 0:
        return out.addmm_(low, a)
    if not (_fits(out, a) and out.is_contiguous()):
        return out.add_(dropout(low @ a, p, seed))
    low, a, rank = low.contiguous(), a.contiguous(), a.shape[0]
    rows, span = _tile(rank)
    _add_dropped_product[_grid(out, rows, span)](
        out, low, a, *_mask_arguments(out, p, seed), rank, ROWS=rows, SPAN=span, RANK=_padded(rank), num_warps=4
    )
    return out


def _tile(rank: int) -> tuple[int, int]:
    """Rows and columns per program of the products: the fastest of those measured on an H200."""
    return (32, 128) if rank <= 64 else (64, 64)


def _fits(large: torch.Tensor, a: torch.Tensor) -> bool:
    """Whether the products can run in Triton: tensor cores must support the type, and a tile of this rank must fit."""
    return on_triton(large) and large.dtype == a.dtype in (torch.bfloat16, torch.float16) and a.shape[0] <= 256


def _padded(rank: int) -> int:
    return max(16, int(triton.next_power_of_2(rank)))


def _grid(x: torch.Tensor, rows: int, span: int) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], rows), triton.cdiv(x.shape[1], span)


def _mask_arguments(x: torch.Tensor, p: float, seed: int) -> tuple[Any, ...]:
    """Rows, columns, seed, the smallest of 65,536 random numbers that keeps a value, and the factor for kept values."""
    least = round(p * 65536)
    return *x.shape, seed, least, 65536 / (65536 - least)


if triton is not None:

    @triton.jit
    def _kept(seed, row, column, columns, least, SPAN: tl.constexpr):
        """The mask of the tile [rows, SPAN] that starts at `column`: true for values that are kept."""
        calls = (columns + 7) // 8  # per row
        first, second, third, fourth = tl.randint4x(
            seed, row[:, None] * calls + (column // 8 + tl.arange(0, SPAN // 8))[None, :], n_rounds=7
        )
        words = tl.interleave(tl.interleave(first, second), tl.interleave(third, fourth))
        return tl.interleave(words & 0xFFFF, (words >> 16) & 0xFFFF) >= least

    @triton.jit
    def _dropout(x, out, rows, columns, seed, least, factor, ROWS: tl.constexpr, SPAN: tl.constexpr):
        row, start = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * SPAN
        column = start + tl.arange(0, SPAN)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * factor
        value = tl.where(_kept(seed, row, start, columns, least, SPAN), value, 0.0)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _dropped_product(
        x, a, out, rows, columns, seed, least, factor, rank, ROWS: tl.constexpr, SPAN: tl.constexpr, RANK: tl.constexpr
    ):
        row, low = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK)
        total = tl.zeros((ROWS, RANK), tl.float32)
        for start in range(0, columns, SPAN):
            column = start + tl.arange(0, SPAN)
            of_x = x + row.to(tl.int64)[:, None] * columns + column[None, :]
            value = tl.load(of_x, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)
            value = tl.where(_kept(seed, row, start, columns, least, SPAN), value, 0.0)
            of_a = a + low[None, :] * columns + column[:, None]
            weight = tl.load(of_a, mask=(low < rank)[None, :] & (column < columns)[:, None], other=0.0)
            total = tl.dot(value.to(weight.dtype), weight, total)
        at = row.to(tl.int64)[:, None] * rank + low[None, :]
        tl.store(
            out + at, (total * factor).to(out.dtype.element_ty), mask=(row < rows)[:, None] & (low < rank)[None, :]
        )

    @triton.jit
    def _add_dropped_product(
        out,
        low,
        a,
        rows,
        columns,
        seed,
        least,
        factor,
        rank,
        ROWS: tl.constexpr,
        SPAN: tl.constexpr,
        RANK: tl.constexpr,
    ):
        row, start, inner = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * SPAN, tl.arange(0, RANK)
        column = start + tl.arange(0, SPAN)
        of_low = low + row.to(tl.int64)[:, None] * rank + inner[None, :]
        left = tl.load(of_low, mask=(row < rows)[:, None] & (inner < rank)[None, :], other=0.0)
        of_a = a + inner[:, None] * columns + column[None, :]
        right = tl.load(of_a, mask=(inner < rank)[:, None] & (column < columns)[None, :], other=0.0)
        value = tl.where(_kept(seed, row, start, columns, least, SPAN), tl.dot(left, right) * factor, 0.0)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        sum_ = tl.load(out + at, mask=inside, other=0.0).to(tl.float32) + value
        tl.store(out + at, sum_.to(out.dtype.element_ty), mask=inside)
