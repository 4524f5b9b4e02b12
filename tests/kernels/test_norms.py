"""PyTorch's norm in place of those of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from distft.kernels.norms import TorchRMSNorm, use_torch_norms


class GatedRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """As in models with Mamba layers."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = super().forward(x if gate is None else x * gate)
        return found


def norm_of(cls: Any, dtype: torch.dtype = torch.float32) -> Any:
    norm = cls(64).to(dtype)
    nn.init.normal_(norm.weight)
    return norm


def fast(norm: Any) -> Any:
    ours = copy.deepcopy(norm)
    use_torch_norms(ours)
    return ours


@pytest.mark.parametrize("cls", [LlamaRMSNorm, Qwen3RMSNorm, Olmo2RMSNorm, GatedRMSNorm])
def test_the_norm_matches_that_of_the_model(cls: Any) -> None:
    plain = norm_of(cls)
    ours = fast(plain)
    assert isinstance(ours, TorchRMSNorm)
    inputs = torch.randn(2, 3, 64)
    x, y = (inputs.clone().requires_grad_() for _ in range(2))
    ours(x).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(ours(x), plain(y))
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    ours.plain = True
    assert torch.equal(ours(inputs), plain(inputs))


class OtherRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.01


class LargerEpsilonRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.variance_epsilon, before = 1e-5, self.variance_epsilon
        found = super().forward(x)
        self.variance_epsilon = before
        return found


@pytest.mark.parametrize("cls", [Gemma3RMSNorm, OtherRMSNorm, LargerEpsilonRMSNorm])
def test_norms_that_compute_something_else_stay_as_they_are(cls: Any) -> None:
    assert not isinstance(fast(norm_of(cls)), TorchRMSNorm)


def test_a_norm_with_a_gate_takes_the_forward_that_was_there() -> None:
    plain = norm_of(GatedRMSNorm)
    x, gate = torch.randn(3, 64), torch.randn(3, 64)
    assert torch.equal(fast(plain)(x, gate), plain(x, gate))


def test_under_autocast_the_norm_keeps_the_type_of_its_input() -> None:
    ours = fast(norm_of(LlamaRMSNorm, torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_inputs_of_another_type_take_the_forward_that_was_there() -> None:
    plain = norm_of(LlamaRMSNorm, torch.bfloat16)
    x = torch.randn(3, 64)
    assert torch.equal(fast(plain)(x), plain(x))
