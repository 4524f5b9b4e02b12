"""Activation checkpointing as a dial: of how many layers the activations are made again in the backward, and whether what is
kept of them, their inputs, waits in host memory meanwhile.

transformers' layers call what we give them as `_gradient_checkpointing_func`; the recomputation itself is
torch.utils.checkpoint (Chen et al. 2016, arXiv:1604.06174).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from distft import upstream_api

_PRE_NORM = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_RESERVE = 0.10
"""Share of a device's memory that `layers_to_checkpoint` leaves free: fragments, and what the estimate does not know."""


def layers_of(model: nn.Module) -> list[Any]:
    """The decoder layers that can be checkpointed, first to last."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_layers(model: nn.Module, count: int, *, offload: bool, reentrant: bool = False) -> int:
    """Checkpoint `count` layers of `model`, evenly spread over its depth, and no other. Returns how many there are. With
    `reentrant` the embeddings' output has to require a gradient.

    Where a layer ends with its MLP, the MLP's last product is left out when the layer is computed again: nothing in the
    backward looks at it.
    """
    layers = layers_of(model)
    count = min(count, len(layers))
    chosen = {round((index + 0.5) * len(layers) / count - 0.5) for index in range(count)} if count else set()
    keeper = HostMemory() if offload else None
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index in chosen
        if index in chosen:
            upstream_api.checkpoint_layer_with(layer, functools.partial(_checkpoint, keeper, reentrant))
            if is_pre_norm(layer):
                layer.mlp.output_ends_checkpoint = True
    return len(chosen)


def is_pre_norm(layer: nn.Module) -> bool:
    """Whether a layer is x += attention(norm(x)); x += mlp(norm(x)) and nothing else, by the modules that its forward names."""
    if not isinstance(layer, GradientCheckpointingLayer):
        return False
    names = inspect.unwrap(type(layer).forward).__code__.co_names
    return {name for name in names if isinstance(getattr(layer, name, None), nn.Module)} == _PRE_NORM


def _checkpoint(keeper: HostMemory | None, reentrant: bool, function: Callable[..., Any], *args: Any) -> Any:
    if keeper is None:
        return checkpoint(function, *args, use_reentrant=reentrant)
    with saved_tensors_hooks(keeper.put, keeper.get):
        return checkpoint(function, *args, use_reentrant=reentrant)


def recomputing() -> bool:
    """Whether a forward runs within a backward, as a checkpointed layer's second one does."""
    return upstream_api.in_backward()


@dataclass
class _Parked:
    host: torch.Tensor
    device: torch.device
    before: _Parked | None
    back: Any = None
    event: Any = None


class HostMemory:
    """Tensors of the forward that wait in pinned host memory for the backward. Both copies run beside the computation: one is
    brought back while the layer after it is being worked on."""

    def __init__(self) -> None:
        self._stream: Any = None
        self._last: _Parked | None = None

    def put(self, tensor: torch.Tensor) -> Any:
        if not tensor.is_cuda or tensor.numel() < 1 << 16:
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

    def get(self, parked: Any) -> torch.Tensor:
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


def layers_to_checkpoint(model: Any, tokens: int, free: int, trainable: int, *, offload: bool = False) -> int:
    """The fewest layers to checkpoint with which a micro-batch of `tokens` fits into `free` bytes beside what is loaded.

    A layer keeps, in the base's type, its input, queries, keys, values, attention output, the input of its MLP, and gate and
    up; a checkpointed one its input (on the host with `offload`), and one of them at a time all of it and its gradients. The
    adapter's gradients and AdamW's two states take 12 bytes a trainable parameter, the head's tile of logits 0.5 GiB.
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
