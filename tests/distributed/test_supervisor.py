"""What workers leave for the process that started them: the error of the last attempt, and the start of a call."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import pytest

from distft.distributed.supervisor import (
    ATTEMPT,
    IN_PROCESS,
    OUTCOME,
    PROGRESS,
    Launch,
    leave_error,
    read_error,
    repeats,
)
from distft.errors import DataError, OutOfMemory, RankLost, WorkerError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(OUTCOME, str(tmp_path))
    monkeypatch.setenv(ATTEMPT, "0")
    return tmp_path


def test_a_cause_replaces_its_consequences_and_not_the_other_way_round(folder: Path) -> None:
    assert read_error(folder) is None
    leave_error(RankLost(1, "rank 1 failed"))
    leave_error(OutOfMemory("out of memory on rank 1", {"micro_batch": 4}, restart=True))
    leave_error(RankLost(1, "rank 1 failed"))
    error = read_error(folder)
    assert isinstance(error, OutOfMemory) and error.facts == {"micro_batch": 4} and error.restart


def test_the_last_attempt_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for attempt in range(11):
        monkeypatch.setenv(ATTEMPT, str(attempt))
        leave_error(WorkerError(f"attempt {attempt}"))
    assert str(read_error(folder)) == "attempt 10"


def test_without_a_supervisor_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OUTCOME, raising=False)
    monkeypatch.chdir(tmp_path)
    leave_error(DataError("no data"))
    assert not list(tmp_path.iterdir())


def test_a_run_in_the_caller_s_process_began_with_the_call() -> None:
    launch = Launch.of({IN_PROCESS: "123-1700000000.25", ATTEMPT: "2"})
    assert launch == Launch("123-1700000000.25", 2, 1700000000.25)


def test_a_consequence_does_not_hide_a_mistake(folder: Path) -> None:
    leave_error(DataError("no data"))
    leave_error(WorkerError("rank 1 failed: connection closed by peer"))
    assert str(read_error(folder)) == "no data"


def test_a_failure_is_repeated_if_the_attempt_before_had_it_after_the_same_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PROGRESS, "step", 4)
    assert not repeats("KeyError: 'lm_head' at 0x7f00")
    assert not repeats("TypeError: another rank's"), "all failures of an attempt are known to the next"
    monkeypatch.setenv(ATTEMPT, "1")
    assert not repeats("KeyError: 'lm_heads' at 0x7f00")
    assert repeats("TypeError: another rank's")
    assert repeats("KeyError: 'lm_head' at 0x7fab")
    monkeypatch.setattr(PROGRESS, "step", 5)
    assert not repeats("KeyError: 'lm_head' at 0x7f00")
    monkeypatch.setenv(ATTEMPT, "3")
    assert not repeats("TypeError: another rank's"), "the attempt before did not end so"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, where a launch without a supervisor leaves its markers."""
    monkeypatch.delenv(OUTCOME, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_without_a_launcher_nothing_is_repeated(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ATTEMPT, raising=False)
    for _ in range(2):
        assert not repeats("KeyError: 'lm_head'")
    assert not list(temporary.iterdir())


def test_under_a_bare_launcher_a_failure_is_repeated(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for attempt, repeated in (("0", False), ("1", True)):
        monkeypatch.setenv(ATTEMPT, attempt)
        assert repeats("KeyError: 'lm_head'") is repeated
    assert {stat.S_IMODE(file.stat().st_mode) for file in temporary.iterdir()} == {0o600}


def test_a_marker_is_not_written_through_a_link(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever guesses the name of a marker must not have a user's file overwritten."""
    monkeypatch.setenv(ATTEMPT, "0")
    precious = temporary / "precious"
    precious.write_text("mine")
    assert not repeats("KeyError: 'lm_head'")
    (marker,) = temporary.glob("*.said")
    marker.unlink()
    marker.symlink_to(precious)
    assert not repeats("KeyError: 'lm_head'")
    assert precious.read_text() == "mine"
