"""Checkpoints with a manifest, and the final result: gathered from all ranks, saved, read back and compared."""

from __future__ import annotations

import errno
import json
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
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import CONFIG_NAME

from distft.config.recipe import Recipe
from distft.console import say
from distft.distributed.collectives import first_failure, together
from distft.distributed.strategies import Strategy
from distft.errors import InvariantError, StorageError
from distft.files import disk_full_reason, free_space, share, to_json, write_atomically
from distft.models.generation import save_stop_tokens
from distft.runs import manifest
from distft.runs.folder import RunFolder
from distft.training.best_model import BestModel


def save_result(
    model: Any,
    recipe: Recipe,
    strategy: Strategy,
    folder: RunFolder,
    *,
    tokenizer: Any = None,
) -> Path:
    """Save the adapter, or the whole model if there is none, and check what is on disk. All ranks enter.

    Saves the `tokenizer`, including its chat template, and the model's stop tokens in the same folder.

    Returns:
        The folder: `adapter/`, which PEFT loads, or `model/`, which transformers loads.

    Raises:
        InvariantError: what was read back differs from what was gathered.
        StorageError: the disk is full.
    """
    gathered = strategy.gather(model)
    target = folder.adapter if recipe.lora is not None else folder.model

    def write() -> None:
        if strategy.world.is_main:
            _write(model, gathered, recipe, target)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(target))
                save_stop_tokens(model, target)
            share(target)

    together(strategy.world, write)
    return target


def _write(model: Any, gathered: Mapping[str, torch.Tensor], recipe: Recipe, target: Path) -> None:
    needed = sum(tensor.nbytes for tensor in gathered.values())
    try:
        expected = _save(model, gathered, recipe, target)
    except Exception as error:  # each library raises its own
        why = disk_full_reason(error)
        if why is None:
            raise
        shutil.rmtree(target, ignore_errors=True)
        raise StorageError(
            f"training has finished, but its result cannot be saved: {why}; {free_space(target.parent, needed)}. "
            "Free some space and run the same command again: it resumes from the last checkpoint"
        ) from error
    saved = len({tensor.data_ptr() for tensor in expected.values()})  # one may be saved under several names
    if saved != len(gathered):
        raise InvariantError(f"{len(gathered)} tensors were trained, but only {saved} would be saved")
    if recipe.lora is None:  # transformers saves some models under the names of the hub, and experts one by one
        expected = revert_weight_conversion(model, dict(expected))
    compare(expected, read_tensors(target))


def _save(model: Any, gathered: Mapping[str, torch.Tensor], recipe: Recipe, target: Path) -> Mapping[str, torch.Tensor]:
    """Write the result to `target` and return the tensors that the files should now hold."""
    if recipe.lora is not None:
        gathered = _under_all_names(model, gathered)
        # Trained embeddings are among the gathered tensors; saving them by this option would query the hub.
        expected = get_peft_model_state_dict(model, state_dict=gathered, save_embedding_layers=False)
        model.save_pretrained(str(target), state_dict=gathered, safe_serialization=True, save_embedding_layers=False)
    else:
        dtype = getattr(torch, recipe.model.dtype)
        expected = {name: tensor.to(dtype) for name, tensor in gathered.items()}
        model.save_pretrained(str(target), state_dict=dict(expected), safe_serialization=True)
        config = target / CONFIG_NAME  # names the type of the weights in memory
        write_atomically(
            config, to_json(json.loads(config.read_text(encoding="utf-8")) | {"dtype": recipe.model.dtype})
        )
    return dict(expected)


def _under_all_names(model: Any, gathered: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """`gathered`, which has a shared parameter once, with the other names that the parameter has.

    PEFT expects an output head that is tied to trained embeddings (`ensure_weight_tying`) under its own name.
    """
    first: dict[int, str] = {}
    names = [(first.setdefault(id(p), name), name) for name, p in model.named_parameters(remove_duplicate=False)]
    return {name: gathered[owner] for owner, name in names if owner in gathered}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of the safetensors files in `folder`."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def compare(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Check that two sets of tensors have the same names, types, shapes and bits.

    Raises:
        InvariantError: names the first tensor that differs.
    """
    if missing := sorted(set(expected) - set(found)):
        raise InvariantError(f"{len(missing)} of {len(expected)} tensors are not in the saved file, {missing[0]} first")
    for name, tensor in expected.items():
        other = found[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape or not torch.equal(tensor.cpu(), other):
            raise InvariantError(f"the saved {name} is not the one that was trained")


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Saves complete checkpoints only: the trainer's files of all ranks, then a manifest; then deletes old checkpoints.

    A thread reads the files back for their hashes while training continues; it finishes before the next save and before
    training ends. If the disk is full, the new checkpoint's files are removed, older ones are kept, and the run
    continues to its next save. `last` is the step of the newest checkpoint. `carried()` returns what a resumed run
    needs and the trainer does not save. The checkpoint of the `best` model is kept.
    """

    def __init__(
        self,
        folder: RunFolder,
        strategy: Strategy,
        keep: int | None,
        carried: Callable[[], dict[str, Any]],
        best: BestModel,
    ) -> None:
        self._folder, self._strategy, self._keep, self._carried, self._best = folder, strategy, keep, carried, best
        self.last: int | None = None
        self._saved: tuple[Any, ...] | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="distft-manifest")
        # Step, bytes and, on rank 0, the thread's work.
        self._closing: tuple[int, int, Future[None] | None] | None = None

    def save(self, state: Any, model: Any, optimizer: Any, write: Callable[[], None]) -> None:
        """Save the files that `write` creates as the checkpoint of the trainer's `state`. All ranks enter."""
        self._settle(state)
        step, parent, world = state.global_step, self._folder.checkpoints, self._strategy.world
        contents = (step, state.best_metric, self._best.carried())
        if self._saved == contents:
            return  # at the end of an epoch whose last step was saved: a kill in the second write would damage it
        needed = self._strategy.checkpoint_bytes(model, optimizer)

        def reserve() -> None:
            if world.is_main:
                parent.mkdir(exist_ok=True)
                if shutil.disk_usage(parent).free < needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        # A rank that fails must not leave the others waiting in the next collective.
        fault = self._anywhere(reserve) or self._anywhere(write)
        if fault is not None:
            self._give_up(step, fault, needed, state)
            return
        self.last, self._saved = step, contents
        self._closing = step, needed, None
        if not world.is_main:
            return
        facts = {
            "step": step,
            "epoch": state.epoch,
            "world_size": world.world_size,
            "format": self._strategy.checkpoint_format,
            "carried": self._carried(),
            "best_step": state.best_global_step if self._best.loads else None,
        }
        self._closing = step, needed, self._background.submit(self._close, step, facts)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._settle(state)

    def _close(self, step: int, facts: Mapping[str, Any]) -> None:
        manifest.write(self._folder.checkpoints / f"checkpoint-{step}", facts)
        manifest.retire(self._folder.checkpoints, self._keep)

    def _settle(self, state: Any) -> None:
        """Wait until the last checkpoint has its manifest, and raise what failed there, unless the disk was full."""
        if self._closing is None:
            return
        (step, needed, closing), self._closing = self._closing, None
        why: str | None = None
        try:
            if closing is not None:
                closing.result()
        except OSError as error:
            if (why := disk_full_reason(error)) is None:
                raise
        if (failed := first_failure(why, self._strategy.world)) is not None:
            self._give_up(step, failed[1], needed, state)

    def _give_up(self, step: int, why: str, needed: int, state: Any) -> None:
        """Remove what was written of a checkpoint of `needed` bytes, and say so. All ranks enter."""
        self._best.forget(step, state)
        self._saved = None
        if not self._strategy.world.is_main:
            return
        target = self._folder.checkpoints / f"checkpoint-{step}"
        shutil.rmtree(target, ignore_errors=True)
        good, _ = manifest.newest(self._folder.checkpoints)
        kept = f"The last complete one is {good.name}" if good else "There is no other checkpoint"
        say(
            f"warning: {target.name} was not saved: {why}; {free_space(target.parent, needed)}. {kept}. "
            "Free some space: the run continues, and will try again at the next save"
        )

    def _anywhere(self, part: Callable[[], None]) -> str | None:
        """Run `part` on every rank. If the disk was full on any, return the lowest rank's reason on all."""
        fault: str | None = None
        try:
            part()
        except (Exception, CheckpointException) as error:  # each library raises its own, and torch's is no Exception
            why = disk_full_reason(error)
            if why is None or not self._strategy.meets_after_failed_write:
                raise
            fault = why
        first = first_failure(fault, self._strategy.world)
        return None if first is None else f"{first[1]} (rank {first[0]})"
