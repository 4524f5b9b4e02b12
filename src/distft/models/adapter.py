"""The LoRA adapter: how it is put on a base model, and in which type it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from distft.config.recipe import Recipe
from distft.distributed.strategies import Strategy
from distft.models.embeddings import train_new_rows
from distft.models.experts import adapt_experts, fuse_experts, seen_dense
from distft.models.fused_lora import fuse
from distft.models.targets import unsuitable, without_unsuitable


def add_adapter(
    base: Any, recipe: Recipe, strategy: Strategy, *, known_rows: int, new_tokens: Sequence[int] = ()
) -> Any:
    """`base` with the recipe's LoRA adapter, fused unless the recipe or the strategy rules that out.

    Rows of the embeddings from `known_rows` on, and those of `new_tokens`, are new, and are trained with the adapter.
    """
    assert recipe.lora is not None
    set_seed(recipe.run.seed)  # loading the base may have drawn random numbers on some ranks and not on others
    lora = without_unsuitable(train_new_rows(recipe.lora, base, known_rows, new_tokens), base)
    config = LoraConfig(task_type="CAUSAL_LM", **lora)
    with seen_dense(base):
        model = get_peft_model(base, config, autocast_adapter_dtype=not strategy.keeps_adapter_in_base_dtype(recipe))
    head = model.get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        head.bias = None  # PEFT's wrapper for single rows has none, and TRL's fused head reads it
    if recipe.model.kernels == "auto" and not strategy.gathers_in_submodules:
        fuse(model)
        if recipe.model.experts_implementation == "auto":
            fuse_experts(model)
    adapt_experts(model)
    return model


def trained_values(model: Any) -> list[tuple[Any, torch.Tensor]]:
    """The trainable parameters with the values that they have now."""
    return [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]


def keep_adapter_in_fp32(
    model: Any, recipe: Recipe, strategy: Strategy, exact: Sequence[tuple[Any, torch.Tensor]] = ()
) -> None:
    """Cast the trainable parameters to fp32 master weights, after TRL has cast them to bf16 for a quantised base.
    Those in `exact`, from before that, have their values back: a saved adapter is not rounded.

    bf16 rounds away updates smaller than 1/256 of a weight, and fp16's loss scaler cannot handle bf16 gradients at all.
    Products are computed in the type of the base either way (by the fused nodes, or under autocast), so fp32 costs no
    time. With AdamW, it costs 12 more bytes per parameter of the adapter.
    """
    if recipe.lora is None or strategy.keeps_adapter_in_base_dtype(recipe):
        return
    for parameter, value in exact:
        parameter.data = value.to(parameter.device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def modules_left_out(model: Any, recipe: Recipe) -> list[str]:
    """Ends of the names of linears that all-linear means and that cannot have an adapter."""
    wants_all = recipe.lora is not None and recipe.lora.get("target_modules") == "all-linear"
    return unsuitable(model.get_base_model()) if wants_all else []


def freeze_adapters(model: Any, ends: Sequence[str], dtype: torch.dtype) -> None:
    """Train no adapter on modules whose names end so, and keep it in `dtype` as other frozen weights. Its B stays zero,
    and DDP does not wait for its gradient."""
    for name, parameter in model.named_parameters():
        module, adapter, _ = name.partition(".lora_")
        if adapter and module.rpartition(".")[2] in ends:
            parameter.requires_grad_(False).data = parameter.data.to(dtype)
