"""Attention that unpacks the samples of a pack, against attention in one row with a block mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distft.data.loader import Collator
from distft.errors import ModelError
from distft.models import attention
from distft.models.isolation import IsolationCheck
from distft.models.unpacked import UNPACKED, unpacked_attention

from .families import adapted, small_model
from .test_varlen import by_mask, heads

LENGTHS = {"alike": [7, 9, 1, 8], "one much longer": [40, 3, 1, 2], "one": [20]}
CASES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "values of another size (MLA)": {"key": 4, "size": 24, "values": 16},
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, 4, 4096])
@pytest.mark.parametrize("feature", ["", "sinks", "soft-capping"])
def test_values_and_gradients_are_right(lengths: list[int], case: str, window: int | None, feature: str) -> None:
    inputs = [tensor.double() for tensor in heads(sum(lengths), **CASES[case])]
    sinks = torch.tensor([-1.0, 0.5, 2.0, 3.5], dtype=torch.float64)
    inputs += [sinks] if feature == "sinks" else []
    cap = 2.0 if feature == "soft-capping" else None
    other = [tensor.clone().requires_grad_() for tensor in inputs]
    for tensor in inputs:
        tensor.requires_grad_()
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    options: dict[str, Any] = {"sliding_window": window, "cu_seq_lens_q": bounds, "max_length_q": max(lengths)}
    options |= {"softcap": cap, "s_aux": inputs[3] if feature == "sinks" else None}
    found, _ = unpacked_attention(torch.nn.Identity(), *inputs[:3], None, **options)
    expected = by_mask(*other[:3], lengths, window, *other[3:], cap=cap)
    weights = torch.randn_like(expected)
    found.backward(weights)
    expected.backward(weights)
    # What is not SDPA computes logits in fp32.
    exact = {"rtol": 1e-5, "atol": 1e-5} if feature else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found, expected, **exact)
    for ours, theirs in zip(inputs, other, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **exact)


def test_unsupported_inputs_are_refused() -> None:
    with pytest.raises(ModelError, match="single packed row"):
        unpacked_attention(torch.nn.Identity(), *heads(8, rows=2), None)
    with pytest.raises(ModelError, match="no position bias"):
        unpacked_attention(torch.nn.Identity(), *heads(8), None, position_bias=torch.ones(1, 4, 8, 8))


FAMILIES = ("gemma2", "gpt_oss", "afmoe", "opt", "biogpt", "stablelm", "seed_oss", "deepseek_v3")


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_right_with_it(family: str) -> None:
    """Also those that build their masks without the boundaries of samples, or have dropout."""
    attention.register()
    for precision in (None, torch.bfloat16):
        base = small_model(family).to(precision or torch.float32)
        model = adapted(base, exclude_modules=["router"] if family == "gpt_oss" else None)
        found = IsolationCheck(model, precision=precision).findings(Collator(0, packed=True), UNPACKED)
        assert found.fault is None, (precision, found)
        assert precision or max(found.errors.values()) < 1e-5, found


def test_dropout_is_drawn() -> None:
    inputs, options = heads(30), {"dropout": 0.5}
    first, second = (unpacked_attention(torch.nn.Identity(), *inputs, None, **options)[0] for _ in range(2))
    assert not torch.equal(first, second)
