"""Products of tokens with the weights of their experts: one grouped matrix product for all experts, whose frozen
weights may have 4 bits.

S tokens-for-experts are T tokens times k experts each, sorted by expert; `ends` [E] says where each expert's rows end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from distft.kernels.elementwise import dequantize
from distft.kernels.rows import sum_rows

ALIGNMENT = 8
"""A row must be a multiple of 16 bytes: of 8 values in 16 bits."""


def is_available(device: torch.device) -> bool:
    """Whether this PyTorch multiplies groups of rows on `device`, with gradients."""
    if not hasattr(functional, "grouped_mm"):  # public since 2.10
        return False
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))


class Routing:
    """Which row goes to which expert: `experts` [T, k] holds the numbers of each token's experts."""

    def __init__(self, experts: torch.Tensor, number: int) -> None:
        self.shape = experts.shape
        self.expert_of, self.order = torch.sort(experts.reshape(-1), stable=True)
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(len(self.order), device=experts.device)
        self.token_of = self.order // experts.shape[-1]
        edges = torch.arange(1, number + 1, device=experts.device, dtype=self.expert_of.dtype)
        self.ends = torch.searchsorted(self.expert_of, edges).to(torch.int32)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] → [S, hidden]: the rows of each expert."""
        out: torch.Tensor = _Spread.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """x [S, hidden] → [T, hidden]: for each token, the sum over its experts."""
        out: torch.Tensor = _Collect.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def sorted(self, scores: torch.Tensor) -> torch.Tensor:
        """scores [T, k] → [S, 1]."""
        return scores.reshape(-1)[self.order].unsqueeze(-1)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over a token's experts, in a fixed order; adding into rows would be in a random one on a GPU."""
        return sum_rows(x, self.place, self.shape[-1])


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        ctx.routing = routing
        return x[routing.token_of]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.routing.sum(grad), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        ctx.routing = routing
        return routing.sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad[ctx.routing.token_of], None


class FrozenProduct(torch.autograd.Function):
    """x [S, in] → [S, out] by frozen weights [E, out, in], or [E, in, out] if `transposed`, which `state` dequantises.

    The dense weights do not outlive a forward or a backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, state: Any, transposed: bool, ends: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, ends)
        ctx.state, ctx.transposed = state, transposed
        dense = _dense(weight, state, x.dtype)
        return functional.grouped_mm(x, dense if transposed else dense.transpose(-2, -1), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, ends = ctx.saved_tensors
        dense = _dense(weight, ctx.state, grad.dtype)
        back = dense.transpose(-2, -1) if ctx.transposed else dense
        return functional.grouped_mm(grad.contiguous(), back, offs=ends), None, None, None, None


def _dense(weight: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) if state is None else dequantize(weight, state, dtype)


def low_rank_product(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, ends: torch.Tensor
) -> torch.Tensor:
    """scaling · B A x for each row of x [S, in] with its expert's A [E, r, in] and B [E, out, r]."""
    missing = -a.shape[1] % ALIGNMENT
    if missing:
        a, b = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
    low = scaling * functional.grouped_mm(x, a.to(x.dtype).transpose(-2, -1), offs=ends)  # smaller than the result
    return functional.grouped_mm(low, b.to(x.dtype).contiguous().transpose(-2, -1), offs=ends)
