"""The norms that replace liger's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from distft.kernels.liger import TorchRMSNorm, use_liger_kernels
from distft.kernels.subclass import subclass_in_place


def norm_of(dtype: torch.dtype) -> Any:
    norm = LlamaRMSNorm(64).to(dtype)
    nn.init.normal_(norm.weight)
    return norm


def test_the_norm_matches_that_of_the_model() -> None:
    plain = norm_of(torch.float32)
    ours = copy.deepcopy(plain)
    subclass_in_place(ours, TorchRMSNorm)
    inputs = torch.randn(3, 64)
    x, y = (inputs.clone().requires_grad_() for _ in range(2))
    ours(x).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(ours(x), plain(y))
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)


def test_under_autocast_the_norm_keeps_the_type_of_its_input() -> None:
    ours = norm_of(torch.bfloat16)
    subclass_in_place(ours, TorchRMSNorm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_inputs_of_another_type_take_the_forward_that_was_there() -> None:
    plain = norm_of(torch.bfloat16)
    ours = copy.deepcopy(plain)
    subclass_in_place(ours, TorchRMSNorm)
    x = torch.randn(3, 64)
    assert torch.equal(ours(x), plain(x))


@pytest.mark.gpu
def test_a_model_with_liger_s_kernels_computes_what_the_plain_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    # liger replaces this function for the whole process; restore it for the tests that follow.
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    plain = LlamaForCausalLM(config).cuda()
    ours = copy.deepcopy(plain)
    use_liger_kernels(ours)
    norms = [module for module in ours.modules() if isinstance(module, TorchRMSNorm)]
    assert len(norms) == 5 and list(ours.state_dict()) == list(plain.state_dict())
    ids = torch.arange(34, device="cuda").view(2, 17)
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-4)
