"""Parameter counts for the model FLOPs: what computes, and what computes twice."""

from __future__ import annotations

from typing import Any

from distft.distributed.tensors import whole_numel
from distft.models.activation_checkpointing import layers_of
from distft.models.fused_lora import FusedMLP


def non_embedding_parameters(model: Any) -> int:
    """N in the model FLOPs: all parameters, including the adapter, except the input embeddings; 4-bit ones count
    unpacked."""
    embedding = model.get_input_embeddings()
    skipped = {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set()
    tied = getattr(model.config, "tie_word_embeddings", False)
    return sum(whole_numel(p) for p in model.parameters() if tied or id(p) not in skipped)


def recomputed_parameters(model: Any, *, by_trainer: bool = False) -> int:
    """Parameters whose forward runs a second time in the backward; 4-bit ones count unpacked.

    With `by_trainer`, the trainer checkpoints every layer; otherwise, `set_up_checkpointing` has chosen the layers.
    """
    found = 0
    for layer in layers_of(model):
        if by_trainer or layer.gradient_checkpointing:
            found += _count(layer)
            mlp = getattr(layer, "mlp", None)
            if not by_trainer and isinstance(mlp, FusedMLP) and mlp.ends_checkpoint:
                found -= _count(mlp.down_proj)  # skipped: nothing in the backward needs its output
    return found


def _count(module: Any) -> int:
    return sum(whole_numel(parameter) for parameter in module.parameters())
