"""LoRA dropout and its fused products: PyTorch's version on the CPU, Triton's on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from distft.kernels.dropout import add_dropped_product, dropout, dropped_product

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_zeroes_a_share_of_p_and_scales_the_rest(p: float, device: str) -> None:
    x = torch.full((1000, 1000), 3.0, device=device)
    found = dropout(x, p, seed=7)
    dropped = found == 0
    deviation = (p * (1 - p) / x.numel()) ** 0.5  # standard deviation of the mean of independent draws
    assert abs(dropped.float().mean().item() - p) < 5 * deviation
    torch.testing.assert_close(found[~dropped], torch.full_like(found[~dropped], 3.0 / (1 - p)))
    assert abs(dropped.float().mean(0).max().item() - p) < 7 * (p * (1 - p) / 1000) ** 0.5, (
        "some column is dropped too often"
    )


@pytest.mark.parametrize("device", DEVICES)
def test_the_dropout_mask_depends_only_on_the_seed(device: str) -> None:
    x, y = torch.ones(300, 333, device=device), torch.randn(300, 333, device=device)
    first = dropout(x, 0.3, seed=7)
    assert torch.equal(dropout(x, 0.3, seed=7), first)
    torch.testing.assert_close(dropout(y, 0.3, seed=7), y * first)
    strided = y.t().contiguous().t()
    assert torch.equal(dropout(strided, 0.3, seed=7), dropout(y, 0.3, seed=7))
    assert ((dropout(x, 0.3, seed=8) == 0) == (first == 0)).float().mean() < 0.65, "another seed must give another mask"


def test_no_dropout_copies_nothing() -> None:
    x = torch.ones(3, 4)
    assert dropout(x, 0.0, seed=7) is x


ON = [
    pytest.param("cpu", torch.float64),
    pytest.param("cpu", torch.float32),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
]
ROUNDED = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""Tolerated relative error in norm, from rounding the operands, 1 - p (to 16 bits) and the result."""
SIZES = list(itertools.product([(1, 8), (65, 130), (300, 4096), (129, 100)], [3, 32, 96, 300]))


@pytest.mark.parametrize(("device", "dtype"), ON)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.4])
def test_the_fused_products_match_dropout_followed_by_a_product(p: float, device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for (rows, columns), rank in SIZES:
        x, out = torch.randn(2, rows, columns, device=device, dtype=dtype)
        a, low = (
            torch.randn(rank, columns, device=device, dtype=dtype),
            torch.randn(rows, rank, device=device, dtype=dtype),
        )
        places = dropout(torch.ones(rows, columns, device=device, dtype=torch.float32), p, seed=5) != 0

        found = dropped_product(x, a, p, seed=5)
        exact = (x.double() * places / (1 - p)) @ a.double().t()
        assert (found.shape, found.dtype) == ((rows, rank), dtype)
        assert (found.double() - exact).norm() <= ROUNDED[dtype] * exact.norm(), (rows, columns, rank)

        exact = out.double() + (low.double() @ a.double()) * places / (1 - p)
        found = add_dropped_product(out, low, a, p, seed=5)
        assert found is out, "the product must be added in place"
        assert (found.double() - exact).norm() <= ROUNDED[dtype] * exact.norm(), (rows, columns, rank)
