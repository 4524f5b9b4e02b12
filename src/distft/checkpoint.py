"""The final artefacts: saved on rank 0 from what all ranks gathered, read back, and compared tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from distft.errors import InvariantError
from distft.recipe import Recipe
from distft.run import RunFolder
from distft.strategy import Strategy


def save_result(model: Any, recipe: Recipe, strategy: Strategy, folder: RunFolder) -> Path:
    """Save the adapter (or the whole model where there is none) and check what is on disk. All ranks enter.

    Returns:
        The folder written: `adapter/`, which plain PEFT loads, or `model/`, which plain transformers loads.

    Raises:
        InvariantError: what was read back is not what was gathered.
    """
    gathered = strategy.gather(model)
    target = folder.adapter if recipe.lora is not None else folder.model
    if not strategy.world.is_main:
        return target
    if recipe.lora is not None:
        # Embeddings that are trained stand among the gathered; asking for them would reach for the hub.
        expected = get_peft_model_state_dict(model, state_dict=gathered, save_embedding_layers=False)
        model.save_pretrained(str(target), state_dict=gathered, safe_serialization=True, save_embedding_layers=False)
    else:
        dtype = getattr(torch, recipe.model.dtype)
        expected = {name: tensor.to(dtype) for name, tensor in gathered.items()}
        model.save_pretrained(str(target), state_dict=dict(expected), safe_serialization=True)
    if len(expected) != len(gathered):
        raise InvariantError(f"{len(gathered)} tensors were trained, {len(expected)} of them found for saving")
    compare(expected, read_tensors(target))
    return target


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in `folder`."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def compare(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Equal names, types, shapes and bits.

    Raises:
        InvariantError: naming the first tensor that differs.
    """
    if missing := sorted(set(expected) - set(found)):
        raise InvariantError(f"{len(missing)} of {len(expected)} tensors are not in the saved file, {missing[0]} first")
    for name, tensor in expected.items():
        other = found[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape or not torch.equal(tensor.cpu(), other):
            raise InvariantError(f"the saved {name} is not the one that was trained")
