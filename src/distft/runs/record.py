"""The record of a run from start to end: its folder, recipe, environment, and a summary that is always correct."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock

from distft.config.recipe import Recipe
from distft.console import say
from distft.distributed.collectives import broadcast, together
from distft.distributed.strategies import Strategy
from distft.distributed.supervisor import Launch, leave_note
from distft.errors import DistftError, Interrupted, RankLost, UserError
from distft.files import disk_full_reason, to_json, write_atomically
from distft.hardware import describe
from distft.runs import manifest
from distft.runs.resume import Place, find_place
from distft.runs.selection import selection_lines
from distft.runs.slurm_job import batch_job, requeues
from distft.text import count


class Record:
    """Context of a run. Leaving it writes the status: finished, interrupted (by a signal) or failed, with the cause.

    Rank 0 writes. Another rank writes only the cause of its own failure, because rank 0 might otherwise report that the
    launcher stopped it. `step` is the last completed optimizer step.
    """

    def __init__(self, place: Place, recipe: Recipe, strategy: Strategy, lock: FileLock | None) -> None:
        self.place, self.folder, self._strategy, self._lock = place, place.folder, strategy, lock
        self.step = place.step
        self._launch = Launch.of(os.environ)
        self._facts: dict[str, Any] = {
            "status": "running",
            "recipe": recipe.source.name,
            "strategy": strategy.name,
            "requested_strategy": strategy.requested,
            "world_size": strategy.world.world_size,
            "restarts": place.restarts,
            "requeues": requeues(os.environ),
            "changed_for_you": [*strategy.notes, *place.notes],
        }

    @classmethod
    def open(cls, recipe: Recipe, strategy: Strategy, working_folder: Path, **facts: Any) -> Record:
        """Find or claim the run folder on rank 0 and share it with all ranks. `facts` go into its first summary.

        All ranks must call this.

        Raises:
            RunFolderError: the name was given on the command line and is in use, or the run must be resumed and
                cannot.
            AlreadyFinished: a restarted run has nothing left to do.
        """
        world = strategy.world
        lock: FileLock | None = None

        def find() -> Place | None:
            nonlocal lock
            if not world.is_main:
                return None
            place, lock = find_place(recipe, strategy, working_folder, facts)
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
        """Add facts to the summary, which is written when the record closes."""
        self._facts |= facts

    def changed(self, line: str) -> None:
        """Add a line about something that differs from the recipe, for the user and the summary."""
        self._facts["changed_for_you"].append(line)

    @property
    def restarted(self) -> bool:
        """Whether the launcher started these processes to replace earlier ones."""
        return self._launch.attempt > 0

    def lines(self) -> list[str]:
        """What to print before the first step."""
        facts = self._facts
        processes = count(facts["world_size"], "process")
        layers = facts["checkpointed_layers"]
        checkpointed = "" if layers is None else f"; {layers} layers checkpointed"
        return [
            *facts["changed_for_you"],
            f"{facts['strategy']} on {processes}: global batch {self._batch()} × {facts['world_size']} × "
            f"{facts['gradient_accumulation_steps']} accumulation; {facts['trainable_parameters']:,} of "
            f"{facts['parameters']:,} parameters train; attention {facts['attn_implementation']}{checkpointed}"
            f"{self._fused()}",
            f"run folder: {self.folder.path}",
        ]

    def _fused(self) -> str:
        adapted, layers = (self._facts.get(name) for name in ("adapted_linears", "expert_layers"))
        parts = [] if adapted is None else [f"{self._facts['fused_linears']} of {adapted} linears"]
        parts += [] if layers is None else [f"experts of {self._facts['fused_expert_layers']} of {layers} layers"]
        return f"; fused: {', '.join(parts)}" if parts else ""

    def _batch(self) -> str:
        facts = self._facts
        whole = facts["global_batch_size"] or f"{facts['global_batch_tokens']:,} tokens"
        if facts["micro_batch_tokens"] is not None:
            return f"{whole} in packs of at most {facts['micro_batch_tokens']:,} tokens"
        return f"{whole} = micro-batch {facts['micro_batch']}"

    def closing_lines(self) -> list[str]:
        """What to print after the last step."""
        facts = self._facts
        lines = selection_lines(facts)
        if facts.get("eval_before"):
            labels = {
                "rewards/accuracies": "reward accuracy",
                "rewards/margins": "reward margin",
                "perplexity": "perplexity",
            }
            key, label = next((key, label) for key, label in labels.items() if key in facts["eval_before"])
            before, after = facts["eval_before"][key], facts["eval_after"][key]
            lines.append(f"held-out {label}: {before:,.2f} before, {after:,.2f} after")
        if facts.get("samples_per_second"):
            lines.append(f"{facts['samples_per_second']:,.1f} samples/s, {facts['tokens_per_second']:,.0f} tokens/s")
        place = os.path.relpath(self.folder.path)
        place = place if not place.startswith("..") else str(self.folder.path)
        after = f"next: distft chat {place}, distft evaluate {place} or distft report {place}"
        return [*lines, f"saved and read back: {facts['adapter']}", after]

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.close(error)
        elif self._strategy.world.is_main:
            self.note(status="finished", cause=None)
            self._write()
        if self._lock is not None:
            self._lock.release()

    def close(self, error: BaseException) -> None:
        """Record that `error` ended the run. The cause is the one that the first rank records."""
        if isinstance(error, UserError) and self.place.claimed and self.step == 0:
            if self._strategy.world.is_main:  # free the name for the corrected command
                # Errors are ignored because other ranks remove their own files at the same time.
                shutil.rmtree(self.folder.path, ignore_errors=True)
            return
        try:
            self._close(error)
        except OSError as unwritten:  # do not hide the original error
            if (why := disk_full_reason(unwritten)) is None:
                raise
            say(f"warning: {self.folder.summary} cannot be written ({why}); it still says running")

    def _close(self, error: BaseException) -> None:
        world, stopped = self._strategy.world, isinstance(error, Interrupted)
        if (stopped and not world.is_main) or self.folder.read_summary().get("status") != "running":
            return
        cause = f"{type(error).__name__}: {error}"
        if not stopped and not self.folder.append_fault(
            cause,
            rank=error.rank if isinstance(error, RankLost) else world.rank,
            step=self.step,
            launch=self._launch.launcher,
            attempt=self._launch.attempt,
            facts=error.facts if isinstance(error, DistftError) else {},
        ):
            return
        self.note(status="interrupted" if stopped else "failed", cause=cause)
        self._write()

    def _write(self) -> None:
        self.folder.write_summary(self._facts)
