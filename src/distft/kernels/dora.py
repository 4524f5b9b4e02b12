"""What DoRA adds to a linear with a LoRA adapter (Liu et al. 2024, arXiv:2402.09353).

The rows of W + s B A are divided by their norms and multiplied by a trained magnitude m: y = g (W x + s B A x) + bias,
with g = m / ‖W + s B A‖. As in PEFT, no gradient flows through the norms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


@torch.no_grad()
def row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """‖W + s B A‖ of each row [out] in fp32 at least, for a dense W [out, in], A [r, in] and B [out, r].

    ‖w + s b A‖² = ‖w‖² + 2 s b·(A w) + s² b·(A Aᵀ b): the sum itself, as large as W, is not needed.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        low, a, b = (weight @ a.to(weight.dtype).t()).to(exact), a.to(exact), b.to(exact)
        norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=exact)
        added = ((2 * scaling * low + scaling**2 * (b @ (a @ a.t()))) * b).sum(1)
        return (norms.square() + added).clamp_(min=0).sqrt_()


class Scaled(torch.autograd.Function):
    """y [..., out] · g [out] + bias [out] in the type of y, with g and the products in fp32."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, g: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(y, g)
        out = torch.mul(y, g, out=torch.empty_like(y))
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        y, g = ctx.saved_tensors
        of_g = (grad * y).flatten(0, -2).sum(0, dtype=g.dtype)
        return torch.mul(grad, g, out=torch.empty_like(y)), of_g, None
