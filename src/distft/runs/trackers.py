"""W&B and the other trackers of a run: on rank 0, guarded, one W&B run for a run folder however often it is started."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from distft.config.recipe import Recipe
from distft.console import say
from distft.distributed.signals import STOP
from distft.distributed.world import World
from distft.files import to_json, write_atomically
from distft.runs.folder import RunFolder
from distft.runs.offline import WANDB_FINISH_S, has_wandb_key, last_step


class Guarded(TrainerCallback):  # type: ignore[misc]
    """A tracker's callback whose failures cost one warning and the tracker, never the run.

    What a resumed run logs again, of the steps up to `seen`, is left out: the tracker has it from an earlier start. What it
    lacks of the `records` of earlier starts, for a kill came before it was sent, is made up for.
    """

    def __init__(
        self, name: str, inner: TrainerCallback, seen: int = -1, records: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._name, self._seen = name, seen
        self._inner: TrainerCallback | None = inner
        self._lacking = [record for record in records if record["step"] > seen]

    def __getattribute__(self, event: str) -> Any:
        if not event.startswith("on_"):
            return super().__getattribute__(event)

        def call(*args: Any, **kwargs: Any) -> None:
            if self._inner is None:
                return
            if event == "on_log" and args[1].global_step <= self._seen and "train_runtime" not in kwargs["logs"]:
                return
            try:
                getattr(self._inner, event)(*args, **kwargs)
                if event == "on_train_begin":
                    for record in self._lacking:
                        then = copy.copy(args[1])
                        then.global_step = record["step"]
                        # What stands in metrics.jsonl alone, the figures of each rank, are lists.
                        logs = {
                            key: value for key, value in record.items() if key != "step" and not isinstance(value, list)
                        }
                        self._inner.on_log(args[0], then, args[2], logs=logs)
            except Exception as error:  # whatever a tracker raises, the run goes on
                self._inner = None
                if _ended_by_signal(error):
                    say(
                        f"the signal has ended {self._name}'s service as well; what it lacks is sent when the run goes on"
                    )
                    return
                say(
                    f"warning: {self._name} failed and is left out from here on; metrics.jsonl goes on ({type(error).__name__}: {error})"
                )

        return call


def trackers(recipe: Recipe, folder: RunFolder, world: World) -> list[TrainerCallback]:
    """The trackers that the recipe reports to, on rank 0 alone, each guarded. Starts the W&B run, or goes on with it."""
    if not world.is_main:
        return []
    found: list[TrainerCallback] = []
    for name in recipe.tracking.report_to:
        seen, records = -1, []
        try:
            if name == "wandb":
                seen, records = _start_wandb(recipe, folder), folder.read_metrics()
            if name == "tensorboard":
                os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.path / "tensorboard"))
            (cls,) = get_reporting_integration_callbacks([name])
            found.append(Guarded(name, cls(), seen, records))
        except Exception as error:  # whatever a tracker raises, the run goes on
            say(
                f"warning: {name} cannot be used and is left out; metrics.jsonl has every figure ({type(error).__name__}: {error})"
            )
    return found


_WANDB_FLUSH_S = 1.0
_WANDB_EMPTY = 7  # bytes: the head of a file without a record


def _start_wandb(recipe: Recipe, folder: RunFolder) -> int:
    """One W&B run for the folder, however often it is started: online where there is a key, else offline, with the resolved
    recipe as its config. Returns the last step that the W&B run has already; -1 for none.

    W&B's history only grows, and steps that came after the checkpoint are made again by a resumed run, with the same values.
    Taking them back (`resume_from`) needs a server that can, so they are not sent twice instead. W&B counts its own
    `_step` on from what it has, online and in `wandb sync`, which takes the folders of one id in the order of their start.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_MODE", "online" if has_wandb_key() else "offline")
    known = json.loads(folder.wandb_run.read_text(encoding="utf-8")) if folder.wandb_run.is_file() else None
    identity = os.environ.get("WANDB_RUN_ID") or (known["id"] if known else uuid.uuid4().hex[:8])  # a sweep sets it
    write_atomically(folder.wandb_run, to_json({"id": identity}) + "\n")
    seen = -1
    for file in folder.wandb.glob("offline-run-*/run-*.wandb"):
        if file.stat().st_size <= _WANDB_EMPTY:  # killed in its first second; `wandb sync` stops at such a file
            shutil.rmtree(file.parent, ignore_errors=True)
        else:
            seen = max(seen, last_step(file))
    section = recipe.tracking
    run = wandb.init(
        project=section.project, entity=section.entity, group=section.group, tags=section.tags or None, name=folder.name,
        dir=str(folder.path), config=recipe.model_dump(), id=identity, resume="allow",
        # By default a run whose server is gone never ends: it waits to upload. What is left out stays in `wandb/`. And a
        # kill would lose the last 15 s.
        settings=wandb.Settings(finish_timeout=WANDB_FINISH_S, x_transaction_log_flush_interval=_WANDB_FLUSH_S),
    )  # fmt: skip
    if run.settings.mode == "offline":
        why = "offline" if has_wandb_key() else "no key, so offline"
        say(f"wandb: {why}; sync later with: wandb sync {os.path.relpath(folder.wandb)}")
        return seen
    return int(run.summary.get("train/global_step", -1)) if run.resumed else -1  # the server knows what has come there


def log_evaluation(recipe: Recipe, folder: RunFolder, figures: Mapping[str, float]) -> None:
    """Put `figures` into the summary of the folder's W&B run, where the recipe reports to W&B. For rank 0 alone."""
    if "wandb" not in recipe.tracking.report_to:
        return
    try:
        _start_wandb(recipe, folder)
        import wandb

        assert wandb.run is not None
        wandb.run.summary.update(dict(figures))
    except Exception as error:  # whatever a tracker raises, the results stay in the folder
        say(f"warning: wandb does not have the evaluation; {folder.results} does ({type(error).__name__}: {error})")


@contextmanager
def closing_trackers() -> Iterator[None]:
    """Close the W&B run, if there is one, with the outcome of the block: finished, or failed where it raised."""
    failed = True
    try:
        yield
        failed = False
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            try:
                wandb.finish(exit_code=1 if failed else 0)
            except Exception as error:  # whatever a tracker raises, the run goes on
                if not _ended_by_signal(error):
                    say(f"warning: wandb did not close cleanly ({type(error).__name__}: {error})")
                with suppress(Exception, SystemExit):  # or it tries once more at exit, and fails in a traceback
                    wandb.teardown()


def _ended_by_signal(error: Exception) -> bool:
    """Whether a tracker's service is gone because the signal that stops this run went to every process, as schedulers send it."""
    return STOP.signum is not None and isinstance(error, ConnectionError)
