"""Estimate the memory that a recipe takes on a device from the shape of its base model, without loading it."""

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
from distft.models.experts import expert_weights
from distft.models.loading import model_path

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FIXED = GIB
"""CUDA kernels, workspaces of libraries, and communication buffers."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a base model that decide its memory.

    `linears` has the name, inputs and outputs of every linear layer except the output head, and `experts` the name,
    number, rows and columns of every weight of experts. `parameters` counts all, including the head and the embeddings.
    """

    parameters: int
    linears: tuple[tuple[str, int, int], ...]
    layers: int
    hidden_size: int
    experts: tuple[tuple[str, int, int, int], ...] = ()

    @classmethod
    def of(cls, recipe: Recipe) -> Shape:
        """Build the recipe's base model without weights, and measure it."""
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
        experts = tuple(
            (name, *weight.shape) for module in model.modules() for name, weight in expert_weights(module).items()
        )
        text = config.get_text_config()
        return cls(model.num_parameters(), linears, text.num_hidden_layers, text.hidden_size, experts)

    def adapter(self, lora: dict[str, Any]) -> int:
        """Return the number of parameters of a LoRA adapter."""
        targets, rank = lora.get("target_modules"), lora.get("r", 8)
        linears: int = sum(
            rank * (i + o) for name, i, o in self.linears if targets == "all-linear" or name in (targets or ())
        )
        named = {target.rpartition(".")[2] for target in lora.get("target_parameters") or ()}
        of_experts: int = sum(number * rank * (i + o) for name, number, i, o in self.experts if name in named)
        return linears + of_experts


def device_bytes(recipe: Recipe, shape: Shape, strategy: Strategy, micro_batch: int, tokens: int) -> int:
    """Estimate the bytes that training takes on each device, with samples of `tokens` tokens.

    - Weights: quantised linear layers take bits / 8 bytes (with constants, 0.516 in 4 bits with double quantisation and
      0.5625 without), everything else the size of `model.dtype`. A strategy that shards them divides this by the number
      of processes and holds two whole layers at a time.
    - Trained tensors: weights, gradients and two AdamW states (one byte each in an 8-bit optimizer, none on the device
      in a paged one), in fp32, or in 16 bits for a whole model that trains without mixed precision.
    - Activations: 34 bytes per token, hidden unit and layer in 16 bits (Korthikanti et al. 2022, arXiv:2205.05198,
      section 4.1, without attention scores). With activation checkpointing, this applies to one layer, plus 2 bytes for
      the input of each.
    """
    world, width = strategy.world.world_size, _BYTES[recipe.model.dtype]
    if recipe.lora is None and not recipe.updates_16_bits:
        width = 4
    matrices = [i * o for _, i, o in shape.linears]
    if recipe.quantization is not None and recipe.quantization.experts and recipe.bits == 4:
        matrices += [number * i * o for _, number, i, o in shape.experts]
    linear = sum(matrices)
    double = recipe.quantization is not None and recipe.quantization.bnb_4bit_use_double_quant
    each = {4: 0.516 if double else 0.5625, 8: 1.0, 16: float(width)}[recipe.bits]
    weights = linear * each + (shape.parameters - linear) * width
    if "weights" in strategy.shards:
        weights = weights / world + 2 * weights / max(shape.layers, 1)
    elif recipe.bits == 4:
        weights += max(matrices) * width  # one weight at a time is unpacked

    optimizer = str(recipe.training.get("optim", ""))
    state = 0 if "paged" in optimizer else 2 if "8bit" in optimizer else None
    if recipe.lora is None:
        # The weights themselves have been counted.
        trained: float = shape.parameters * (width + (2 * width if state is None else state))
    else:
        trained = shape.adapter(recipe.lora) * (8 + (8 if state is None else state))
    if "optimizer" in strategy.shards:
        trained /= world

    units = micro_batch * tokens * shape.hidden_size * _BYTES[recipe.model.dtype] / 2
    checkpointing = recipe.training.get("gradient_checkpointing", True)
    activations = units * (34 + 2 * shape.layers if checkpointing else 34 * shape.layers)
    return int(_FIXED + strategy.buffer_bytes + weights + trained + activations)


def cheaper(
    recipe: Recipe, others: Sequence[Recipe], shape: Shape, strategy: Strategy, tokens: int, room: int
) -> list[tuple[str, int]]:
    """Return which of `others` take less memory than `recipe` and fit into `room` bytes, with their bytes.

    All are estimated at micro-batch 1, with the base model and the processes of `recipe`. The largest comes first,
    because it changes least.
    """
    ours = device_bytes(recipe, shape, strategy, 1, tokens)
    sizes = {
        other.source.name: device_bytes(other, shape, strategy_for(other, strategy.world, strategy.on_gpu), 1, tokens)
        for other in others
    }
    fitting = [(name, size) for name, size in sizes.items() if size <= room and size < ours]
    return sorted(fitting, key=lambda pair: -pair[1])
