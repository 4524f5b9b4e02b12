"""Checkpoints that verify, and the final artefacts: saved on rank 0 from what all ranks gathered, read back, compared."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerCallback

from distft.config.recipe import Recipe
from distft.console import say
from distft.distributed.collectives import first_failure, together
from distft.distributed.strategies import Strategy
from distft.errors import InvariantError, StorageError
from distft.files import disk_full_reason, free_space
from distft.runs import manifest
from distft.runs.folder import RunFolder


def save_result(model: Any, recipe: Recipe, strategy: Strategy, folder: RunFolder) -> Path:
    """Save the adapter (or the whole model where there is none) and check what is on disk. All ranks enter.

    Returns:
        The folder written: `adapter/`, which plain PEFT loads, or `model/`, which plain transformers loads.

    Raises:
        InvariantError: what was read back is not what was gathered.
        StorageError: the disk is full.
    """
    gathered = strategy.gather(model)
    target = folder.adapter if recipe.lora is not None else folder.model
    together(strategy.world, lambda: _write(model, gathered, recipe, target) if strategy.world.is_main else None)
    return target


def _write(model: Any, gathered: Mapping[str, torch.Tensor], recipe: Recipe, target: Path) -> None:
    needed = sum(tensor.nbytes for tensor in gathered.values())
    try:
        expected = _save(model, gathered, recipe, target)
    except Exception as error:  # each library has its own
        why = disk_full_reason(error)
        if why is None:
            raise
        shutil.rmtree(target, ignore_errors=True)
        raise StorageError(
            f"training is done, but its result cannot be saved: {why}; {free_space(target.parent, needed)}. "
            "Free some space and give the same command: it goes on from the last checkpoint"
        ) from error
    if len(expected) != len(gathered):
        raise InvariantError(f"{len(gathered)} tensors were trained, {len(expected)} of them found for saving")
    compare(expected, read_tensors(target))


def _save(model: Any, gathered: Mapping[str, torch.Tensor], recipe: Recipe, target: Path) -> Mapping[str, torch.Tensor]:
    """Write the result to `target` and return what should now stand there."""
    if recipe.lora is not None:
        # Embeddings that are trained stand among the gathered; asking for them would reach for the hub.
        expected = get_peft_model_state_dict(model, state_dict=gathered, save_embedding_layers=False)
        model.save_pretrained(str(target), state_dict=gathered, safe_serialization=True, save_embedding_layers=False)
    else:
        dtype = getattr(torch, recipe.model.dtype)
        expected = {name: tensor.to(dtype) for name, tensor in gathered.items()}
        model.save_pretrained(str(target), state_dict=dict(expected), safe_serialization=True)
    return dict(expected)


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
    """Saves checkpoints that are whole or none: the trainer's files of all ranks, then a manifest; then old ones are retired.

    Reading the files back for their hashes goes on beside the training, and is over before the next save and the last step.
    Where the disk is full no file of the new one stays, the older ones are left alone, and the run goes on to its next
    save. `last` is the step of the newest that was written. `carried()` gives the facts that a resumed run needs and the
    trainer does not keep.
    """

    def __init__(
        self, folder: RunFolder, strategy: Strategy, keep: int | None, carried: Callable[[], dict[str, Any]]
    ) -> None:
        self._folder, self._strategy, self._keep, self._carried = folder, strategy, keep, carried
        self.last: int | None = None
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="distft-manifest")
        self._closing: tuple[int, int, Future[None]] | None = None

    def save(self, state: Any, model: Any, optimizer: Any, write: Callable[[], None]) -> None:
        """Save what `write` writes as the checkpoint of the trainer's `state`. All ranks enter."""
        self._settle()
        step, parent, world = state.global_step, self._folder.checkpoints, self._strategy.world
        needed = self._strategy.checkpoint_bytes(model, optimizer)

        def reserve() -> None:
            if world.is_main:
                parent.mkdir(exist_ok=True)
                if shutil.disk_usage(parent).free < needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        # No rank that fails leaves the others waiting in the next.
        fault = self._anywhere(reserve) or self._anywhere(write)
        if fault is None:
            self.last = step
        if not world.is_main:
            return
        if fault is not None:
            self._give_up(step, fault, needed)
            return
        facts = {
            "step": step, "epoch": state.epoch, "world_size": world.world_size, "format": self._strategy.checkpoint_format,
            "carried": self._carried(),
        }  # fmt: skip
        self._closing = step, needed, self._beside.submit(self._close, step, facts)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._settle()

    def _close(self, step: int, facts: Mapping[str, Any]) -> None:
        manifest.write(self._folder.checkpoints / f"checkpoint-{step}", facts)
        manifest.retire(self._folder.checkpoints, self._keep)

    def _settle(self) -> None:
        """Wait for the last checkpoint to be closed; what went wrong there is raised here, unless the disk was full."""
        if self._closing is None:
            return
        (step, needed, closing), self._closing = self._closing, None
        try:
            closing.result()
        except OSError as error:
            why = disk_full_reason(error)
            if why is None:
                raise
            self._give_up(step, why, needed)

    def _give_up(self, step: int, why: str, needed: int) -> None:
        """Remove what has been written of a checkpoint of `needed` bytes, and say so."""
        target = self._folder.checkpoints / f"checkpoint-{step}"
        shutil.rmtree(target, ignore_errors=True)
        good, _ = manifest.newest(self._folder.checkpoints)
        kept = f"The last good one is {good.name}" if good else "There is no other one"
        say(
            f"warning: {target.name} was not saved: {why}; {free_space(target.parent, needed)}. {kept}. Free some space; the run goes on, and the next save tries again"
        )

    def _anywhere(self, part: Callable[[], None]) -> str | None:
        """Do `part` on every rank; where the disk was full on any, how the first of them put it, on all."""
        fault: str | None = None
        try:
            part()
        except (Exception, CheckpointException) as error:  # each library has its own, and torch's is no Exception
            why = disk_full_reason(error)
            if why is None or not self._strategy.meets_after_failed_write:
                raise
            fault = why
        first = first_failure(fault, self._strategy.world)
        return None if first is None else f"{first[1]} (rank {first[0]})"
