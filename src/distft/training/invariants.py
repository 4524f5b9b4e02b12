"""What every run proves about its model: that it is what the recipe asks for, and that an update moves it.

All ranks must call these functions. If one rank finds a fault, all ranks raise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch
from torch import nn

from distft.config.recipe import Recipe
from distft.distributed.collectives import first_failure, gather
from distft.distributed.strategies import Strategy
from distft.distributed.tensors import (
    checksum,
    is_packed,
    is_partitioned,
    local_part,
    whole_numel,
    whole_tensors,
)
from distft.errors import InvariantError
from distft.text import count

_LAYER = re.compile(r".*?\.\d+(?=\.)")
"""The layer that a parameter is in, at the beginning of its name."""


def check_prepared(model: nn.Module, recipe: Recipe, strategy: Strategy, trainable: int) -> None:
    """Check, before step 1, that the model is what the recipe asks for and has `trainable` trainable parameters.

    Raises:
        InvariantError: on every rank, with what the lowest failing rank has found.
    """
    _raise_everywhere(_prepared_fault(model, recipe, strategy, trainable), strategy)


def _prepared_fault(model: nn.Module, recipe: Recipe, strategy: Strategy, trainable: int) -> str | None:
    found = 0
    allowed = {getattr(torch, recipe.model.dtype)} | strategy.cast_dtypes(recipe)
    offloads = strategy.offloads_parameters(os.environ)
    for name, parameter in model.named_parameters():
        found += whole_numel(parameter) if parameter.requires_grad else 0
        if parameter.is_meta:
            return f"parameter {name} is on the meta device: its weights were never loaded"
        if fault := strategy.parameter_fault(name, parameter):
            return fault
        if strategy.on_gpu and parameter.device.type == "cpu" and not (offloads or is_partitioned(parameter)):
            return f"parameter {name} is on the CPU, and this run trains on a GPU"
        if (
            not parameter.requires_grad
            and parameter.is_floating_point()
            and not is_packed(parameter)
            and parameter.dtype not in allowed
        ):
            return f"parameter {name} is {parameter.dtype}; the recipe's model.dtype is {recipe.model.dtype}"
    if found != trainable:
        return f"{found:,} parameters are trainable; the adapter (or model) has {trainable:,}"
    return None


def packed_checksums(model: nn.Module) -> dict[str, int]:
    """Return a checksum of the bits of every weight that is packed in 4 bits in the first layer that has some.

    Weights that ZeRO-3 has partitioned already are left out.
    """
    whole = ((name, parameter) for name, parameter in model.named_parameters() if not is_partitioned(parameter))
    packed = {name: parameter for name, parameter in whole if is_packed(parameter)}
    layer = next((found[0] for name in packed if (found := _LAYER.match(name))), None)
    return {name: checksum(tensor) for name, tensor in packed.items() if layer and name.startswith(f"{layer}.")}


def check_packed(model: nn.Module, strategy: Strategy, before: Mapping[str, int]) -> None:
    """Check that the layer whose packed weights had these checksums computes with the same bits. All ranks enter.

    Weights are sharded, gathered and cast as numbers, which packed ones are not.

    Raises:
        InvariantError: on every rank.
    """
    fault = None
    if before:
        modules = {_own_name(name): module for name, module in model.named_modules()}
        (layer,) = {found[0] for name in before if (found := _LAYER.match(name))}
        with strategy.gathered(modules[layer]):
            parameters = {_own_name(f"{layer}.{name}"): each for name, each in modules[layer].named_parameters()}
            left = {name: parameters[name] for name in before if not is_partitioned(parameters[name])}
            changed = [name for name, each in left.items() if checksum(local_part(each)) != before[name]]
        if changed:
            number = count(len(changed), "packed weight")
            fault = f"preparing the model for {strategy.title} has changed the bits of {number}, {changed[0]} first"
    _raise_everywhere(fault, strategy)


def _own_name(name: str) -> str:
    """The name without what wrappers of the model add."""
    return name.removeprefix("module.").replace("_orig_mod.", "")


def fingerprint(model: nn.Module) -> dict[str, int]:
    """Return a checksum of the bits of every trainable tensor, gathered if it is sharded."""
    return {name: checksum(tensor) for name, tensor in whole_tensors(model)}


def check_updated(model: nn.Module, strategy: Strategy, before: Mapping[str, int], learning_rate: float) -> None:
    """Check, after the first update with a learning rate above zero, that the adapter moved, and alike on all ranks.

    Raises:
        InvariantError: on every rank.
    """
    after = fingerprint(model)
    watched = [name for name in after if "lora_B" in name] or list(after)
    fault = None
    if all(before[name] == after[name] for name in watched):
        fault = (
            f"no trainable tensor moved in an update with learning rate {learning_rate:g}: "
            f"no gradient reaches {watched[0]}"
        )
    _raise_everywhere(fault, strategy)
    for rank, other in enumerate(gather(after, strategy.world)):
        differing = next((name for name in after if other[name] != after[name]), None)
        if differing is not None:
            fault = f"{differing} differs between rank {strategy.world.rank} and rank {rank} after one update"
    _raise_everywhere(fault, strategy)


def _raise_everywhere(fault: str | None, strategy: Strategy) -> None:
    first = first_failure(fault, strategy.world)
    if first is not None:
        rank, text = first
        raise InvariantError(
            f"{text} (rank {rank}, strategy {strategy.name}); the run was stopped before it could waste time"
        )
