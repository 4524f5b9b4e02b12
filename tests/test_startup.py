"""What processes of distft do first: they import nothing from the working folder, and printing never ends them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

SHADOWS = ("accelerate", "datasets", "psutil", "pydantic", "tokenizers", "torch", "trl", "yaml")
EXECUTED = {**os.environ, "DISTFT_TESTS_EXEC": "1"}


def shadowed(folder: Path) -> Path:
    """A folder of a user who has named modules like the libraries."""
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"open('executed', 'a').write('{name} ')\n")
    return folder


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["distft.cli", "recipes", "validate", "tiny"], 0, ""),
        (["distft.train", "recipe=no-such-recipe"], 2, "distft: the recipe has a fault:"),
    ],
    ids=["command", "worker"],
)
def test_modules_in_the_working_folder_are_not_executed(
    command: list[str], code: int, said: str, tmp_path: Path
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", *command], cwd=shadowed(tmp_path), env=EXECUTED, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr[: len(said)]) == (code, said), ended.stderr
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()


def test_processes_that_they_start_do_not_execute_them_either(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys\n"
        "from distft.startup import start_up\n"
        "start_up()\n"
        "sys.exit(subprocess.call([sys.executable, '-m', 'psutil']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=shadowed(tmp_path), capture_output=True, text=True)
    assert "'psutil' is a package and cannot be directly executed" in ended.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict", "utf-8:strict"])
def test_a_character_that_the_terminal_lacks_is_printed_as_an_escape(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("# Größe → 3\nextends: tiny\n", encoding="utf-8")
    environment = {**EXECUTED, "PYTHONIOENCODING": encoding}
    for words, code in ((["recipes", "list"], 0), (["recipes", "validate", "mine", "lora.größe→=1"], 2)):
        ended = subprocess.run(
            [sys.executable, "-m", "distft.cli", *words], cwd=tmp_path, env=environment, capture_output=True
        )
        shown = (ended.stdout + ended.stderr).decode(encoding.partition(":")[0])
        assert ended.returncode == code and "Traceback" not in shown, shown
        assert ("→" if "utf" in encoding else "\\u2192") in shown
        assert ("größe" if encoding != "ascii" and "ascii:" not in encoding else "gr\\xf6\\xdfe") in shown.lower()


def test_a_terminal_that_was_closed_does_not_end_a_process() -> None:
    program = (
        "import os, sys\n"
        "from distft.startup import start_up\n"
        "start_up()\n"
        "assert sys.stderr.isatty() and sys.stderr.fileno() == 2\n"
        "print('ready', file=sys.stderr)\n"
        "os.read(0, 1)\n"
        "print('lost', file=sys.stderr, flush=True)\n"
        "print('lost', flush=True)\n"
        "sys.exit(7)"
    )
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    assert os.read(ours, 100).strip() == b"ready"
    os.close(ours)
    child.communicate(b"x")
    assert child.returncode == 7
