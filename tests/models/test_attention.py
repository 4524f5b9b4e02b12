"""Which attention a run uses, and PyTorch's variable-length kernel against SDPA with a block mask."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import BloomConfig, FalconConfig, Gemma2Config, GPTJConfig, GptOssConfig, LlamaConfig
from transformers.utils import is_flash_attn_2_available

from distft.config.recipe import load_recipe
from distft.errors import ModelError
from distft.models.attention import VARLEN, choices, choose, has_attention, kernel, varlen_attention

PACKED = "batching.micro_batch_tokens=512"
BF16 = "model.dtype=bfloat16"
FAST = "flash_attention_2" if is_flash_attn_2_available() else None
"""Preferred on a GPU, if it is installed."""


@pytest.mark.parametrize(
    ("overrides", "on_gpu", "expected"),
    [
        ((BF16, PACKED), False, "sdpa"),
        ((BF16,), False, "sdpa"),
        ((BF16, PACKED), True, FAST or VARLEN),
        ((BF16,), True, FAST or "sdpa"),
        ((PACKED,), True, "sdpa"),  # fp32, which the fast kernels do not support
        ((PACKED, "model.attn_implementation=eager"), False, "eager"),
        ((BF16, PACKED, "model.attn_implementation=sdpa"), True, "sdpa"),
    ],
)
def test_auto_picks_the_fastest_suitable_kernel(overrides: tuple[str, ...], on_gpu: bool, expected: str) -> None:
    assert choose(load_recipe(overrides), LlamaConfig(), on_gpu=on_gpu) == expected


@pytest.mark.parametrize(("dtype", "on_gpu"), [("bfloat16", False), ("float32", True)], ids=["CPU", "fp32"])
def test_varlen_is_refused_where_it_cannot_run(dtype: str, on_gpu: bool) -> None:
    recipe = load_recipe([f"model.dtype={dtype}", PACKED, "model.attn_implementation=varlen"])
    with pytest.raises(ModelError, match="use sdpa or auto"):
        choose(recipe, LlamaConfig(), on_gpu=on_gpu)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), ["sdpa", "eager"]),
        (GptOssConfig(), ["eager"]),  # its sinks are unknown to SDPA
        (BloomConfig(), ["eager"]),
        (FalconConfig(), ["sdpa", "eager"]),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_choices_are_those_that_the_architecture_has(config: Any, expected: list[str]) -> None:
    assert choices(load_recipe([PACKED]), config, on_gpu=False) == expected


@pytest.mark.parametrize("config", [BloomConfig(), FalconConfig(), GPTJConfig()], ids=lambda each: each.model_type)
def test_a_model_with_attention_of_its_own_never_gets_varlen(config: Any) -> None:
    """It would not call the kernel, and attend without a mask."""
    assert VARLEN not in choices(load_recipe([BF16, PACKED]), config, on_gpu=True)
    with pytest.raises(ModelError, match="varlen"):
        choose(load_recipe([BF16, PACKED, "model.attn_implementation=varlen"]), config, on_gpu=True)


UNSUPPORTED = [
    (LlamaConfig(attention_dropout=0.1), "attention dropout"),
    (Gemma2Config(), "soft-capping"),
    (LlamaConfig(hidden_size=4096, num_attention_heads=8), "heads of size 512"),
]


@pytest.mark.parametrize(("config", "feature"), UNSUPPORTED, ids=[name for _, name in UNSUPPORTED])
def test_a_model_that_needs_an_unsupported_feature_gets_another_kernel(config: Any, feature: str) -> None:
    plain = "sdpa" if has_attention(config, "sdpa") else "eager"  # of Gemma 2, it depends on the version
    assert choose(load_recipe([BF16, PACKED]), config, on_gpu=True) == (FAST or plain)
    with pytest.raises(ModelError, match=f"does not support {feature}, which tiny needs; use sdpa or auto"):
        choose(load_recipe([BF16, PACKED, "model.attn_implementation=varlen"]), config, on_gpu=True)


def heads(tokens: int, query: int = 4, key: int = 2, size: int = 32, rows: int = 1, device: str = "cpu") -> Any:
    """Queries, keys and values as transformers passes them: [rows, heads, tokens, head size]."""
    torch.manual_seed(0)
    return [torch.randn(rows, count, tokens, size, device=device) for count in (query, key, key)]


@pytest.mark.parametrize(
    ("rows", "options", "problem"),
    [
        (2, {"attention_mask": None}, "single packed row"),
        (1, {"attention_mask": torch.ones(1, 8)}, "single packed row"),
        (1, {"attention_mask": None, "dropout": 0.1}, "supports neither dropout"),
        (1, {"attention_mask": None, "softcap": 30.0}, "nor soft-capping"),
    ],
    ids=["rows", "mask", "dropout", "soft-capping"],
)
def test_unsupported_inputs_are_refused(rows: int, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        varlen_attention(torch.nn.Identity(), *heads(8, rows=rows), **options)


LENGTHS = [1, 7, 64, 130, 3]


def by_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], window: int | None = None) -> Any:
    """SDPA in float64 with a mask that is causal within each sample and reaches back fewer than `window` tokens."""
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    place = torch.arange(len(sample), device=q.device)
    back = place[:, None] - place[None, :]
    mask = (sample[:, None] == sample[None, :]) & (back >= 0) & (back < (window or len(sample)))
    return scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [LENGTHS, [205]], ids=["several samples", "one"])
@pytest.mark.parametrize("key_heads", [2, 4], ids=["grouped queries", "one key per query"])
@pytest.mark.parametrize("window", [None, 20, 4096])
def test_varlen_attention_matches_sdpa_with_a_block_mask(
    lengths: list[int], key_heads: int, window: int | None
) -> None:
    """Values and gradients, within the error of bf16."""
    if window == 20 and "window_size" not in inspect.signature(kernel()).parameters:
        pytest.skip(f"the kernel of PyTorch {torch.__version__} has no sliding window")
    inputs = [
        tensor.to(torch.bfloat16).requires_grad_()
        for tensor in heads(sum(lengths), key=key_heads, size=64, device="cuda")
    ]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    options = {"sliding_window": window, "cu_seq_lens_q": bounds, "max_length_q": max(lengths)}
    found, _ = varlen_attention(torch.nn.Identity(), *inputs, None, scaling=64**-0.5, **options)
    expected = by_mask(*exact, lengths, window).transpose(1, 2)
    weights = torch.randn_like(expected)
    found.backward(weights.to(found.dtype))
    expected.backward(weights.to(found.dtype).double())
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() <= 2**-6 * theirs.norm()


@pytest.mark.gpu
def test_a_row_without_boundaries_is_one_sample() -> None:
    inputs = [tensor.to(torch.bfloat16) for tensor in heads(50, size=64, device="cuda")]
    bounds = torch.tensor([0, 50], dtype=torch.int32, device="cuda")
    without, _ = varlen_attention(torch.nn.Identity(), *inputs, None)
    with_bounds, _ = varlen_attention(torch.nn.Identity(), *inputs, None, cu_seq_lens_q=bounds, max_length_q=50)
    assert torch.equal(without, with_bounds)
