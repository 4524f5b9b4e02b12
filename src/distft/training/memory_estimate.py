"""How much memory a recipe takes on a device, before anything is loaded: from the shape of the base model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from distft.config.recipe import Recipe
from distft.distributed.strategies import Strategy, strategy_for
from distft.hardware import GIB
from distft.models.loading import model_path

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FIXED = GIB
"""CUDA kernels, libraries' workspaces and communication buffers."""


@dataclass(frozen=True)
class Shape:
    """What of a base model decides how much memory it takes. `linears` has the name, inputs and outputs of each linear
    layer but the output head; `parameters` counts all, the head and the embeddings too."""

    parameters: int
    linears: tuple[tuple[str, int, int], ...]
    layers: int
    hidden_size: int

    @classmethod
    def of(cls, recipe: Recipe) -> Shape:
        """The shape of the recipe's base, without its weights."""
        section = recipe.model
        config = AutoConfig.from_pretrained(
            model_path(recipe), revision=section.revision, trust_remote_code=section.trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code)
        head = model.get_output_embeddings()
        linears = tuple(
            (name.rsplit(".", 1)[-1], module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        )
        text = config.get_text_config()
        return cls(model.num_parameters(), linears, text.num_hidden_layers, text.hidden_size)

    def adapter(self, lora: dict[str, Any]) -> int:
        """Parameters of a LoRA adapter."""
        targets, rank = lora.get("target_modules"), lora.get("r", 8)
        return sum(rank * (i + o) for name, i, o in self.linears if targets == "all-linear" or name in (targets or ()))


def device_bytes(recipe: Recipe, shape: Shape, strategy: Strategy, micro_batch: int, tokens: int) -> int:
    """About how many bytes training takes on each device, with samples of `tokens` tokens.

    Weights: quantised linear layers take bits / 8 bytes (4-bit ones and their constants 0.516 with double quantisation,
    0.5625 without), all else that of model.dtype; divided by the processes where the strategy shards them, and then two
    whole layers at a time. What is trained: weights, gradients and two AdamW states (of one byte each in an 8-bit
    optimizer, none on the device in a paged one), fp32 for an adapter, model.dtype for a whole model. Activations of a
    layer: 34 bytes a token and hidden unit in 16 bits (Korthikanti et al. 2022, arXiv:2205.05198, section 4.1, without
    attention scores), for every layer, or with activation checkpointing for one, and 2 bytes for the input of each.
    """
    world, width = strategy.world.world_size, _BYTES[recipe.model.dtype]
    linear = sum(i * o for _, i, o in shape.linears)
    double = recipe.quantization is not None and recipe.quantization.bnb_4bit_use_double_quant
    each = {4: 0.516 if double else 0.5625, 8: 1.0, 16: float(width)}[recipe.bits]
    weights = linear * each + (shape.parameters - linear) * width
    if "weights" in strategy.shards:
        weights = weights / world + 2 * weights / max(shape.layers, 1)
    elif recipe.bits == 4:
        weights += max(i * o for _, i, o in shape.linears) * width  # one matrix at a time is unpacked

    optimizer = str(recipe.training.get("optim", ""))
    state = 0 if "paged" in optimizer else 2 if "8bit" in optimizer else None
    if recipe.lora is None:
        # The weights themselves have been counted.
        trained: float = shape.parameters * (width + (2 * width if state is None else state))
    else:
        trained = shape.adapter(recipe.lora) * (8 + (8 if state is None else state))
    if "optimizer" in strategy.shards:
        trained /= world

    units = micro_batch * tokens * shape.hidden_size * width / 2
    checkpointing = recipe.training.get("gradient_checkpointing", True)
    activations = units * (34 + 2 * shape.layers if checkpointing else 34 * shape.layers)
    return int(_FIXED + strategy.buffer_bytes + weights + trained + activations)


def cheaper(
    recipe: Recipe, others: Sequence[Recipe], shape: Shape, strategy: Strategy, tokens: int, room: int
) -> list[tuple[str, int]]:
    """Of `others`, those that would fit into `room` bytes with the base model and the processes of `recipe` at micro-batch
    1 and are cheaper than it, with their bytes; the dearest, which changes least, first."""
    ours = device_bytes(recipe, shape, strategy, 1, tokens)
    sizes = {
        other.source.name: device_bytes(other, shape, strategy_for(other, strategy.world, strategy.on_gpu), 1, tokens)
        for other in others
    }
    fitting = [(name, size) for name, size in sizes.items() if size <= room and size < ours]
    return sorted(fitting, key=lambda pair: -pair[1])
