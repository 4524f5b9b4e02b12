"""Real processes: every run here is started the way a user starts it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distft.runs.folder import RunFolder
from distft.training.beside import free_port

LIMIT_S = 540  # on a busy machine, the C++ that DeepSpeed compiles at first use alone takes five minutes


@dataclass(frozen=True)
class Ended:
    """A process that has ended, and the folder its runs went to."""

    code: int
    stdout: str
    stderr: str
    runs: Path

    @property
    def folder(self) -> RunFolder:
        """The run folder, of which there is one."""
        (path,) = [path for path in self.runs.iterdir() if path.is_dir()]
        return RunFolder(path)


def environment(**changes: str) -> dict[str, str]:
    """The tests' environment without what a launcher above pytest may have left, and without trackers' keys."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_", "WANDB_"))}
    return {**kept, "WANDB_MODE": "offline", "NO_COLOR": "1", **changes}


def start(command: Sequence[str], where: Path, terminal: int | None = None, /, **changes: str) -> subprocess.Popen[str]:
    """Start `command` in its own process group, in the folder `where`. It prints to `terminal`, or to pipes."""
    output = subprocess.PIPE if terminal is None else terminal
    return subprocess.Popen(
        command,
        cwd=where,
        env=environment(**changes),
        text=True,
        start_new_session=True,
        stdout=output,
        stderr=output,
    )


def finish(process: subprocess.Popen[str], where: Path) -> Ended:
    stdout, stderr = process.communicate(timeout=LIMIT_S)
    return Ended(process.returncode, stdout, stderr, where / "runs")


def on_two_ranks(program: str) -> list[Any]:
    """Run a Python program in two processes that can form a group on the CPU; return what each prints last, as JSON."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.program", program],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    ended = [process.communicate(timeout=LIMIT_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in ended]


Train = Callable[..., Ended]


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`train("recipe=tiny", …, nproc=2)`: `distft train` to its end in a folder of its own."""

    def run(*overrides: str, nproc: int = 1, trackers: str = "[]", **changes: str) -> Ended:
        where = tmp_path_factory.mktemp("train")
        command = [
            sys.executable,
            "-m",
            "distft.cli",
            "train",
            *overrides,
            f"tracking.report_to={trackers}",
            "--nproc",
            str(nproc),
        ]
        if nproc == 1 and torch.cuda.device_count() > 1:
            changes.setdefault("CUDA_VISIBLE_DEVICES", "0")
        return finish(start(command, where, **changes), where)

    return run


@pytest.fixture(scope="session")
def finished(train: Train) -> Ended:
    """A whole run of the embedded recipe on two processes: DDP, 4-bit QLoRA, W&B offline. Read it, change nothing."""
    ended = train("recipe=tiny", "training.max_steps=12", "training.logging_steps=1", nproc=2, trackers="[wandb]")
    assert ended.code == 0, ended.stderr[-3000:]
    return ended


def needs_compiler(strategy: str) -> None:
    if strategy.startswith("zero") and not (shutil.which("c++") or shutil.which("g++")):
        reason = "DeepSpeed compiles a part of itself at first use, and there is no C++ compiler here"
        if os.environ.get("DISTFT_CI"):
            pytest.fail(f"{reason}; .ci/run installs one")
        pytest.skip(reason)
