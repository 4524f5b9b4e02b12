"""Small models of transformers' causal architectures, with random weights: 2 layers of width 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from distft.models.fused_lora import fuse
from distft.models.tiny import tiny_model

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "sliding_window": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    # Multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # Linear attention and Mamba
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}
"""Sizes by the names that configurations have for them; one that knows no such name ignores it."""
_LATENT = {"head_dim": None, "num_key_value_heads": 4}
_MAMBA_MODULES = ["out_proj", "conv1d"]
_ONE_OF_EACH = {"layer_types": ["linear_attention", "full_attention"]}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "falcon": {"head_dim": None},
    "falcon_alibi": {"head_dim": None, "alibi": True},
    "falcon_h1": {"mamba_d_ssm": 64},
    "glm4_moe_lite": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "minicpm3": _LATENT,
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
    },
    "olmo_hybrid": _ONE_OF_EACH,
    "qwen3_5_text": _ONE_OF_EACH,
    "qwen3_next": _ONE_OF_EACH,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 5},
    "youtu": _LATENT,
}
"""What some families need besides, or cannot be given (None)."""


def config_of(family: str, vocabulary: int = 128) -> Any:
    """The configuration of a small model; `family` is transformers' `model_type`, or that with a variant behind it."""
    values = _SIZES | {"vocab_size": vocabulary} | _OWN.get(family, {})
    given = {key: value for key, value in values.items() if value is not None}
    return AutoConfig.for_model(family.removesuffix("_alibi"), **given)


def small_model(family: str, vocabulary: int = 128, attention: str | None = None) -> Any:
    """A model of random weights, none of which is zero: no bias, sink or norm may be left out unnoticed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(family, vocabulary), attn_implementation=attention)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
            else:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def adapted(model: Any, **options: Any) -> Any:
    """`model` with a fused adapter on all linears."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
        model = get_peft_model(model, LoraConfig(**settings))
    fuse(model)
    return model


def saved(family: str, folder: Path) -> Path:
    """A folder with a small model and the tokenizer of the tiny model."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    small_model(family, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
