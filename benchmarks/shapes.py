"""The models of the shipped recipes at their real shapes: configurations that need no network, one for each recipe."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _sizes(*values: int, theta: float = 10_000.0, **others: Any) -> dict[str, Any]:
    """`values` in the order of `_SIZES`."""
    rope = {"rope_type": "default", "rope_theta": theta}
    return {**dict(zip(_SIZES, values, strict=True)), "rope_parameters": rope, "rms_norm_eps": 1e-6, **others}


SHAPES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "qwen3_8b": (
        "qwen3",
        8.19,
        _sizes(4096, 12288, 36, 32, 8, theta=1e6, head_dim=128, vocab_size=151_936, max_position_embeddings=40_960),
    ),
    "qwen3_0_6b": (
        "qwen3",
        0.596,
        _sizes(
            1024,
            3072,
            28,
            16,
            8,
            theta=1e6,
            head_dim=128,
            vocab_size=151_936,
            max_position_embeddings=40_960,
            tie_word_embeddings=True,
        ),
    ),
    "llama3_8b": (
        "llama",
        8.03,
        _sizes(
            4096,
            14336,
            32,
            32,
            8,
            vocab_size=128_256,
            max_position_embeddings=131_072,
            rope_parameters=_LLAMA3_ROPE | {"factor": 8.0},
        ),
    ),
    "llama3_1b": (
        "llama",
        1.24,
        _sizes(
            2048,
            8192,
            16,
            32,
            8,
            vocab_size=128_256,
            max_position_embeddings=131_072,
            rope_parameters=_LLAMA3_ROPE | {"factor": 32.0},
            tie_word_embeddings=True,
        ),
    ),
    "gemma3_4b": (
        "gemma3",
        4.30,
        {
            "text_config": {
                **dict(zip(_SIZES, (2560, 10240, 34, 8, 4), strict=True)),
                "head_dim": 256,
                "vocab_size": 262_208,
                "sliding_window": 1024,
                "max_position_embeddings": 131_072,
            },
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 896,
                "patch_size": 14,
            },
        },
    ),
    "mistral_7b": (
        "mistral",
        7.25,
        _sizes(
            4096,
            14336,
            32,
            32,
            8,
            theta=1e6,
            vocab_size=32_768,
            max_position_embeddings=32_768,
            sliding_window=None,
        ),
    ),
    "phi4_mini": (
        "phi3",
        3.84,
        _sizes(
            3072,
            8192,
            32,
            24,
            8,
            vocab_size=200_064,
            max_position_embeddings=131_072,
            original_max_position_embeddings=4096,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 4096,
                "short_factor": [1.0] * 48,
                "long_factor": [1.0 + number / 2 for number in range(48)],
            },
            sliding_window=262_144,
            pad_token_id=199_999,
            bos_token_id=199_999,
            eos_token_id=199_999,
            tie_word_embeddings=True,
        ),
    ),
    "smollm2_135m": (
        "llama",
        0.1345,
        _sizes(
            576, 1536, 30, 9, 3, theta=1e5, vocab_size=49_152, max_position_embeddings=8192, tie_word_embeddings=True
        ),
    ),
    "smollm3_3b": (
        "smollm3",
        3.08,
        _sizes(
            2048,
            11008,
            36,
            16,
            4,
            theta=5e6,
            vocab_size=128_256,
            max_position_embeddings=65_536,
            tie_word_embeddings=True,
        ),
    ),
    "gpt_oss_20b": (
        "gpt_oss",
        20.9,
        {"num_hidden_layers": 24, "num_local_experts": 32},
    ),
    "qwen3_30b_a3b": (
        "qwen3_moe",
        30.5,
        _sizes(
            2048,
            6144,
            48,
            32,
            4,
            theta=1e6,
            head_dim=128,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            vocab_size=151_936,
            max_position_embeddings=40_960,
        ),
    ),
    "deepseek_7b": (
        "llama",
        6.91,
        _sizes(4096, 11008, 30, 32, 32, vocab_size=102_400, max_position_embeddings=4096),
    ),
}
"""For each recipe: the kind of model, its billions of parameters as published, and what its configuration says."""


def config_of(recipe: str, layers: int | None = None) -> Any:
    """The configuration of the recipe's model; with `layers` instead of all its layers."""
    kind, _, values = SHAPES[recipe]
    config = AutoConfig.for_model(kind, **values)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config
