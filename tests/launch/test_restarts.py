"""A failure is cured by a restart, or the run ends: a mistake at once, an exception that recurs after two attempts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distft.errors import DataError, WorkerError
from distft.launch import local
from distft.launch.node import Node
from distft.training.beside import free_port

MODULE = "tests.launch.failing_worker"
LIMIT_S = 300
SAME = "ended in the same way, after the same step (7), so the run is not started again"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}:{Path(__file__).parents[2] / 'src'}")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("how", "attempts", "code", "kind"),
    [("same", "01", 1, WorkerError), ("elsewhere", "0123", 1, WorkerError), ("mistake", "0", 2, DataError)],
)
def test_one_process_is_started_again_as_long_as_it_gets_on(
    how: str, attempts: str, code: int, kind: type[Exception], capfd: pytest.CaptureFixture[str]
) -> None:
    ended = local.run([how], 1, 3, Node(), MODULE)
    assert Path("attempts").read_text() == attempts
    assert ended.code == code and type(ended.error) is kind
    stderr = capfd.readouterr().err
    assert (SAME in str(ended.error), SAME in stderr) == (how == "same", how == "same")
    assert stderr.count("Traceback") == (0 if how == "mistake" else len(attempts))


@pytest.mark.parametrize(("how", "attempts", "code"), [("same", "01", 1), ("mistake", "0", 2)])
def test_several_processes_are_not_started_again_either(
    how: str, attempts: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 waits for rank 0 and does not know: its launcher starts the group again, to no effect."""
    ended = local.run([how], 2, 3, Node(), MODULE)
    assert Path("attempts").read_text() == attempts
    assert ended.code == code
    stderr = capfd.readouterr().err
    assert stderr.count(SAME) == (1 if how == "same" else 0)
    assert stderr.count("distft: no such column") == (1 if how == "mistake" else 0)


def test_under_a_bare_launcher_there_is_no_third_attempt_either() -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = ["--max_restarts", "3", "--main_process_port", str(free_port())]
    command = [*launcher, *options, "-m", MODULE, "same"]
    environment = {**os.environ, "DISTFT_TESTS_EXEC": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    assert Path("attempts").read_text() == "01"
    assert ended.returncode != 0 and ended.stderr.count(SAME) == 1


def test_on_two_nodes_the_third_start_ends_before_it_does_anything() -> None:
    """One launcher cannot end the other, which would wait for it. Both start the group again, whose ranks end."""
    meeting = f"127.0.0.1:{free_port()}"
    own = {"GLOO_SOCKET_IFNAME": "lo", "DISTFT_TESTS_EXEC": "1"}
    nodes = []
    for rank in (0, 1):
        imports = "import sys; from distft.launch import local; from distft.launch.node import Node"
        run = f"ended = local.run(['same'], 1, 3, Node(2, {rank}, '{meeting}'), '{MODULE}')"
        command = [sys.executable, "-c", f"{imports}; {run}; sys.exit(ended.code)"]
        pipe = subprocess.PIPE
        nodes.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **own}))
    stderr = "".join(node.communicate(timeout=LIMIT_S)[1] for node in nodes)
    assert Path("attempts").read_text() == "01", stderr
    assert [node.returncode for node in nodes] == [1, 1], stderr
    assert SAME in stderr
