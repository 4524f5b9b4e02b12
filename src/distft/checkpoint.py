"""Checkpoints that verify, and the final artefacts: saved on rank 0 from what all ranks gathered, read back, compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import distributed
from transformers import TrainerCallback

from distft import manifest
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


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Closes each checkpoint of the trainer with a manifest, once all ranks have written their part, and retires old ones.

    Reading the files back for their hashes goes on beside the training, and is over before the next save and the last step.
    `carried()` gives the facts that a resumed run needs and the trainer does not keep.
    """

    def __init__(
        self, folder: RunFolder, strategy: Strategy, keep: int | None, carried: Callable[[], dict[str, Any]]
    ) -> None:
        self._folder, self._strategy, self._keep, self._carried = folder, strategy, keep, carried
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="distft-manifest")
        self._closing: Future[None] | None = None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        world = self._strategy.world
        if world.world_size > 1:
            distributed.barrier()
        if world.is_main:
            self._settle()
            facts = {
                "step": state.global_step, "epoch": state.epoch, "world_size": world.world_size,
                "format": self._strategy.checkpoint_format, "carried": self._carried(),
            }  # fmt: skip
            self._closing = self._beside.submit(self._close, state.global_step, facts)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._settle()

    def _close(self, step: int, facts: Mapping[str, Any]) -> None:
        manifest.write(self._folder.checkpoints / f"checkpoint-{step}", facts)
        manifest.retire(self._folder.checkpoints, self._keep)

    def _settle(self) -> None:
        """Wait for the last checkpoint to be closed; what went wrong there is raised here."""
        if self._closing is not None:
            self._closing.result()
            self._closing = None
