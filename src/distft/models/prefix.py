"""The first layers of a model, which compute in the way of all its layers in a fraction of the time and the memory."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_PLACES = ("idx", "index", "id", "number")
"""Ends of the names under which a module knows its place among the layers."""


def on_gpu(model: Any) -> Any:
    """`model` itself if it is on a GPU; else a copy there of its embeddings, its first layers, up to one of each kind,
    and its head."""
    if model.get_input_embeddings().weight.is_cuda:
        return model
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.no_grad():
        short = shortened(model).to(device)
    for state in quant_states(short):
        state.to(device)
    return short


def quant_states(model: nn.Module) -> list[Any]:
    """What bitsandbytes needs to unpack the weights of `model`, as far as modules have it.

    In a copied module, it is another object than that of the weight, and does not move with it.
    """
    owned = [vars(module) for module in model.modules()]
    states = [state for values in owned for state in (values.get("quant_state"), *values.get("states", {}).values())]
    return [state for state in states if state is not None]


def shortened(model: Any) -> Any:
    """A copy of `model` with its first layers only, as many as it takes to have one of each kind."""
    with first_layers(model):
        return copy.deepcopy(model)


@contextmanager
def first_layers(model: Any) -> Iterator[None]:
    """`model` with its first layers only, as many as it takes to have one of each kind, for a while."""
    stack = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())
    types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(stack)
    seen: dict[Hashable, int] = {}
    for index, (layer, type_) in enumerate(zip(stack, types, strict=False)):
        seen.setdefault((type_, _kind(layer)), index)
    layers = dict(stack.named_children())
    try:
        for index in range(max(seen.values(), default=0) + 1, len(layers)):
            delattr(stack, str(index))
        yield
    finally:
        for name, layer in layers.items():
            setattr(stack, name, layer)


def _kind(layer: nn.Module) -> Hashable:
    """The modules of a layer, and what they are set to: a window, or whether there are rotary positions."""
    return tuple((type(module), *_settings(module)) for module in layer.modules())


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    values = sorted((name, value) for name, value in vars(module).items() if isinstance(value, bool | int | str))
    return [(name, value) for name, value in values if name.rpartition("_")[2] not in _PLACES]
