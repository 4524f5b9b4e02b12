"""liger's kernels: used for one model, compared with transformers' own code, and left out where they are wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config, PreTrainedConfig, Qwen3Config
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen3 import modeling_qwen3

from distft import upstream_api
from distft.data.loader import Collator
from distft.kernels.liger import Switched, use_fast_kernels, use_plain_kernels
from distft.kernels.norms import TorchRMSNorm
from distft.kernels.subclass import FastForward
from distft.models.isolation import IsolationCheck

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 99,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": (LlamaConfig(**SHAPE), modeling_llama),
    "qwen3": (Qwen3Config(**SHAPE), modeling_qwen3),
    "gemma3": (Gemma3TextConfig(**SHAPE), modeling_gemma3),
    "phi3": (Phi3Config(**SHAPE, partial_rotary_factor=0.5), modeling_phi3),
}


@pytest.fixture(autouse=True)
def rotations() -> Iterator[None]:
    """liger replaces functions for the whole process; bring them back for the tests that follow."""
    before = {module: module.apply_rotary_pos_emb for _, module in CONFIGS.values()}
    yield
    for module, function in before.items():
        module.apply_rotary_pos_emb = function


def model_of(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else 0.1)
    return model.eval()


@pytest.mark.gpu
@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_with_fast_kernels_computes_what_the_plain_model_does(family: str) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    config, module = CONFIGS[family]
    plain = model_of(config).cuda()
    ours = copy.deepcopy(plain)
    use_fast_kernels(ours)
    fast = [each for each in ours.modules() if isinstance(each, FastForward)]
    per_layer = {"llama": 2, "qwen3": 4, "gemma3": 6, "phi3": 2}[family]
    assert len(fast) == 2 * per_layer + 1 and list(ours.state_dict()) == list(plain.state_dict())
    assert isinstance(module.apply_rotary_pos_emb, Switched)
    assert all(isinstance(each, TorchRMSNorm) == (family != "gemma3") for each in fast)
    ids = torch.arange(34, device="cuda").view(2, 17)
    found = ours(ids).logits
    use_plain_kernels(ours)
    expected = ours(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(plain(ids).logits, expected), "plain is transformers' own code"
    assert not torch.equal(found, expected), "the kernels were in use"


@pytest.mark.gpu
def test_a_second_model_of_a_process_gets_the_same_kernels() -> None:
    """liger also replaces classes, with which the second model would be built."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    for _ in range(2):
        model = model_of(CONFIGS["llama"][0]).cuda()
        use_fast_kernels(model)
        assert type(model.model.norm).__mro__[-3] is modeling_llama.LlamaRMSNorm
        assert isinstance(model.model.norm, TorchRMSNorm)


def rotate_wrongly(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    return q * cos.unsqueeze(1), k * cos.unsqueeze(1)


def normalize_wrongly(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * norm.weight


def with_wrong_rotation(model: Any) -> None:
    modeling_llama.apply_rotary_pos_emb = rotate_wrongly


def with_wrong_norms(model: Any) -> None:
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight = torch.nn.Parameter(module.weight.bfloat16())  # so that PyTorch's norm is not used
            module.forward = normalize_wrongly(module)


@pytest.mark.parametrize("apply", [with_wrong_rotation, with_wrong_norms])
def test_the_check_before_step_1_finds_wrong_kernels(apply: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_api, "apply_liger_kernels", apply)
    model = model_of(CONFIGS["llama"][0])
    use_fast_kernels(model)
    check = IsolationCheck(model)
    packs = Collator(0, packed=True)
    fault = check.findings(packs, "sdpa").fault
    assert fault is not None and "logits" in fault
    assert check.findings(packs, "sdpa", plain=True).fault is None
    assert check.findings(packs, "sdpa").fault is not None


def test_a_function_is_replaced_once_however_many_models_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_api, "apply_liger_kernels", with_wrong_rotation)
    original = modeling_llama.apply_rotary_pos_emb
    for _ in range(2):
        use_fast_kernels(model_of(CONFIGS["llama"][0]))
    assert isinstance(modeling_llama.apply_rotary_pos_emb, Switched)
    assert modeling_llama.apply_rotary_pos_emb.plain is original
