"""The kernels against their definitions, bitsandbytes and float64: PyTorch's version on the CPU, Triton's on a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from distft.kernels.elementwise import ACTIVATIONS, dequantize, gated, gated_backward

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
QUANTISED = [
    pytest.param(*options, id="-".join(map(str, options)))
    for options in itertools.product(("nf4", "fp4"), (True, False), ("uint8", "bfloat16"))
]
SHAPES = [(64, 64), (192, 512), (100, 320), (1000, 4096)]
ODD = [(3, 7), (129, 33), (1, 1)]
"""Shapes with an odd number of values: the last byte holds only one."""


def quantised(shape: tuple[int, int], kind: str, nested: bool, storage: str, dtype: torch.dtype, device: str) -> Any:
    """A packed weight and its state."""
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.05).to(device, dtype)
    return quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type=kind, quant_storage=getattr(torch, storage)
    )


def by_definition(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Value = code · scale of its block; with double quantisation, scale = code · scale of its group + mean."""
    bytes_ = packed.view(torch.uint8).flatten()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], 1).flatten()[: state.shape.numel()].long()
    scales = state.absmax
    if state.nested:
        groups = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: scales.numel()]
        scales = state.state2.code[scales.long()] * groups + state.offset
    scales = scales.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes] * scales).view(state.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("kind", "nested", "storage"), QUANTISED)
def test_dequantised_weights_match_the_definition(
    kind: str, nested: bool, storage: str, dtype: torch.dtype, device: str
) -> None:
    for shape in SHAPES + (ODD if storage == "uint8" else []):
        packed, state = quantised(shape, kind, nested, storage, dtype, device)
        found = dequantize(packed, state, dtype)
        assert (found.shape, found.dtype) == (shape, dtype)
        assert torch.equal(found, by_definition(packed, state).to(dtype)), shape


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "nested", "storage"), QUANTISED)
def test_dequantised_weights_are_bit_identical_to_those_of_bitsandbytes(
    kind: str, nested: bool, storage: str, dtype: torch.dtype
) -> None:
    for shape in [*SHAPES, (4096, 11008)]:
        packed, state = quantised(shape, kind, nested, storage, dtype, "cuda")
        assert torch.equal(dequantize(packed, state, dtype), dequantize_4bit(packed, state)), shape


EXACT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Tolerated relative error in norm, from rounding to each type."""


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.float64),
        pytest.param("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("halves", [False, True], ids=["apart", "halves"])
def test_gated_activations_and_their_gradients_match_float64(
    halves: bool, activation: str, device: str, dtype: torch.dtype
) -> None:
    """`halves`: gate and up are halves of the columns of one tensor, as the output of one linear is."""
    for rows, columns in [(3, 5), (7, 1000), (2, 4097), (1, 999)]:
        torch.manual_seed(0)
        both = (3 * torch.randn(rows, 2 * columns, device=device)).to(dtype)
        grad = torch.randn(rows, columns, device=device).to(dtype)
        gate, up = both.chunk(2, 1)
        if not halves:
            gate, up = gate.contiguous(), up.contiguous()
        exact_gate, exact_up = (tensor.to(torch.float64, copy=True).requires_grad_() for tensor in (gate, up))
        hidden = ACTIVATIONS[activation](exact_gate) * exact_up
        hidden.backward(grad.double())
        expected = [hidden.detach(), exact_gate.grad, exact_up.grad, hidden.detach()]
        forward = gated(gate, up, activation)
        assert forward.is_contiguous()
        of_gate, of_up, again = gated_backward(grad, gate, up, activation)
        assert torch.equal(again, forward), "the backward must recompute exactly the activation of the forward"
        for found, exact in zip([forward, of_gate, of_up, again], expected, strict=True):
            assert exact is not None and found.dtype == dtype
            assert (found.double() - exact).norm() <= EXACT[dtype] * exact.norm(), (rows, columns)
