"""Parameter counts for the model FLOPs: what computes for a token, and what computes twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft.tuners.lora import ParamWrapper

from distft.distributed.tensors import whole_numel
from distft.models.activation_checkpointing import layers_of
from distft.models.experts import expert_weights
from distft.models.fused_lora import FusedMLP

_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "experts_per_token", "top_k_experts")
"""Names that configurations have for the number of experts of a token."""


def non_embedding_parameters(model: Any) -> int:
    """N in the model FLOPs: all parameters, including the adapter, except the input embeddings; 4-bit ones count
    unpacked, and of experts those that a token has."""
    embedding = model.get_input_embeddings()
    skipped = {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set()
    tied = getattr(model.config, "tie_word_embeddings", False)
    shares = _shares(model, model.config)
    return _count((p for p in model.parameters() if tied or id(p) not in skipped), shares)


def recomputed_parameters(model: Any, *, by_trainer: bool = False) -> int:
    """Parameters whose forward runs a second time in the backward; 4-bit ones count unpacked.

    With `by_trainer`, the trainer checkpoints every layer; otherwise, `set_up_checkpointing` has chosen the layers.
    """
    found, shares = 0, _shares(model, model.config)
    for layer in layers_of(model):
        if by_trainer or layer.gradient_checkpointing:
            found += _count(layer.parameters(), shares)
            mlp = getattr(layer, "mlp", None)
            if not by_trainer and isinstance(mlp, FusedMLP) and mlp.ends_checkpoint:
                skipped: Any = mlp.down_proj  # nothing in the backward needs its output
                found -= _count(skipped.parameters(), shares)
    return found


def _count(parameters: Iterable[Any], shares: Mapping[int, float]) -> int:
    return round(sum(whole_numel(parameter) * shares.get(id(parameter), 1.0) for parameter in parameters))


def _shares(model: Any, config: Any) -> dict[int, float]:
    """By the id of each parameter of experts and their adapters, the share of the experts that a token has."""
    text = config.get_text_config()
    chosen: Any = next((value for name in _CHOSEN if isinstance(value := getattr(text, name, None), int)), None)
    found: dict[int, float] = {}
    modules: Iterable[Any] = model.modules() if chosen else ()
    for module in modules:
        number: Any = getattr(module, "num_experts", None)
        if expert_weights(module):
            parameters = module.parameters(recurse=False)
        elif isinstance(module, ParamWrapper) and number > 1:
            parameters = (p for part in (module.lora_A, module.lora_B) for p in part.parameters())
        else:
            continue
        found |= {id(parameter): min(chosen / number, 1.0) for parameter in parameters}
    return found
