"""Attention over packs of samples with what PyTorch ships: FlashAttention's variable-length kernel, nothing to compile."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from distft.config.recipe import Recipe
from distft.errors import ModelError

VARLEN = "varlen"
"""Name under which the kernel is registered with transformers."""


def choose(recipe: Recipe, config: PreTrainedConfig, *, on_gpu: bool) -> str:
    """The attention implementation to load the model with: the recipe's own, or for `auto` the fastest that fits.

    Packs on a GPU take flash-attn where it is installed, else PyTorch's variable-length kernel where that can do what the model
    with `config` wants. Everything else takes SDPA:
    transformers gives it a block-diagonal mask for packs, which is correct and needs memory in the square of the pack.

    Raises:
        ModelError: `varlen` was asked for where it cannot run.
    """
    asked, half = recipe.model.attn_implementation, recipe.model.dtype != "float32"
    if asked == VARLEN and not (on_gpu and half and kernel() is not None):
        raise ModelError(
            "model.attn_implementation=varlen runs on GPUs, in bfloat16 or float16, and this PyTorch may lack it; take sdpa, or auto"
        )
    if asked == VARLEN and (lacking := lacks(config)):
        raise ModelError(
            f"model.attn_implementation=varlen has no {lacking}, which {recipe.model.name} wants; take sdpa, or auto"
        )
    if asked != "auto":
        return asked
    if not (on_gpu and half):
        return "sdpa"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    packed = recipe.batching.micro_batch_tokens is not None
    return VARLEN if packed and kernel() is not None and not lacks(config) else "sdpa"


def lacks(config: PreTrainedConfig) -> str | None:
    """What a model with `config` wants of its attention and the kernel has not; None for nothing."""
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    wanted = {
        "attention dropout": getattr(text, "attention_dropout", 0.0), "soft-capping": getattr(text, "attn_logit_softcapping", None),
        "sliding window": windowed and "window_size" not in _options(), f"heads of size {size}": size > 256,
    }  # fmt: skip
    return next((name for name, want in wanted.items() if want), None)


@functools.cache
def kernel() -> Any:
    """PyTorch's `varlen_attn`, or None where this PyTorch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@functools.cache
def _options() -> frozenset[str]:
    return frozenset(inspect.signature(kernel()).parameters)


def register() -> None:
    """Make `attn_implementation="varlen"` known to transformers.

    Without a mask of its own: transformers would look for the bounds of the samples in every forward, and wait for the device.
    """
    AttentionInterface.register(VARLEN, varlen_attention)


def varlen_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    *, scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention within each sample of one packed row.

    `query` is [1, heads, tokens, head size], `key` and `value` [1, key heads, tokens, head size]; `cu_seq_lens_q` [samples + 1]
    holds the bounds of the samples (int32), `max_length_q` the longest. Without bounds the row is one sample.
    Returns [1, tokens, heads, head size].

    Raises:
        ModelError: padded rows, attention dropout, soft-capping, or a sliding window that this PyTorch cannot do.
    """
    if query.shape[0] != 1 or attention_mask is not None or key.shape[2] != query.shape[2]:
        raise ModelError("varlen attention takes one packed row; use sdpa for padded batches and for generation")
    if dropout or softcap:
        raise ModelError("varlen attention has no dropout and no soft-capping; use sdpa")
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
        raise ModelError(f"varlen attention of PyTorch {torch.__version__} has no sliding window; use sdpa")
    if "enable_gqa" in _options():
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    out = kernel()(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options)
    return out.unsqueeze(0), None
