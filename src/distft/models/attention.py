"""Attention over packed samples with PyTorch's built-in variable-length FlashAttention kernel: nothing to compile."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from distft import upstream_api
from distft.config.recipe import Recipe
from distft.errors import ModelError

VARLEN = "varlen"
"""The name of the kernel in transformers' registry."""


def choose(recipe: Recipe, config: PreTrainedConfig, *, on_gpu: bool) -> str:
    """The attention implementation to load the model with: the recipe's, or the first of those that `auto` may use.

    Raises:
        ModelError: the recipe asks for one that cannot run here, or that the model lacks.
    """
    asked, half = recipe.model.attn_implementation, recipe.model.dtype != "float32"
    if asked == "auto":
        return choices(recipe, config, on_gpu=on_gpu)[0]
    if asked == VARLEN and not (on_gpu and half and kernel() is not None):
        raise ModelError(
            "model.attn_implementation=varlen needs a GPU, bfloat16 or float16, and a PyTorch that has varlen_attn; "
            "use sdpa or auto"
        )
    if asked == VARLEN and (feature := missing_feature(config)):
        raise ModelError(
            f"model.attn_implementation=varlen does not support {feature}, which {recipe.model.name} needs; "
            "use sdpa or auto"
        )
    if not has_attention(config, asked):
        raise ModelError(f"{recipe.model.name} has no {asked} attention; set model.attn_implementation=auto")
    return asked


def choices(recipe: Recipe, config: PreTrainedConfig, *, on_gpu: bool) -> list[str]:
    """The implementations that `auto` may use, the fastest first.

    On a GPU, the first is flash-attn if it is installed; otherwise, for packed samples, PyTorch's variable-length
    kernel if it supports the model. Then come SDPA and the model's plain ("eager") attention, as far as the model has
    them. For packs, transformers gives both a block-diagonal mask, whose memory is quadratic in the length of the pack.
    """
    fast = []
    if on_gpu and recipe.model.dtype != "float32":
        packed = recipe.batching.micro_batch_tokens is not None
        if is_flash_attn_2_available():
            fast.append("flash_attention_2")
        elif packed and kernel() is not None and not missing_feature(config):
            fast.append(VARLEN)
    return [name for name in (*fast, "sdpa", "eager") if has_attention(config, name)]


def has_attention(config: PreTrainedConfig, name: str) -> bool:
    """Whether the architecture has the implementation `name`. One with code of its own is only known when it is
    built."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        return True
    if name == VARLEN:  # a model that does not call it would attend without any mask
        return not upstream_api.attention_is_fixed(kind)
    return upstream_api.supports_attention(kind, name)


def missing_feature(config: PreTrainedConfig) -> str | None:
    """A feature that attention with this `config` needs and the variable-length kernel lacks, or None."""
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    unsupported = {
        "attention dropout": getattr(text, "attention_dropout", 0.0),
        "soft-capping": getattr(text, "attn_logit_softcapping", None),
        "sliding window": windowed and "window_size" not in _options(),
        f"heads of size {size}": size > 256,
    }
    return next((name for name, needed in unsupported.items() if needed), None)


@functools.cache
def kernel() -> Any:
    """PyTorch's `varlen_attn`, or None if this version has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@functools.cache
def _options() -> frozenset[str]:
    return frozenset(inspect.signature(kernel()).parameters)


def register() -> None:
    """Register `attn_implementation="varlen"` with transformers.

    It has no mask function: to build a mask, transformers would search for sample boundaries in every forward, and wait
    for the device.
    """
    AttentionInterface.register(VARLEN, varlen_attention)


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample of a packed row.

    `query` is [1, heads, tokens, head size]; `key` and `value` are [1, key heads, tokens, head size]. `cu_seq_lens_q`
    [samples + 1] holds the sample boundaries (int32) and `max_length_q` the length of the longest sample; without them,
    the row is a single sample. Returns [1, tokens, heads, head size].

    Raises:
        ModelError: the rows are padded, or a feature is requested that this version of PyTorch does not support.
    """
    if query.shape[0] != 1 or attention_mask is not None or key.shape[2] != query.shape[2]:
        raise ModelError("varlen attention needs a single packed row; use sdpa for padded batches and for generation")
    if dropout or softcap:
        raise ModelError("varlen attention supports neither dropout nor soft-capping; use sdpa")
    tokens = query.shape[2]
    if cu_seq_lens_q is None:
        cu_seq_lens_q, max_length_q = torch.tensor([0, tokens], dtype=torch.int32, device=query.device), tokens
    options: dict[str, Any] = {"scale": scaling}
    window = -1 if sliding_window is None or sliding_window >= (max_length_q or tokens) else sliding_window - 1
    if "window_size" in _options():
        options["window_size"] = (window, 0)
    elif window == -1:
        options["is_causal"] = True
    else:
        raise ModelError(f"varlen attention in PyTorch {torch.__version__} has no sliding window; use sdpa")
    if "enable_gqa" in _options():
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    # Rotations and norms of fp32 weights give fp32 under autocast, which casts for SDPA and not for this kernel.
    query, key = query.to(value.dtype), key.to(value.dtype)
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    out = kernel()(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options)
    return out.unsqueeze(0), None
