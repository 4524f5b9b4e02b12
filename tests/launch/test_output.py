"""What a child prints appears where this process prints, also if that is not a file descriptor."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from distft.launch import output

PROGRAM = """
import subprocess, sys, time
print("one", flush=True)
print("zwei: ä", file=sys.stderr, flush=True)
sys.stdout.write("\\r50%\\r100%")
sys.stdout.flush()
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])  # keeps the pipes open
with open(sys.argv[1], "w") as file:
    file.write(str(grandchild.pid))
sys.exit(3)
"""


def test_a_child_s_output_is_copied_and_its_end_is_not_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown, warned = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", warned)
    pipe = output.pipe()
    assert pipe == subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "pid")], stdout=pipe, stderr=pipe)
    assert output.wait(child) == 3
    grandchild = psutil.Process(int((tmp_path / "pid").read_text()))
    assert grandchild.is_running() and grandchild.status() != psutil.STATUS_ZOMBIE, "it waited for the grandchild"
    grandchild.kill()
    assert (shown.getvalue(), warned.getvalue()) == ("one\n\r50%\r100%", "zwei: ä\n")


def test_streams_of_the_process_itself_are_inherited() -> None:
    code = "from distft.launch import output; print(output.pipe())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "None\n"
