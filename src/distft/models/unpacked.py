"""Attention over packed samples that gives each sample a padded row of its own, in plain PyTorch.

It is for what no kernel has: soft-capping, sinks in fp32, models that build their masks without the boundaries of
samples. Its memory is quadratic in the longest sample, for each sample; where a block-diagonal mask over the pack takes
less, because one sample is much longer than the others, it uses that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from distft.errors import ModelError

UNPACKED = "unpacked"
"""Its name in transformers' registry."""


def unpacked_attention(
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
    shared_keys: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample of a packed row; see `varlen_attention` for shapes.

    `softcap` c lets a logit x be c tanh(x / c). Samples that share keys (`varlen_attention`) take a mask over the row.

    Raises:
        ModelError: the rows are padded, or there is a position bias.
    """
    if query.shape[0] != 1 or attention_mask is not None or key.shape[2] != query.shape[2]:
        raise ModelError("unpacked attention needs a single packed row; use sdpa for padded batches and for generation")
    if position_bias is not None:
        raise ModelError("unpacked attention supports no position bias; use eager")
    tokens = torch.arange(query.shape[2], device=query.device)
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q, max_length_q = torch.tensor([0, len(tokens)], device=query.device), len(tokens)
    if shared_keys is not None and cu_seq_lens_k is not None:
        groups = query.shape[1] // key.shape[1]
        k, v = (each.to(value.dtype).index_select(2, shared_keys).repeat_interleave(groups, 1) for each in (key, value))
        back = _distances(cu_seq_lens_q, cu_seq_lens_k, len(tokens), len(shared_keys))
        seen = (back >= 0) & (back < (len(shared_keys) if sliding_window is None else sliding_window))
        if softcap or s_aux is not None:
            out = _plain(query.to(value.dtype), k, v, seen, scaling, dropout, softcap, s_aux)
        else:
            out = scaled_dot_product_attention(
                query.to(value.dtype), k, v, attn_mask=seen, dropout_p=dropout, scale=scaling
            )
        return out.transpose(1, 2), None
    starts, ends = cu_seq_lens_q[:-1].to(tokens.dtype), cu_seq_lens_q[1:].to(tokens.dtype)
    sample = torch.bucketize(tokens, ends, right=True)
    rows, width = len(starts), max_length_q
    if rows * width**2 <= len(tokens) ** 2:
        # A row that is longer than its sample goes on into the next one, which no token of the sample sees.
        members = (starts[:, None] + tokens[:width]).clamp(max=len(tokens) - 1).flatten()
        found, apart = sample * width + tokens - starts[sample], None
    else:
        rows, width, members, found = 1, len(tokens), tokens, tokens
        apart = sample[:, None] != sample
    groups = query.shape[1] // key.shape[1]
    keys, values = (each.to(value.dtype).repeat_interleave(groups, dim=1) for each in (key, value))
    q, k, v = (
        each[0].index_select(1, members).view(each.shape[1], rows, width, -1).transpose(0, 1)
        for each in (query.to(value.dtype), keys, values)
    )
    back = tokens[:width, None] - tokens[:width]
    seen = (back >= 0) & (back < (width if sliding_window is None else sliding_window))
    if apart is not None:
        seen = seen & ~apart
    if softcap or s_aux is not None:
        out = _plain(q, k, v, seen, scaling, dropout, softcap, s_aux)
    elif apart is None and (sliding_window is None or sliding_window >= width):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling)
    else:
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, found)[None], None


def _distances(query_bounds: torch.Tensor, key_bounds: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """How many tokens each key lies before each query of its sample, [queries, keys]; -1 where it is of another. The
    last query of a sample belongs to its last key."""
    at, of = (torch.arange(size, device=query_bounds.device) for size in (queries, keys))
    sample, owner = (
        torch.bucketize(each, bounds[1:].to(each.dtype), right=True)
        for each, bounds in ((at, query_bounds), (of, key_bounds))
    )
    before_end, key_before_end = query_bounds[1:][sample] - at, key_bounds[1:][owner] - of
    back = key_before_end - before_end[:, None]
    return torch.where(sample[:, None] == owner, back, -1)


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention [samples, heads, tokens, value size]; `seen` is [tokens, tokens]."""
    logits = (q @ k.transpose(2, 3)).float() * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[None, :, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    shares = logits.softmax(dim=-1)[..., : seen.shape[1]].to(v.dtype)
    return drop(shares, dropout) @ v
