"""Where a run writes, and the checkpoint it continues from: a new folder, or one that an interrupted run left."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distft.config.files import leaves
from distft.config.recipe import Recipe, load_recipe
from distft.config.validation import COMMAND_LINE
from distft.distributed.strategies import Strategy
from distft.distributed.supervisor import Launch, leave_note
from distft.errors import AlreadyFinished, RecipeError, RunFolderError
from distft.runs import manifest
from distft.runs.folder import RunFolder
from distft.runs.slurm_job import batch_job, is_queued
from distft.text import count

LOCK_S = 30
"""How long to wait for the lock of our own folder: the process that was killed may need a moment to exit."""
FREE_TO_CHANGE = (
    "adapter",
    "run.name",
    "run.dir",
    "run.resume",
    "run.force",
    "run.max_",
    "run.hang_",
    "run.on_bad_numbers",
    "tracking.",
    "evaluation.",
    "batching.micro_batch",
    "batching.memory_limit_gib",
    "batching.checkpoint_layers",
    "batching.offload_checkpoints",
    "batching.share_prompts",
    "training.logging_",
    "training.save_",
    "slurm.",
    "training.eval_",
    "training.ddp_timeout",
)
"""Keys, or prefixes of keys, that do not change the optimisation: a run may resume with different values."""
MEASURED_WITH = ("evaluation.before_and_after", "evaluation.max_samples")
"""Exceptions to these: with other values, the losses before and after training would not be of the same samples."""
EVALUATED_WITH = ("training.eval_strategy", "training.eval_steps", "training.eval_delay")
FOLLOWS_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")
"""Learning-rate schedules with which the keys in `EVALUATED_WITH` change the optimisation."""
SELECTS = ("load_best_model_at_end", "early_stopping_patience")
"""Keys of `training` with which those in `EVALUATED_WITH` and `SCORED_WITH` change the result."""
SCORED_WITH = {
    "imdb": ("evaluation.imdb.", "evaluation.seed"),
    "classification": ("evaluation.classification.", "evaluation.generation.template", "evaluation.seed"),
}
IDENTITY = {
    "data_digest": "the training data",
    "held_out_digest": "the held-out data",
    "weights_digest": "the base's weights",
    "start_digest": "the adapter that it starts from",
}
"""Keys of `summary.json` that identify what a run reads besides its recipe."""


@dataclass(frozen=True)
class Place:
    """Where a run writes, and the checkpoint it continues from (None: from the start).

    `claimed` is true for a new folder. `carried` is what the checkpoint's manifest keeps for the callbacks, `notes` are
    lines for the user.
    """

    folder: RunFolder
    claimed: bool = True
    checkpoint: Path | None = None
    restarts: int = 0
    carried: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def resume_from(self) -> str | None:
        return None if self.checkpoint is None else str(self.checkpoint)

    @property
    def step(self) -> int:
        """Number of optimizer steps the run has completed."""
        return 0 if self.checkpoint is None else manifest.step_of(self.checkpoint)


@dataclass(frozen=True)
class _Candidate:
    """An existing folder with the run's name. `ours`: this launch, or this SLURM job, has already worked in it."""

    folder: RunFolder
    ours: bool
    job: str | None


def find_place(
    recipe: Recipe, strategy: Strategy, working_folder: Path, facts: Mapping[str, Any]
) -> tuple[Place, FileLock]:
    """Return the place of this run and the lock on it. `facts` has the digests named in `IDENTITY`.

    That is the folder that a restarted launch worked in before; otherwise the newest run of this name that did not
    finish and had the same recipe, data and base; otherwise a new folder.

    Raises:
        RunFolderError: the name was given on the command line and is in use, or the run must be resumed and cannot.
        AlreadyFinished: a restarted run has nothing left to do.
    """
    parent = working_folder / Path(recipe.run.dir).expanduser()
    exact, insists = recipe.source.of("run.name") == COMMAND_LINE, recipe.run.resume == "must"
    notes: list[str] = []
    for candidate in _candidates(parent, recipe.run.name):
        folder, ours = candidate.folder, candidate.ours
        if not ours and (recipe.run.resume == "never" or (exact and folder.name != recipe.run.name)):
            continue
        if not ours and candidate.job is not None and is_queued(candidate.job):
            if exact or insists:
                raise RunFolderError(
                    f"{folder.path} belongs to job {candidate.job}, which is still in the queue; wait for it, "
                    "scancel it, or choose another run.name"
                )
            continue
        lock = FileLock(folder.lock)
        try:
            lock.acquire(timeout=LOCK_S if ours else 0)
        except Timeout:
            if exact or insists:
                message = f"another process is running in {folder.path}; wait for it, or choose another run.name"
                raise RunFolderError(message) from None
            continue
        finished = folder.read_summary()["status"] == "finished"
        if finished and ours:
            leave_note("folder", str(folder.path))
            raise AlreadyFinished(f"the run in {folder.path} had already finished when it was restarted")
        changed = _changes(folder, recipe, facts)
        if finished:
            lock.release()
            if changed and not insists:
                continue  # an earlier run may be the one that this command was stopped in
            break
        place = _resumable(folder, recipe, strategy, changed, facts, must=ours or exact or insists)
        if place is not None:
            return place, lock
        lock.release()
        if manifest.newest(folder.checkpoints)[0] is not None:
            notes.append(
                f"starting a new run: {folder.path} was interrupted with different settings ({'; '.join(changed)}); to "
                "continue it, restore them, or set run.force=true"
            )
    if insists:
        raise RunFolderError(f"there is no interrupted run of the name {recipe.run.name} in {parent} to resume")
    folder = RunFolder.claim(parent, recipe.run.name, exact=exact)
    lock = FileLock(folder.lock)
    lock.acquire(timeout=0)
    return Place(folder, notes=tuple(notes)), lock


def _candidates(parent: Path, name: str) -> list[_Candidate]:
    """The existing folders with this name: ours first, then from the newest to the oldest."""
    launch, job = Launch.of(os.environ), batch_job(os.environ)
    found = []
    for folder in RunFolder.named(parent, name):
        started = folder.read_environment()
        restarted = launch.attempt > 0 and started.get("launch") == launch.launcher
        requeued = job is not None and started.get("job") == job
        found.append(_Candidate(folder, restarted or requeued, started.get("job")))
    return sorted(found, key=lambda candidate: not candidate.ours)


def _changes(folder: RunFolder, recipe: Recipe, facts: Mapping[str, Any]) -> list[str]:
    """A line for everything that decides what is learned and differs from the run in `folder`."""
    summary = folder.read_summary()
    try:
        # Loaded, not just read: keys that the version which wrote it did not have get their defaults.
        old = load_recipe([f"recipe={folder.recipe}"])
    except RecipeError as error:
        return [f"{folder.recipe.name} is not valid any more: {error}"]
    changed = list(differences(old.model_dump(), recipe.model_dump()))
    if (old.adapter is None) != (recipe.adapter is None):  # where it lies does not matter: its digest decides
        changed.append(f"adapter: was {old.adapter!r}, is now {recipe.adapter!r}")
    for key, what in IDENTITY.items():
        before, now = summary.get(key), facts.get(key)
        if before is not None and now is not None and before != now:
            changed.append(f"{what}: the digest was {before}, is now {now}")
    return changed


def _resumable(
    folder: RunFolder,
    recipe: Recipe,
    strategy: Strategy,
    changed: Sequence[str],
    facts: Mapping[str, Any],
    *,
    must: bool,
) -> Place | None:
    """The place to continue from in an unfinished folder that no other process holds.

    None if something has `changed` and the run need not be continued: it has no checkpoint, or `must` is false.

    Raises:
        RunFolderError: it must be continued, but something has changed, or its checkpoints cannot be read.
    """
    summary = folder.read_summary()
    checkpoint, skipped = manifest.newest(folder.checkpoints)
    if changed and (checkpoint is None or not (must or recipe.run.force)):
        return None
    if changed and not recipe.run.force:
        lines = "\n".join(f"  {line}" for line in changed)
        raise RunFolderError(
            f"{folder.path} was started with a different recipe, other data or another base:\n{lines}\n"
            "restore the old values to continue it, set run.force=true to continue with the new ones, or start over "
            "with run.resume=never or another run.name"
        )
    saved = {"carried": {}} if checkpoint is None else manifest.read(checkpoint)
    world_size = strategy.world.world_size
    if saved.get("format", strategy.checkpoint_format) != strategy.checkpoint_format:
        raise RunFolderError(
            f"{folder.path} has checkpoints in the format {saved['format']!r}; {strategy.name} on "
            f"{count(world_size, 'process')} cannot read them\nresume with as many processes as before "
            f"({saved['world_size']}), or start over with another run.name"
        )
    place = Place(folder, False, checkpoint, (summary["restarts"] or 0) + 1, saved["carried"])
    where = f"after step {place.step}" if checkpoint else "from the start, because it has no checkpoint"
    notes = [*skipped, f"resuming {folder.path} {where} ({_reason(folder, summary)})"]
    if saved.get("world_size", world_size) != world_size:
        notes.append(
            f"world size {world_size} instead of {saved['world_size']}: every step has the same samples, but sums are "
            "taken in a different order, so rounding differs, and dropout masks differ"
        )
    unknown = [what for key, what in IDENTITY.items() if facts.get(key) and summary.get(key) is None]
    if unknown and checkpoint is not None:
        notes.append(f"not checked whether it changed, because the run did not record its digest: {', '.join(unknown)}")
    return replace(place, notes=(*notes, *changed))


def _reason(folder: RunFolder, summary: Mapping[str, Any]) -> str:
    """Why the run in `folder` ended. If it was killed before it could say, record that as a fault."""
    if summary["status"] != "running":
        return f"{summary['status']}: {summary['cause']}"
    started, metrics = folder.read_environment(), folder.read_metrics()
    folder.append_fault(
        "all processes ended without a message: they were killed, or the machine went down",
        rank=None,
        step=metrics[-1]["step"] if metrics else 0,
        launch=started.get("launch"),
        attempt=started.get("attempt"),
    )
    return str(folder.read_faults()[-1]["cause"])


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """A line for every value that differs between two recipes, except for keys that a run may resume with."""
    strict: tuple[str, ...] = MEASURED_WITH
    if new["training"].get("lr_scheduler_type") in FOLLOWS_EVALUATIONS:
        strict += EVALUATED_WITH
    if any(new["training"].get(key) for key in SELECTS):
        strict += EVALUATED_WITH
        metric = new["training"].get("metric_for_best_model") or ""
        strict += tuple(key for name, keys in SCORED_WITH.items() if name in metric for key in keys)
    before, after = dict(leaves(old)), dict(leaves(new))
    for key in {**before, **after}:
        if key.startswith(FREE_TO_CHANGE) and not key.startswith(strict):
            continue
        if before.get(key) != after.get(key):
            yield f"{key}: was {before.get(key)!r}, is now {after.get(key)!r}"
