"""Where distft keeps its cache, and what happens where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distft.errors import StorageError
from distft.files import build_folder_once
from distft.paths import cache_folder


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DISTFT_CACHE": "/scratch/cache"}, "/scratch/cache"),
        ({"DISTFT_CACHE": "~/x"}, "/home/me/x"),
        ({"DISTFT_CACHE": ""}, "/home/me/.cache/distft"),
        ({"DISTFT_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/distft"),
        ({}, "/home/me/.cache/distft"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISTFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == expected


def as_nobody(work: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `work` as a user that has neither an entry in the list of users nor HOME."""
    if os.getuid() != 0:
        pytest.skip("needs root to become another user")
    program = (
        "import os, pwd, sys\n"
        "from pathlib import Path\n"
        "from distft.distributed.process import guarded\n"
        "from distft.files import build_folder_once\n"
        "from distft.paths import cache_folder\n"
        "os.setgroups([]), os.setgid(54_321), os.setuid(54_321)\n"
        f"sys.exit(guarded(lambda: {work}))"
    )
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH")}
    return subprocess.run([sys.executable, "-c", program], env=kept | variables, capture_output=True, text=True)


BUILD = 'build_folder_once(cache_folder() / "x", lambda folder: None)'


def test_a_user_without_a_home_is_told_what_to_set(tmp_path: Path) -> None:
    ended = as_nobody(BUILD)
    assert (ended.returncode, ended.stderr) == (
        2,
        "distft: this user has no home folder: set HOME to a folder that can be written\n",
    )
    assert as_nobody("Path('~/runs').expanduser()").stderr == ended.stderr
    mine = tmp_path / "mine"
    mine.mkdir()
    for folder in (mine, *mine.parents):
        folder.chmod(folder.stat().st_mode | 0o005)
    os.chown(mine, 54_321, 54_321)
    assert as_nobody(BUILD, DISTFT_CACHE=str(mine)).returncode == 0
    assert (mine / "x").is_dir()


@pytest.mark.parametrize("home", ["/", "/nowhere"])
def test_a_cache_that_cannot_be_written_is_named(home: str) -> None:
    ended = as_nobody(BUILD, HOME=home)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"distft: the cache {Path(home)}".rstrip("/")) and "Traceback" not in ended.stderr
    assert "set DISTFT_CACHE to a folder that can" in ended.stderr


def test_a_cache_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"the cache .*/file/data cannot be written \(Not a directory\)"):
        build_folder_once(tmp_path / "file" / "data" / "x", lambda folder: None)


def test_any_file_without_permission_is_a_mistake() -> None:
    ended = as_nobody("open('/x', 'w')")
    assert ended.returncode == 2
    assert ended.stderr == "distft: /x: Permission denied; change its permissions, or choose another place\n"
