"""Each rank has its log, and what the user must see stands on the console whichever rank says it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HEAD = re.compile(r"^── \d{4}-\d\d-\d\d .*, pid \d+, attempt (\d+) ──$", re.MULTILINE)

# One rank that prints from Python, from below it, through a logger that outlives the log, and as distft does.
RANK = """
import logging, os, sys
from pathlib import Path
from distft.runs.logs import rank_log
from distft.runs.folder import RunFolder
from distft.console import say
from distft.distributed.world import World

try:
    with rank_log(RunFolder(Path("run")), World(rank=int(sys.argv[1]), world_size=int(sys.argv[2]))):
        logger = logging.getLogger()
        logger.addHandler(logging.StreamHandler())
        print("printed")
        os.system("echo from below >&2")
        print("\\r 50%|█████     |", end="", file=sys.stderr, flush=True)
        logger.warning("logged")
        say("said")
        1 / 0
except ZeroDivisionError:
    logger.warning("logged after")
    say("said after")
    os.system("echo from below after")
"""


def rank(where: Path, number: int, size: int = 2, attempt: int = 0) -> subprocess.CompletedProcess[str]:
    (where / "run").mkdir(exist_ok=True)
    ended = subprocess.run(
        [sys.executable, "-c", RANK, str(number), str(size)],
        cwd=where,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TORCHELASTIC_RESTART_COUNT": str(attempt)},
    )
    assert ended.returncode == 0, ended.stderr
    return ended


def test_another_rank_has_its_output_in_its_log_alone(tmp_path: Path) -> None:
    for attempt in (0, 1):
        ended = rank(tmp_path, 3, size=4, attempt=attempt)
        assert ended.stdout == "from below after\n"
        assert ended.stderr == "distft: said\nlogged after\ndistft: said after\n"
    (path,) = (tmp_path / "run" / "logs").iterdir()
    text = path.read_text()
    assert path.name == "rank3.log"
    assert HEAD.findall(text) == ["0", "1"], "appended to at each start"
    for line in ("printed", "from below", "logged", "distft: said", "ZeroDivisionError: division by zero"):
        assert text.count(f"{line}\n") == 2, line
    assert "after" not in text and "%" not in text


def test_rank_0_stands_in_both(tmp_path: Path) -> None:
    ended = rank(tmp_path, 0)
    assert ended.stdout == "printed\nfrom below after\n"
    assert ended.stderr == "from below\n\n 50%|█████     |logged\ndistft: said\nlogged after\ndistft: said after\n"
    text = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert text.splitlines()[1:4] == ["printed", "logged", "distft: said"]
    assert text.endswith("ZeroDivisionError: division by zero\n")


def test_one_process_alone_has_the_console(tmp_path: Path) -> None:
    assert "distft: said\n" in rank(tmp_path, 0, size=1).stderr
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_a_full_disk_costs_the_log_and_nothing_else(number: int, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "logs"
    folder.mkdir(parents=True)
    (folder / f"rank{number}.log").symlink_to("/dev/full")
    ended = rank(tmp_path, number)
    assert ended.stderr.count("warning: a rank's log cannot be written (No space left on device)") == 1
    assert "distft: said\n" in ended.stderr and "distft: said after\n" in ended.stderr
    assert ("printed" in ended.stdout) == (number == 0)


def test_a_folder_that_takes_no_log_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "logs").touch()
    ended = rank(tmp_path, 1)
    assert "warning: rank 1 has no log" in ended.stderr and "distft: said\n" in ended.stderr
    assert "printed\n" in ended.stdout
