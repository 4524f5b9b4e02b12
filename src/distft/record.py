"""The record of a run from its first moment to its last: folder, recipe, environment, and a summary that is always true."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from distft.errors import Interrupted
from distft.machine import describe
from distft.recipe import COMMAND_LINE, Recipe
from distft.run import RunFolder, to_json, write_atomically
from distft.strategy import Strategy
from distft.world import together


class Record:
    """Context of a run. Leaving it writes the status: finished, interrupted (by a signal) or failed (with the cause).

    Rank 0 writes; another rank writes only the cause of its own failure, so that the run is not said to have been
    stopped by the launcher when it was that rank that broke it.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, strategy: Strategy) -> None:
        self.folder, self._strategy = folder, strategy
        self._facts: dict[str, Any] = {
            "status": "running", "recipe": recipe.source.name, "strategy": strategy.name, "requested_strategy": strategy.requested,
            "world_size": strategy.world.world_size, "restarts": 0, "changed_for_you": strategy.notes,
        }  # fmt: skip

    @classmethod
    def open(cls, recipe: Recipe, strategy: Strategy, working_folder: Path) -> Record:
        """Claim the run folder on rank 0 and tell all ranks. All ranks enter.

        Raises:
            RunFolderError: the name was given on the command line and is in use.
        """
        world = strategy.world
        parent = working_folder / Path(recipe.run.dir).expanduser()
        exact = recipe.source.of("run.name") == COMMAND_LINE
        folder = together(
            world, lambda: RunFolder.claim(parent, recipe.run.name, exact=exact) if world.is_main else None
        )
        if world.world_size > 1:
            from torch import distributed

            shared = [folder]
            distributed.broadcast_object_list(shared, src=0)
            folder = shared[0]
        assert folder is not None
        record = cls(folder, recipe, strategy)
        if world.is_main:
            write_atomically(folder.recipe, recipe.to_yaml())
            write_atomically(folder.environment, to_json(describe()) + "\n")
            record._write()
        return record

    def note(self, **facts: Any) -> None:
        """Facts for the summary; written when the record closes."""
        self._facts |= facts

    def lines(self) -> list[str]:
        """What a user wants to read before the first step."""
        facts = self._facts
        processes = f"{facts['world_size']} process{'es' if facts['world_size'] > 1 else ''}"
        return [
            *facts["changed_for_you"],
            f"{facts['strategy']} on {processes}: global batch {self._batch()} × {facts['world_size']} × "
            f"{facts['gradient_accumulation_steps']} accumulation; {facts['trainable_parameters']:,} of "
            f"{facts['parameters']:,} parameters train; attention {facts['attn_implementation']}",
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
        if error is None:
            self.note(status="finished", cause=None)
        else:
            stopped = isinstance(error, Interrupted | KeyboardInterrupt)
            self.note(status="interrupted" if stopped else "failed", cause=f"{type(error).__name__}: {error}")
            if (stopped and not main) or self.folder.read_summary().get("status") != "running":
                return
        if main or error is not None:
            self._write()

    def _write(self) -> None:
        self.folder.write_summary(self._facts)
