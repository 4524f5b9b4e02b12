"""The record of a run from its first moment to its last: its folder, recipe, environment, and a summary that is always true."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from distft.config.recipe import Recipe
from distft.config.validation import COMMAND_LINE
from distft.config.yaml import parse_yaml
from distft.console import say
from distft.distributed.collectives import broadcast, together
from distft.distributed.strategies import Strategy
from distft.distributed.supervisor import Launch, leave_note
from distft.errors import AlreadyFinished, DistftError, Interrupted, RankLost, RunFolderError, UserError
from distft.files import disk_full_reason, to_json, write_atomically
from distft.hardware import describe
from distft.runs import manifest
from distft.runs.folder import RunFolder
from distft.runs.slurm_job import batch_job, is_queued, requeues
from distft.text import count

_FREE_TO_CHANGE = (
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
    "training.logging_",
    "training.save_",
    "slurm.",
    "training.eval_",
    "training.ddp_timeout",
)
"""What does not change the optimisation, so that a run may resume with another value."""


@dataclass(frozen=True)
class Place:
    """Where a run writes, and the checkpoint it goes on from (None: from the start). `claimed`: the folder is new; `notes`
    are for the user."""

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
        """Optimizer steps that the run has behind it."""
        return 0 if self.checkpoint is None else manifest.step_of(self.checkpoint)


class Record:
    """Context of a run. Leaving it writes the status: finished, interrupted (by a signal) or failed (with the cause).

    Rank 0 writes; another rank writes only the cause of its own failure, so that the run is not said to have been
    stopped by the launcher when it was that rank that broke it. `step` is the last optimizer step that is complete.
    """

    def __init__(self, place: Place, recipe: Recipe, strategy: Strategy, lock: FileLock | None) -> None:
        self.place, self.folder, self._strategy, self._lock = place, place.folder, strategy, lock
        self.step = place.step
        self._launch = Launch.of(os.environ)
        self._facts: dict[str, Any] = {
            "status": "running", "recipe": recipe.source.name, "strategy": strategy.name, "requested_strategy": strategy.requested,
            "world_size": strategy.world.world_size, "restarts": place.restarts,
            "requeues": requeues(os.environ), "changed_for_you": [*strategy.notes, *place.notes],
        }  # fmt: skip

    @classmethod
    def open(cls, recipe: Recipe, strategy: Strategy, working_folder: Path, **facts: Any) -> Record:
        """Find or claim the run folder on rank 0 and tell all ranks; `facts` stand in its summary from the first. All ranks enter.

        Raises:
            RunFolderError: the name was given on the command line and is in use, or the recipe has changed since the
                run was interrupted.
            AlreadyFinished: the launcher has started a run again that has nothing left to do.
        """
        world = strategy.world
        lock: FileLock | None = None

        def find() -> Place | None:
            nonlocal lock
            if not world.is_main:
                return None
            place, lock = _find(recipe, strategy, working_folder)
            return place

        place = broadcast(together(world, find), world)
        assert place is not None
        record = cls(place, recipe, strategy, lock)
        record.note(**facts)
        if world.is_main:
            leave_note("folder", str(place.folder.path))
            if not place.claimed:
                place.folder.keep_metrics(place.step)
                manifest.drop_after(place.folder.checkpoints, place.step)
            write_atomically(place.folder.recipe, recipe.to_yaml())
            started = {
                "launch": record._launch.launcher,
                "attempt": record._launch.attempt,
                "job": batch_job(os.environ),
            }
            write_atomically(place.folder.environment, to_json(describe() | started) + "\n")
            record._write()
        return record

    def note(self, **facts: Any) -> None:
        """Facts for the summary; written when the record closes."""
        self._facts |= facts

    def changed(self, line: str) -> None:
        """One more thing that differs from what the recipe asked for, for the user and the summary."""
        self._facts["changed_for_you"].append(line)

    @property
    def started_again(self) -> bool:
        """Whether the launcher, and no user, has started these processes, after others had ended."""
        return self._launch.attempt > 0

    def lines(self) -> list[str]:
        """What a user wants to read before the first step."""
        facts = self._facts
        processes = count(facts["world_size"], "process")
        return [
            *facts["changed_for_you"],
            f"{facts['strategy']} on {processes}: global batch {self._batch()} × {facts['world_size']} × "
            f"{facts['gradient_accumulation_steps']} accumulation; {facts['trainable_parameters']:,} of "
            f"{facts['parameters']:,} parameters train; attention {facts['attn_implementation']}"
            + (
                f"; {facts['checkpointed_layers']} layers checkpointed"
                if facts["checkpointed_layers"] is not None
                else ""
            ),
            f"run folder: {self.folder.path}",
        ]

    def _batch(self) -> str:
        facts = self._facts
        whole = facts["global_batch_size"] or f"{facts['global_batch_tokens']:,} tokens"
        if facts["micro_batch_tokens"] is not None:
            return f"{whole} in packs of at most {facts['micro_batch_tokens']:,} tokens"
        return f"{whole} = micro-batch {facts['micro_batch']}"

    def closing_lines(self) -> list[str]:
        """What a user wants to read after the last step."""
        facts = self._facts
        lines = []
        if facts.get("eval_before"):
            before, after = facts["eval_before"]["perplexity"], facts["eval_after"]["perplexity"]
            lines.append(f"held-out perplexity: {before:,.2f} before, {after:,.2f} after")
        if facts.get("samples_per_second"):
            lines.append(f"{facts['samples_per_second']:,.1f} samples/s, {facts['tokens_per_second']:,.0f} tokens/s")
        return [*lines, f"saved and read back: {facts['adapter']}"]

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        main = self._strategy.world.is_main
        if error is not None:
            self.close(error)
        elif main:
            self.note(status="finished", cause=None)
            self._write()
        if self._lock is not None:
            self._lock.release()

    def close(self, error: BaseException) -> None:
        """Write that `error` has ended the run, and why; the first rank to come gives the cause."""
        world, stopped = self._strategy.world, isinstance(error, Interrupted)
        if isinstance(error, UserError) and self.place.claimed and self.step == 0:
            if world.is_main:  # the command that is right will want the name
                shutil.rmtree(
                    self.folder.path, ignore_errors=True
                )  # the other ranks clear away their own files beside us
            return
        try:
            self._close(error, stopped)
        except OSError as unwritten:  # what went wrong before is what the user must hear of
            if (why := disk_full_reason(unwritten)) is None:
                raise
            say(f"warning: {self.folder.summary} cannot be written ({why}); it still says running")

    def _close(self, error: BaseException, stopped: bool) -> None:
        world = self._strategy.world
        if (stopped and not world.is_main) or self.folder.read_summary().get("status") != "running":
            return
        cause = f"{type(error).__name__}: {error}"
        if not stopped and not self.folder.append_fault({
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "rank": error.rank if isinstance(error, RankLost) else world.rank,
            "step": self.step, "cause": cause, "launch": self._launch.launcher, "attempt": self._launch.attempt,
            **(error.facts if isinstance(error, DistftError) else {}),
        }):  # fmt: skip
            return
        self.note(status="interrupted" if stopped else "failed", cause=cause)
        self._write()

    def _write(self) -> None:
        self.folder.write_summary(self._facts)


def _find(recipe: Recipe, strategy: Strategy, working_folder: Path) -> tuple[Place, FileLock]:
    """The place of this run, and the lock on it: the folder of the run that a launcher has started again, the newest run of
    this name that did not finish, or a new folder."""
    parent = working_folder / Path(recipe.run.dir).expanduser()
    exact = recipe.source.of("run.name") == COMMAND_LINE
    launch = Launch.of(os.environ)
    job = batch_job(os.environ)

    found = []
    for folder in RunFolder.named(parent, recipe.run.name):
        started = folder.read_environment()
        again = launch.attempt > 0 and started.get("launch") == launch.launcher
        found.append((folder, again or (job is not None and started.get("job") == job), started.get("job")))
    for folder, ours, other in sorted(found, key=lambda each: not each[1]):  # ours first, then the newest
        if not ours and (recipe.run.resume == "never" or (exact and folder.name != recipe.run.name)):
            continue
        if not ours and other is not None and is_queued(other):
            if exact:
                raise RunFolderError(
                    f"{folder.path} belongs to job {other}, which is still in the queue; wait for it, scancel it, or take another run.name"
                )
            continue
        lock = FileLock(folder.lock)
        try:
            lock.acquire(timeout=30 if ours else 0)  # what the launcher has ended may take a moment to be gone
        except Timeout:
            if exact:
                raise RunFolderError(
                    f"another process is running in {folder.path}; wait for it, or take another run.name"
                ) from None
            continue
        finished = folder.read_summary()["status"] == "finished"
        if finished and ours:
            raise AlreadyFinished(f"the run in {folder.path} had finished before it was started again")
        place = None if finished else _resumable(folder, recipe, strategy)
        if place is not None:
            return place, lock
        lock.release()
        if finished:
            break
    folder = RunFolder.claim(parent, recipe.run.name, exact=exact)
    lock = FileLock(folder.lock)
    lock.acquire(timeout=0)
    return Place(folder), lock


def _resumable(folder: RunFolder, recipe: Recipe, strategy: Strategy) -> Place | None:
    """The place to go on from in an unfinished folder that no other process holds; None where it has no checkpoint and the
    recipe is another."""
    summary = folder.read_summary()
    checkpoint, skipped = manifest.newest(folder.checkpoints)
    changed = list(_differences(parse_yaml(folder.recipe.read_text(encoding="utf-8")), recipe.model_dump()))
    if changed and checkpoint is None:
        return None
    if changed and not recipe.run.force:
        raise RunFolderError(
            f"{folder.path} was interrupted with another recipe:\n" + "\n".join(f"  {line}" for line in changed)
            + "\ntake the old values to go on, run.force=true to go on with the new ones, or start anew: run.resume=never, or another run.name"
        )  # fmt: skip
    facts = {"carried": {}} if checkpoint is None else manifest.read(checkpoint)
    if facts.get("format", strategy.checkpoint_format) != strategy.checkpoint_format:
        raise RunFolderError(
            f"the checkpoints of {folder.path} are {facts['format']}, and {strategy.name} on "
            f"{count(strategy.world.world_size, 'process')} cannot read them\nresume with as many processes as before "
            f"({facts['world_size']}), or take another run.name to start anew"
        )
    place = Place(folder, False, checkpoint, (summary["restarts"] or 0) + 1, facts["carried"])
    where = f"after step {place.step}" if checkpoint else "from the start, for it has no checkpoint"
    notes = [*skipped, f"resuming {folder.path} {where} ({_why(folder, summary)})"]
    if facts.get("world_size", strategy.world.world_size) != strategy.world.world_size:
        notes.append(f"world size {strategy.world.world_size} instead of {facts['world_size']}: the same samples in the same steps; "
                     "sums are rounded in another order, and dropout draws other numbers")  # fmt: skip
    return replace(place, notes=(*notes, *changed))


def _why(folder: RunFolder, summary: Mapping[str, Any]) -> str:
    """Why the run in `folder` ended. That a kill left no rank time to say so is recorded here."""
    if summary["status"] != "running":
        return f"{summary['status']}: {summary['cause']}"
    started, metrics = folder.read_environment(), folder.read_metrics()
    fault = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"), "rank": None, "step": metrics[-1]["step"] if metrics else 0,
        "cause": "all processes ended without a word: killed, or the machine went down",
        "launch": started.get("launch"), "attempt": started.get("attempt"),
    }  # fmt: skip
    folder.append_fault(fault)
    return str(folder.read_faults()[-1]["cause"])


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in {**old, **new}:
        path, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{path}.")
        elif before != after and not path.startswith(_FREE_TO_CHANGE):
            yield f"{path}: {before!r} then, {after!r} now"
