"""The reference's log-probabilities of all pairs, computed once before the first step: what `preference` calls
`precompute_ref_log_probs`.

They belong to a pair by its content, and are kept in two places: in the run's folder, so that a resumed run goes on
with the same numbers whatever happens to the cache, and in the cache, for other runs with this reference.
"""

from __future__ import annotations

import functools
import hashlib
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from distft.config.preference import Preference
from distft.config.recipe import Recipe
from distft.console import say
from distft.data.curriculum import sample_hashes
from distft.data.pieces import Array
from distft.distributed.collectives import broadcast, together
from distft.distributed.world import World
from distft.errors import DistftError
from distft.files import write_atomically
from distft.models.start import start_digest
from distft.runs.record import Record
from distft.text import count
from distft.training.scores import kept_for_base

if TYPE_CHECKING:
    from distft.training.preference import PreferenceTrainer

Known = dict[int, Array]
"""The log-probabilities of a pair's trained tokens, the chosen answer's first, by the hash of the pair."""


def precomputes(recipe: Recipe, epochs: int) -> bool:
    """Whether a run of so many epochs computes its reference before the first step. `auto` does where it saves work,
    and where there is no adapter to switch off."""
    preference = recipe.preference or Preference()
    if not recipe.pairs or not preference.refers:
        return False
    asked = preference.precompute_ref_log_probs
    return (recipe.lora is None or epochs > 1) if asked == "auto" else asked


class WithReference(Dataset[dict[str, Any]]):
    """Prepared pairs with what the reference says of them, as `reference`, once that is known."""

    def __init__(self, samples: Any, known: Known) -> None:
        self._samples, self._hashes, self._known = samples, sample_hashes(samples), known

    def __len__(self) -> int:
        return len(self._samples)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = self._samples.__getitems__(indices) if len(indices) else []
        if not self._known:
            return list(rows)
        return [
            row | {"reference": self._known[int(self._hashes[index])]} for index, row in zip(indices, rows, strict=True)
        ]


class ReferencePass(TrainerCallback):  # type: ignore[misc]
    """Computes the reference of all `splits` before the first step, as far as it is not known."""

    def __init__(self, recipe: Recipe, record: Record, world: World, splits: Iterable[Any]) -> None:
        self._recipe, self._record, self._world = recipe, record, world
        self._splits = [samples for samples in splits if samples is not None]
        self._own = record.folder.reference
        self._trainer: PreferenceTrainer | None = None
        self._found: Known = {}

    def attach(self, trainer: Any) -> None:
        """Compute with `trainer`, a PreferenceTrainer, which can only be built once its callbacks are."""
        self._trainer, self._found = trainer, trainer.expect_reference()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, world = self._trainer, self._world
        assert trainer is not None
        start, before = time.perf_counter(), broadcast(together(world, self._read), world)
        known, computed = dict(before), 0
        for samples in self._splits:
            hashes = together(world, functools.partial(sample_hashes, samples)).tolist()
            missing = [index for index, found in enumerate(hashes) if found not in known]
            if missing and self._recipe.lora is None and state.global_step > 0:
                raise DistftError(
                    f"{self._own} lacks {count(len(missing), 'pair')}, and the weights that were their reference have "
                    "been trained since; start a new run"
                )
            if missing:
                found = trainer.reference_log_probs(samples.select(missing))
                known |= {hashes[index]: values for index, values in zip(missing, found, strict=True)}
                computed += len(missing)
        together(world, lambda: self._write(known, computed) if world.is_main else None)
        self._found.update(known)
        if computed:
            seconds = time.perf_counter() - start
            self._record.note(reference_time_s=round(seconds, 3))
            if world.is_main:
                say(f"computed the reference of {count(computed, 'pair')} in {seconds:,.1f} s")

    def _read(self) -> Known:
        if not self._world.is_main:
            return {}
        cached = self._cache()
        return {**({} if cached is None else read_log_probs(cached.glob("*.npz"))), **read_log_probs([self._own])}

    def _write(self, known: Known, computed: int) -> None:
        if computed or not self._own.is_file():
            write_log_probs(self._own, known)
        if computed and (cache := self._cache()) is not None:
            name = hashlib.sha256(np.array(sorted(known), np.uint64).tobytes()).hexdigest()[:16]
            write_log_probs(cache / f"{name}.npz", known)

    def _cache(self) -> Path | None:
        """The folder of the cache; None while the base is not here."""
        return kept_for_base(self._recipe, "reference", adapter=start_digest(self._recipe))


def read_log_probs(files: Iterable[Path]) -> Known:
    """What is in those of the `files` that exist."""
    found: Known = {}
    for path in sorted(files):
        if path.is_file():
            with np.load(path) as file:
                ends = np.cumsum(file["tokens"])
                parts = np.split(file["log_probs"], ends)[:-1]  # the last one is what follows them: nothing
                found |= dict(zip(file["hashes"].tolist(), parts, strict=True))
    return found


def write_log_probs(path: Path, known: Mapping[int, Array]) -> None:
    file = io.BytesIO()
    np.savez(
        file,
        hashes=np.array(list(known), np.uint64),
        tokens=np.array([len(values) for values in known.values()], np.int64),
        log_probs=np.concatenate([np.zeros(0, np.float32), *known.values()]),
    )
    write_atomically(path, file.getvalue())  # other runs may write the same file of the cache


def apart(log_probs: torch.Tensor, counts: torch.Tensor) -> list[Array]:
    """Of the scored tokens of a micro-batch, those of each pair; `counts` are those of the batch."""
    sizes = counts[:-1].view(-1, 2).sum(1).tolist()
    values = log_probs.detach().float().flatten().cpu().numpy()
    return np.split(values[: sum(sizes)], np.cumsum(sizes)[:-1]) if sizes else []
