"""A short copy of a model that is too large, or in the wrong place, to be computed whole."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def on_gpu(model: Any) -> Any:
    """`model` itself if it is on a GPU; else a copy there of its embeddings, its first layers, up to one of each kind,
    and its head."""
    if model.get_input_embeddings().weight.is_cuda:
        return model
    with torch.no_grad():
        return shortened(model).to(torch.device("cuda", torch.cuda.current_device()))


def shortened(model: Any) -> Any:
    """A copy of `model` with its first layers only, as many as it takes to have one of each kind."""
    stack = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=None)
    if stack is None:
        return copy.deepcopy(model)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(stack)
    seen: dict[Any, int] = {}
    for index, (layer, kind) in enumerate(zip(stack, kinds, strict=False)):
        seen.setdefault((kind, tuple(type(module) for module in layer.modules())), index)
    layers = dict(stack.named_children())
    try:
        for index in range(max(seen.values()) + 1, len(layers)):
            delattr(stack, str(index))
        return copy.deepcopy(model)
    finally:
        for name, layer in layers.items():
            setattr(stack, name, layer)
