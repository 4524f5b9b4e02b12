"""The W&B run of a run folder: one, however often the run is started, online or offline."""

from __future__ import annotations

import json
import netrc
import os
import shutil
import subprocess
import sys
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distft.config.recipe import Recipe
from distft.console import say
from distft.distributed.signals import STOP
from distft.files import to_json, write_atomically
from distft.runs.folder import RunFolder

WANDB_FINISH_S = 60.0
"""How long the end of a run waits for uploads. By default, W&B waits forever for a server that does not respond."""
_FLUSH_S = 1.0
"""How often W&B writes its file. By default a kill loses the last 15 s."""
_INSPECT_S = 120
"""Time limit for reading the file of an offline run."""
_EMPTY_BYTES = 7
"""Size of a `.wandb` file without any record."""


def has_wandb_key() -> bool:
    """Whether W&B would find a key: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def start_wandb(recipe: Recipe, folder: RunFolder) -> Any:
    """Start or continue the folder's W&B run and return it: online if there is a key, otherwise offline.

    The recipe is its config. W&B continues its own `_step` count, online and in `wandb sync`, which takes the folders
    of one run id in the order of their start.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_MODE", "online" if has_wandb_key() else "offline")
    for file in _offline_files(folder):
        if file.stat().st_size <= _EMPTY_BYTES:  # killed in its first second; `wandb sync` fails on such a file
            shutil.rmtree(file.parent, ignore_errors=True)
    section = recipe.tracking
    run = wandb.init(
        project=section.project,
        entity=section.entity,
        group=section.group,
        tags=section.tags or None,
        name=folder.name,
        dir=str(folder.path),
        config=recipe.model_dump(),
        id=_run_id(folder),
        resume="allow",
        settings=wandb.Settings(finish_timeout=WANDB_FINISH_S, x_transaction_log_flush_interval=_FLUSH_S),
    )
    if run.settings.mode == "offline":
        why = "offline" if has_wandb_key() else "no key, so offline"
        say(f"wandb: {why}; sync later with: wandb sync {os.path.relpath(folder.wandb)}")
    return run


def logged_step(run: Any, folder: RunFolder) -> int:
    """The last optimizer step that W&B has from earlier starts of `run`; -1 if none.

    A resumed run repeats the steps after its checkpoint with the same values, and W&B's history can only grow
    (rewinding it needs a server), so those steps must not be logged again.
    """
    if run.settings.mode == "offline":
        current = Path(run.dir).parent
        return max((last_step(file) for file in _offline_files(folder) if file.parent != current), default=-1)
    return int(run.summary.get("train/global_step", -1)) if run.resumed else -1


def _offline_files(folder: RunFolder) -> list[Path]:
    return [*folder.wandb.glob("offline-run-*/run-*.wandb")]


def _run_id(folder: RunFolder) -> str:
    """The id that all starts of this run share. A sweep sets its own."""
    known = json.loads(folder.wandb_run.read_text(encoding="utf-8")) if folder.wandb_run.is_file() else None
    identity = os.environ.get("WANDB_RUN_ID") or (known["id"] if known else uuid.uuid4().hex[:8])
    write_atomically(folder.wandb_run, to_json({"id": identity}) + "\n")
    return str(identity)


def last_step(file: Path) -> int:
    """The last `train/global_step` in the history of a `.wandb` file; -1 if there is none."""
    steps = [
        record["history"]["item"].get("train/global_step", -1)
        for record in logged_records(file)
        if record["type"] == "history"
    ]
    return int(max(steps, default=-1))


def logged_records(file: Path) -> list[dict[str, Any]]:
    """The records of a `.wandb` file in order, each with its `type`, up to one that a kill left incomplete.

    `wandb leet inspect` reads the file; W&B has no Python API for that.

    Raises:
        RuntimeError: W&B cannot read the file.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    private = {**os.environ, "WANDB_ERROR_REPORTING": "false"}  # reports nothing to W&B
    ended = subprocess.run(command, capture_output=True, text=True, env=private, timeout=_INSPECT_S)
    if ended.returncode != 0:
        raise RuntimeError(f"wandb cannot read {file}: {ended.stderr.strip()}")
    return [json.loads(line) for line in ended.stdout.splitlines() if line]


def log_evaluation(recipe: Recipe, folder: RunFolder, figures: Mapping[str, float]) -> None:
    """Put `figures` into the summary of the folder's W&B run, if the recipe reports to W&B. Call it on rank 0 only."""
    if "wandb" not in recipe.tracking.report_to:
        return
    try:
        start_wandb(recipe, folder).summary.update(dict(figures))
    except Exception as error:  # a tracker never fails an evaluation
        say(f"warning: the evaluation is not in wandb, only in {folder.results} ({type(error).__name__}: {error})")


def log_table(recipe: Recipe, name: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Log a table to the W&B run of this process, if the recipe reports to W&B. Call it on rank 0 only."""
    wandb = sys.modules.get("wandb")
    if "wandb" not in recipe.tracking.report_to or wandb is None or wandb.run is None:
        return
    try:
        wandb.run.log({name: wandb.Table(columns=columns, data=rows)})
    except Exception as error:  # a tracker never fails a run
        say(f"warning: the {name} are not in wandb ({type(error).__name__}: {error})")


@contextmanager
def closing_wandb() -> Iterator[None]:
    """Close the W&B run, if there is one, when the block ends: as finished, or as failed if it raised."""
    failed = True
    try:
        yield
        failed = False
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            try:
                wandb.finish(exit_code=1 if failed else 0)
            except Exception as error:  # a tracker never fails a run
                if not lost_to_signal(error):
                    say(f"warning: wandb did not close cleanly ({type(error).__name__}: {error})")
                with suppress(Exception, SystemExit):  # otherwise it tries again at exit, and prints a traceback
                    wandb.teardown()


def lost_to_signal(error: Exception) -> bool:
    """Whether W&B's service has ended because the signal that stops this run went to every process of its group."""
    return STOP.signum is not None and isinstance(error, ConnectionError)
