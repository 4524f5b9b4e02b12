"""Atomic writes, folders built once, strict JSON."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distft.files import build_folder_once, to_json, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "deep" / "file", "old")
    write_atomically(tmp_path / "deep" / "file", "new")
    assert (tmp_path / "deep" / "file").read_text() == "new"
    assert names(tmp_path / "deep") == ["file"]


def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):  # a lone surrogate has no UTF-8
        write_atomically(tmp_path / "file", "x" * 100_000 + "\ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_nan_and_infinities_become_null_at_any_depth() -> None:
    record = {"loss": float("nan"), "eval": {"perplexity": float("inf"), "all": [1.0, float("-inf"), (float("nan"),)]}}
    assert json.loads(to_json(record)) == {"loss": None, "eval": {"perplexity": None, "all": [1.0, None, [None]]}}


def test_a_value_of_another_type_becomes_its_str() -> None:
    assert json.loads(to_json({"folder": Path("runs/tiny")})) == {"folder": "runs/tiny"}


def test_a_folder_is_built_once_however_many_ask_for_it(tmp_path: Path) -> None:
    builds = []

    def build(temporary: Path) -> None:
        builds.append(threading.get_ident())
        (temporary / "first").write_text("1")
        time.sleep(0.2)
        (temporary / "second").write_text("2")

    def ask(_: int) -> list[str]:
        build_folder_once(tmp_path / "deep" / "made", build)
        return names(tmp_path / "deep" / "made")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [["first", "second"]] * 4
    assert len(builds) == 1


def test_a_failed_build_leaves_no_folder_and_the_next_call_builds_again(tmp_path: Path) -> None:
    def fail(temporary: Path) -> None:
        (temporary / "half").write_text("")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        build_folder_once(tmp_path / "made", fail)
    assert names(tmp_path) in (["made.lock"], [])
    build_folder_once(tmp_path / "made", lambda temporary: (temporary / "whole").touch())
    assert names(tmp_path / "made") == ["whole"]
