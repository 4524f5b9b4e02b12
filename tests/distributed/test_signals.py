"""Which signals stop a process, and which are repetitions; the processes here only wait."""

from __future__ import annotations

import signal
import subprocess
import sys
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, Signals

import pytest

PROGRAM = """
import signal, sys, time
from distft.distributed.process import guarded
from distft.distributed.signals import STOP, handling

def work():
    STOP.deferred = "deferred" in sys.argv
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "end\\n":
            print(STOP.signum and signal.Signals(STOP.signum).name, flush=True)
            return
        print("alive", flush=True)

def handle(signum, frame):
    print("handled", flush=True)

if "handling" in sys.argv:
    with handling({signal.SIGHUP: handle}):
        work()
else:
    sys.exit(guarded(work))
"""


def begin(*words: str, ignored: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, *words]
    if ignored:  # as nohup does
        command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("signum", [SIGHUP, SIGTERM, SIGUSR1])
def test_a_signal_ends_a_command_with_75(signum: Signals) -> None:
    process = begin()
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (75, f"distft: stopped by {signum.name}\n")


@pytest.mark.parametrize("how", ["guarded", "handling"])
def test_a_hangup_is_ignored_where_it_was_ignored_before(how: str) -> None:
    process = begin(how, ignored=True)
    process.send_signal(SIGHUP)
    stdout, stderr = process.communicate("x\nend\n", timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "alive\nNone\n", "")


@pytest.mark.parametrize(("first", "second"), [(SIGHUP, SIGTERM), (SIGTERM, SIGHUP), (SIGHUP, SIGHUP)])
def test_the_signals_of_a_session_s_end_are_one_request(first: Signals, second: Signals) -> None:
    """systemd sends SIGTERM and SIGHUP: the second must not end a run that is about to save."""
    process = begin("deferred")
    assert process.stdin is not None and process.stdout is not None
    for signum in (first, second):
        process.send_signal(signum)
        process.stdin.write("x\n")
        process.stdin.flush()
        assert process.stdout.readline() == "alive\n"
    stdout, _ = process.communicate("end\n", timeout=60)
    assert (process.returncode, stdout) == (0, f"{first.name}\n")


def test_another_signal_ends_a_run_that_is_about_to_stop() -> None:
    process = begin("deferred")
    assert process.stdin is not None and process.stdout is not None
    process.send_signal(SIGHUP)
    process.stdin.write("x\n")
    process.stdin.flush()
    assert process.stdout.readline() == "alive\n"
    process.send_signal(SIGINT)
    assert process.wait(timeout=60) == 75


def test_a_hangup_is_among_the_signals_that_a_parent_passes_on() -> None:
    from distft.distributed.signals import STOPPING

    assert set(STOPPING) == {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
