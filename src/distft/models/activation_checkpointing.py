"""Activation checkpointing of some layers: which ones are recomputed in the backward, and where their inputs wait.

The layers of transformers call the function that they are given as `_gradient_checkpointing_func`. The recomputation
itself is torch.utils.checkpoint (Chen et al. 2016, arXiv:1604.06174).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from distft import upstream_api
from distft.config.recipe import Recipe
from distft.distributed.collectives import reduce
from distft.distributed.strategies import Strategy
from distft.distributed.tensors import whole_numel
from distft.models.architectures import is_pre_norm
from distft.models.fused_lora import FusedMLP, keeps_int8_products

_RESERVE = 0.10
"""Share of the device memory that `layers_to_checkpoint` leaves free, for fragmentation and errors of its estimate."""
_SMALL = 1 << 16
"""Tensors with fewer elements than this are not worth a copy to the host."""


def set_up_checkpointing(model: Any, recipe: Recipe, strategy: Strategy, tokens: int | None) -> int | None:
    """Set up activation checkpointing for micro-batches of at most `tokens` tokens, if it is done layer by layer.

    With `tokens=None` (unknown, during the search for a micro-batch size) it uses as little memory as possible. All
    ranks enter.

    Returns:
        The number of checkpointed layers, the same on all ranks; None if the trainer does the checkpointing.
    """
    if not strategy.checkpoints_by_layer(recipe):
        return None
    count, offload = recipe.batching.checkpoint_layers, recipe.batching.offload_checkpoints
    if tokens is None:
        count = None
    elif count == "auto":
        count = 0
        if strategy.on_gpu:
            torch.cuda.empty_cache()
            trainable = sum(whole_numel(p) for p in model.parameters() if p.requires_grad)
            not_yet_moved = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_cuda)
            free = torch.cuda.mem_get_info()[0] - not_yet_moved // strategy.world.world_size
            count = layers_to_checkpoint(model, tokens, free, trainable, offload=offload)
        count = int(reduce([count], "max", strategy.world)[0])
    reentrant = keeps_int8_products(model)
    if reentrant:
        model.enable_input_require_grads()
    count = len(layers_of(model)) if count is None else count
    return checkpoint_layers(model, count, offload=offload, reentrant=reentrant)


def layers_of(model: nn.Module) -> list[Any]:
    """The decoder layers that can be checkpointed, first to last."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_layers(model: nn.Module, count: int, *, offload: bool, reentrant: bool = False) -> int:
    """Checkpoint `count` layers of `model`, spread evenly over its depth, and no others; returns their number.

    With `reentrant`, the output of the embeddings must require a gradient. A layer that ends with a fused MLP skips the
    MLP's last product when it is recomputed, because nothing in the backward needs it.
    """
    layers = layers_of(model)
    count = min(count, len(layers))
    chosen = {round((index + 0.5) * len(layers) / count - 0.5) for index in range(count)} if count else set()
    host = HostMemory() if offload else None
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index in chosen
        if index in chosen:
            upstream_api.checkpoint_layer_with(layer, functools.partial(_checkpoint, host, reentrant))
        if is_pre_norm(layer) and isinstance(layer.mlp, FusedMLP):
            layer.mlp.ends_checkpoint = index in chosen
    return len(chosen)


def _checkpoint(host: HostMemory | None, reentrant: bool, function: Callable[..., Any], *args: Any) -> Any:
    if host is None:
        return checkpoint(function, *args, use_reentrant=reentrant)
    with saved_tensors_hooks(host.pack, host.unpack):
        return checkpoint(function, *args, use_reentrant=reentrant)


def layers_to_checkpoint(model: Any, tokens: int, free: int, trainable: int, *, offload: bool = False) -> int:
    """The smallest number of layers to checkpoint for a micro-batch of `tokens` tokens to fit into `free` bytes.

    The estimate, in the dtype of the base model: a layer keeps its input, queries, keys, values, attention output, the
    input of its MLP, and gate and up. A checkpointed layer keeps only its input (nothing with `offload`), but one of
    them at a time holds everything and its gradients. Each of the `trainable` parameters takes 12 bytes, for its
    gradient and AdamW's two states, and the head's tile of logits 0.5 GiB.
    """
    config, layers = model.config.get_text_config(), len(layers_of(model))
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * (config.num_key_value_heads or config.num_attention_heads)
    size = torch.finfo(config.dtype or torch.bfloat16).bits // 8
    kept = tokens * size * (2 * hidden + 2 * queries + 2 * keys + 2 * inner)
    checkpointed = 0 if offload else tokens * size * hidden
    left = free * (1 - _RESERVE) - 12 * trainable - (1 << 29) - tokens * size * (3 * inner + 4 * hidden)
    for count in range(layers):
        if (layers - count) * kept + count * checkpointed + (kept if count else 0) <= left:
            return count
    return layers


@dataclass
class _Parked:
    """A tensor in host memory, linked to the one that was parked before it."""

    host: torch.Tensor
    device: torch.device
    before: _Parked | None
    back: Any = None
    event: Any = None


class HostMemory:
    """Saved-tensor hooks that park tensors of the forward in pinned host memory until the backward needs them.

    Both copies overlap with computation: while the backward works on one layer, the tensor of the layer before it
    returns.
    """

    def __init__(self) -> None:
        self._stream: Any = None
        self._last: _Parked | None = None

    def pack(self, tensor: torch.Tensor) -> Any:
        if not tensor.is_cuda or tensor.numel() < _SMALL:
            return tensor
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        self._last = _Parked(host, tensor.device, self._last)
        return self._last

    def unpack(self, parked: Any) -> torch.Tensor:
        if isinstance(parked, torch.Tensor):
            return parked
        self._fetch(parked)
        current = torch.cuda.current_stream(parked.device)
        current.wait_event(parked.event)
        tensor: torch.Tensor = parked.back
        parked.back = None
        tensor.record_stream(current)
        self._last = parked.before
        if parked.before is not None:
            self._fetch(parked.before)
        return tensor

    def _fetch(self, parked: _Parked) -> None:
        if parked.back is None:
            with torch.cuda.stream(self._stream):
                parked.back = parked.host.to(parked.device, non_blocking=True)
                parked.event = self._stream.record_event()
