"""Attention over packed samples with PyTorch's built-in variable-length FlashAttention kernel: nothing to compile."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from distft import upstream_api
from distft.errors import ModelError

VARLEN = "varlen"
"""The name of the kernel in transformers' registry."""
LARGEST_HEAD = 256
_MULTIPLE = 8
"""The kernel takes heads whose size is a multiple of this."""


@functools.cache
def kernel() -> Any:
    """PyTorch's `varlen_attn`, or None if this version has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@functools.cache
def kernel_options() -> frozenset[str]:
    """The parameters of `kernel`, which newer versions of PyTorch have more of."""
    return frozenset(inspect.signature(kernel()).parameters)


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_k: int | None = None,
    shared_keys: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample of a packed row.

    `query` is [1, heads, tokens, head size]; `key` is [1, key heads, tokens, head size] and `value` [1, key heads,
    tokens, value size]. `s_aux` [heads] holds the sinks: logits that take part in the softmax and have no value.
    `cu_seq_lens_q` [samples + 1] holds the sample boundaries (int32) and `max_length_q` the length of the longest
    sample; without them, the row is a single sample. With `shared_keys` [keys], the tokens whose keys the samples have,
    `cu_seq_lens_k` and `max_length_k` are those of the keys; the last query of a sample belongs to its last key.
    Returns [1, tokens, heads, value size].

    Raises:
        ModelError: the rows are padded, or a feature is requested that this version of PyTorch does not support.
    """
    if query.shape[0] != 1 or attention_mask is not None or key.shape[2] != query.shape[2]:
        raise ModelError("varlen attention needs a single packed row; use sdpa for padded batches and for generation")
    if dropout or softcap or position_bias is not None:
        raise ModelError("varlen attention supports neither dropout nor soft-capping nor a position bias; use sdpa")
    tokens, size, value_size = query.shape[2], query.shape[3], value.shape[3]
    if cu_seq_lens_q is None:
        cu_seq_lens_q, max_length_q = torch.tensor([0, tokens], dtype=torch.int32, device=query.device), tokens
    if shared_keys is None:
        cu_seq_lens_k, max_length_k = cu_seq_lens_q, max_length_q
    options: dict[str, Any] = {"scale": size**-0.5 if scaling is None else scaling}
    window = -1 if sliding_window is None or sliding_window >= (max_length_k or tokens) else sliding_window - 1
    if "window_size" in kernel_options():
        options["window_size"] = (window, 0)
    elif window == -1:
        options["is_causal"] = True
    else:
        raise ModelError(f"varlen attention in PyTorch {torch.__version__} has no sliding window; use sdpa")
    if "enable_gqa" in kernel_options():
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    # Under autocast, rotations and norms of fp32 weights give fp32, and so do fused linears behind a LayerNorm. SDPA
    # is cast to 16 bits then, and this kernel is not.
    dtype = value.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(value.device.type):
        dtype = torch.get_autocast_dtype(value.device.type)
    padded = max(size, value_size)
    padded += -padded % _MULTIPLE
    q, k, v = (_rows(tensor, padded, dtype) for tensor in (query, key, value))
    if shared_keys is not None:
        if s_aux is not None:
            raise ModelError("varlen attention has no sinks where samples share keys")
        k, v = (each.index_select(0, shared_keys) for each in (k, v))
    if s_aux is None:
        out = kernel()(q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **options)
    elif "return_aux" in kernel_options():
        out = _WithSinks.apply(q, k, v, s_aux, cu_seq_lens_q, max_length_q, window, options)  # type: ignore[no-untyped-call]
    else:
        raise ModelError(f"varlen attention in PyTorch {torch.__version__} has no attention sinks; use eager")
    return (out if padded == value_size else out[..., :value_size]).unsqueeze(0), None


_BOUNDARIES = ("cu_seq_lens_q", "max_length_q", "cu_seq_lens_k", "max_length_k", "shared_keys")


def hand_over_boundaries(model: nn.Module) -> None:
    """Give attention modules the sample boundaries that their layers receive and do not pass on (StableLM, Nemotron).

    They travel with the positions, which the layers do pass on: if a layer is recomputed in the backward, its hooks are
    not called again, or other micro-batches were computed in between.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        for name, attention in layer.named_children():
            if "takes_boundaries" not in vars(attention) and _keeps_keywords(
                layer.__class__, name, attention.__class__
            ):
                vars(attention)["takes_boundaries"] = True
                layer.register_forward_pre_hook(_note, with_kwargs=True)
                attention.register_forward_pre_hook(_take, with_kwargs=True)


@functools.cache
def _keeps_keywords(layer: Any, name: str, attention: Any) -> bool:
    """Whether the forward of `layer` calls its attention `name` without the `**kwargs` that both accept."""
    accepted = (inspect.signature(kind.forward).parameters.values() for kind in (layer, attention))
    takes = all(any(each.kind is each.VAR_KEYWORD for each in parameters) for parameters in accepted)
    if "Attention" not in attention.__name__ or not takes:
        return False
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(layer.forward)))
    except (OSError, SyntaxError):
        return False
    calls = [node for node in ast.walk(code) if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{name}"]
    return bool(calls) and all(keyword.arg is not None for call in calls for keyword in call.keywords)


def _note(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if "position_ids" in kwargs:
        kwargs["position_ids"].boundaries = {key: kwargs[key] for key in _BOUNDARIES if key in kwargs}


def _take(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, getattr(kwargs.get("position_ids"), "boundaries", {}) | kwargs


def _rows(tensor: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor [1, heads, tokens, ...] as [tokens, heads, size], filled up with zeros, which change no product."""
    tensor = tensor.to(dtype).squeeze(0).transpose(0, 1)
    return tensor if tensor.shape[-1] == size else nn.functional.pad(tensor, (0, size - tensor.shape[-1]))


class _WithSinks(torch.autograd.Function):
    """Attention whose softmax has one more logit per head, the sink, which has no value.

    With l the log-sum-exp of a query's logits and s the sink, the new one is m = log(exp(l) + exp(s)), and the output
    shrinks by exp(l - m). The kernel's backward takes its probabilities P = exp(logits - m) from the log-sum-exp that
    it is given, and the gradient of the logits P (dP - d) with d = sum(grad * output) from the output. Given m and the
    new output, it is exact: the value of the sink is zero, so it adds nothing to d. The sink's own gradient is that of
    a logit with dP = 0: -exp(s - m) d, summed over the queries.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor,
        bounds: torch.Tensor,
        longest: int,
        window: int,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """`q`, `k`, `v` are [tokens, heads, size], `sinks` [heads]; `window` is the number of tokens to look back, or
        -1. Returns [tokens, heads, size]."""
        from torch.nn.attention.varlen import AuxRequest

        out: torch.Tensor
        out, before = kernel()(
            q, k, v, bounds, bounds, longest, longest, return_aux=AuxRequest(lse=True), **options
        )  # `before` is [heads, tokens]
        total = torch.logaddexp(before, sinks.detach().float()[:, None])
        out.mul_(torch.exp(before - total).t()[..., None])
        ctx.save_for_backward(q, k, v, sinks, bounds, out, total)
        ctx.longest, ctx.window, ctx.scale = longest, window, options["scale"]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, bounds, out, total = ctx.saved_tensors
        (grad,) = grads
        found = upstream_api.flash_attention_backward(
            grad, q, k, v, out, total, bounds, ctx.longest, scale=ctx.scale, window=ctx.window
        )
        of_sinks = None
        if ctx.needs_input_grad[3]:
            share = torch.exp(sinks.float()[:, None] - total)
            of_sinks = -(share * (grad.float() * out.float()).sum(-1).t()).sum(1).to(sinks.dtype)
        return *found, of_sinks, None, None, None, None
