"""Which attention a run uses."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
)
from transformers.utils import is_flash_attn_2_available

from distft.config.recipe import load_recipe
from distft.errors import ModelError
from distft.models.attention import choices, choose
from distft.models.unpacked import UNPACKED
from distft.models.varlen import VARLEN

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
        (LlamaConfig(), ["sdpa", "eager", UNPACKED]),
        (GptOssConfig(), ["eager", UNPACKED]),  # its sinks are unknown to SDPA
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
    (LlamaConfig(attention_dropout=0.1), "attention dropout", "sdpa"),
    (GPT2Config(), "attention dropout", "sdpa"),
    (Gemma2Config(), "soft-capping", UNPACKED),
    (Llama4TextConfig(), "chunked attention", "sdpa"),
    (LlamaConfig(hidden_size=4096, num_attention_heads=8), "heads of size 512", "sdpa"),
]


@pytest.mark.parametrize(
    ("config", "feature", "other"), UNSUPPORTED, ids=[f"{config.model_type}-{name}" for config, name, _ in UNSUPPORTED]
)
def test_a_model_that_needs_an_unsupported_feature_gets_another_kernel(config: Any, feature: str, other: str) -> None:
    assert choose(load_recipe([BF16, PACKED]), config, on_gpu=True) == (FAST or other)
    remedy = "eager" if other == UNPACKED else "sdpa"
    with pytest.raises(ModelError, match=f"does not support {feature}, which tiny needs; use {remedy} or auto"):
        choose(load_recipe([BF16, PACKED, "model.attn_implementation=varlen"]), config, on_gpu=True)


def test_soft_capping_is_not_left_out() -> None:
    assert "sdpa" not in choices(load_recipe([BF16, PACKED]), Gemma2Config(), on_gpu=False)
    with pytest.raises(ModelError, match="sdpa does not support soft-capping, which tiny needs; use eager or auto"):
        choose(load_recipe(["model.attn_implementation=sdpa"]), Gemma2Config(), on_gpu=False)


def test_packs_on_a_gpu_are_unpacked_before_attention_is_eager() -> None:
    names = choices(load_recipe([PACKED]), GptOssConfig(), on_gpu=True)  # fp32, and no SDPA
    assert names == [UNPACKED, "eager"]
    assert UNPACKED not in choices(load_recipe([BF16]), GptOssConfig(), on_gpu=True)
    assert UNPACKED not in choices(load_recipe([PACKED]), BloomConfig(), on_gpu=True)  # it has attention of its own


def test_a_model_without_heads_has_choices() -> None:
    assert choices(load_recipe([BF16, PACKED]), MambaConfig(), on_gpu=True)[-1] == "eager"
