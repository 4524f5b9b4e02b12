"""What a child prints appears where this process prints, also if that is not a file descriptor."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest

from distft.launch import output

PROGRAM = """
import subprocess, sys, time
print("one", flush=True)
print("zwei: ä", file=sys.stderr, flush=True)
sys.stdout.write("\\r50%\\r100%")
sys.stdout.flush()
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])  # keeps the pipes open
sys.exit(3)
"""


def test_a_child_s_output_is_copied_and_its_end_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, warned = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", warned)
    pipe = output.pipe()
    assert pipe == subprocess.PIPE
    began = time.monotonic()
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=pipe, stderr=pipe)
    assert output.wait(child) == 3
    assert time.monotonic() - began < 25
    assert (shown.getvalue(), warned.getvalue()) == ("one\n\r50%\r100%", "zwei: ä\n")


def test_streams_of_the_process_itself_are_inherited() -> None:
    code = "from distft.launch import output; print(output.pipe())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "None\n"
