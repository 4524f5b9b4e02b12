"""A machine whose host name has no address, as in many containers: here one in a UTS namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distft.launch.command import worker_command, worker_environment
from distft.launch.node import Node

ROOT = Path(__file__).parents[2]
IN_NAMESPACE = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host.invalid && exec "$@"', "sh"]


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    made = shutil.which("unshare") and subprocess.run([*IN_NAMESPACE, "true"], capture_output=True).returncode == 0
    if not made:
        why = "needs root to make a UTS namespace"
        pytest.fail(why) if os.environ.get("DISTFT_CI") else pytest.skip(why)


def test_two_processes_meet_without_it(tmp_path: Path) -> None:
    environment = worker_environment({**os.environ, "PYTHONPATH": str(ROOT)}, 2, tmp_path, Node())
    command = worker_command([], 2, 0, Node(), "tests.launch.reduce_worker")
    ended = subprocess.run(
        [*IN_NAMESPACE, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    assert {path.name: path.read_text() for path in tmp_path.glob("rank-*")} == {"rank-0": "2.0", "rank-1": "2.0"}


def test_doctor_finds_it() -> None:
    code = "from distft.doctor.network import host; print(host())"
    ended = subprocess.run([*IN_NAMESPACE, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "Host(name='no-such-host.invalid', addresses=(), here=False)\n"
