"""A failure is cured by a restart, or the run ends: a mistake at once, an exception that recurs after two attempts."""

from __future__ import annotations

from pathlib import Path

import pytest

from distft.errors import DataError, WorkerError
from distft.launch import local
from distft.launch.node import Node

MODULE = "tests.launch.failing_worker"
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
