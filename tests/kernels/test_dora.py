"""DoRA's row norms and scaling against their definitions, in float64."""

from __future__ import annotations

import pytest
import torch

from distft.kernels.dora import Scaled, row_norms


def test_row_norms_are_those_of_the_whole_weight() -> None:
    torch.manual_seed(0)
    weight, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in [(6, 5), (3, 5), (6, 3)])
    expected = (weight + 0.7 * b @ a).norm(dim=1)
    torch.testing.assert_close(row_norms(weight, a, b, 0.7), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_scaling_matches_finite_differences(bias: bool) -> None:
    torch.manual_seed(0)
    y = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, dtype=torch.float64, requires_grad=True)
    added = torch.randn(5, dtype=torch.float64) if bias else None
    assert torch.autograd.gradcheck(lambda y, g: Scaled.apply(y, g, added), (y, g))
    torch.testing.assert_close(Scaled.apply(y, g, added), y * g + (0 if added is None else added))


def test_a_scale_close_to_one_is_not_rounded_to_the_type_of_the_output() -> None:
    """In bf16, 1.003 is 1: a magnitude would not be seen before it has moved by 0.4%."""
    y = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    ratio = Scaled.apply(y, torch.full((8,), 1.003), None).double().norm() / y.double().norm()
    assert abs(float(ratio) - 1.003) < 1e-3
