"""The gate of experts and sums of rows against their definitions: PyTorch's version on the CPU, Triton's on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distft.kernels.elementwise import ACTIVATIONS
from distft.kernels.gates import Gate, ScaledGate, recognised
from distft.kernels.rows import sum_rows

GATES = [
    *(pytest.param(Gate(name), id=name) for name in ACTIVATIONS),
    pytest.param(Gate("silu", True, 1.702, 7.0), id="clamped"),
]
TYPES = [
    pytest.param("cpu", torch.float64),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
]
EXACT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Tolerated relative error in norm, from rounding to each type."""


@pytest.mark.parametrize(("device", "dtype"), TYPES)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("gate", GATES)
def test_the_gate_and_its_gradients_match_float64(gate: Gate, bias: bool, device: str, dtype: torch.dtype) -> None:
    for rows, columns in [(50, 64), (7, 768), (3, 5000)]:
        torch.manual_seed(0)
        inner, grad = 6 * torch.randn(rows, 2 * columns), torch.randn(rows, columns)
        inner, grad = inner.to(device, dtype), grad.to(device, dtype)
        added = torch.randn(4, 2 * columns).to(device, dtype) if bias else None
        expert = torch.randint(4, (rows,), device=device)
        scores = torch.rand(rows, 1).to(device, torch.float32 if dtype != torch.float64 else dtype)
        exact = [tensor.to(torch.float64, copy=True).requires_grad_() for tensor in (inner, scores)]
        expected = gate(exact[0] if added is None else exact[0] + added.double()[expert]) * exact[1]
        gradients = torch.autograd.grad(expected, exact, grad.double())
        given = [tensor.clone().requires_grad_() for tensor in (inner, scores)]
        found = ScaledGate.apply(*given, gate, added, expert)
        for one, other in zip([found, *torch.autograd.grad(found, given, grad)], [expected, *gradients], strict=True):
            assert one.shape == other.shape
            assert (one.double() - other).norm() <= EXACT[dtype] * other.norm(), (rows, columns)


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_is_recognised_by_what_it_computes(gate: Gate) -> None:
    assert recognised(gate, 1.702, 7.0) == gate
    assert recognised(lambda inner: gate(inner) * 1.01, 1.702, 7.0) is None
    assert recognised(lambda inner: nn.functional.relu(inner.chunk(2, -1)[0]), 1.702, 7.0) is None


@pytest.mark.parametrize(("device", "dtype"), TYPES)
def test_sums_of_rows(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for number, hidden in [(1, 64), (2, 1000), (8, 3000)]:
        x = torch.randn(5 * number, hidden, device=device).to(dtype)
        rows = torch.randperm(5 * number, device=device)
        expected = x.double()[rows].view(5, number, hidden).sum(1)
        assert (sum_rows(x, rows, number).double() - expected).norm() <= EXACT[dtype] * expected.norm()
