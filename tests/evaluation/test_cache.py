from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distft.distributed.world import World
from distft.errors import DataError
from distft.evaluation.cache import complete, key_of
from distft.files import read_lines


def squares(asked: list[int]) -> Any:
    def work(share: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        asked.extend(share)
        yield from ((index, {"square": index**2}) for index in reversed(share))

    return work


def test_records_keep_the_order_of_their_keys_and_the_costliest_are_made_first(tmp_path: Path) -> None:
    asked: list[int] = []
    keys = [key_of(number) for number in range(5)]
    found = complete(tmp_path / "a.jsonl", keys, squares(asked), World(), costs=[1, 5, 2, 4, 3])
    assert asked == [1, 3, 4, 2, 0]
    assert found == read_lines(tmp_path / "a.jsonl") == [{"key": key, "square": n**2} for n, key in enumerate(keys)]


def test_cached_records_are_not_made_again_and_those_of_others_are_kept(tmp_path: Path) -> None:
    asked: list[int] = []
    complete(tmp_path / "a.jsonl", ["x", "y"], squares(asked), World())
    found = complete(tmp_path / "a.jsonl", ["y", "z", "z"], squares(asked), World())
    assert asked == [0, 1, 1]  # items with the same key are made once
    assert [record["key"] for record in found] == ["y", "z", "z"]
    assert [record["key"] for record in read_lines(tmp_path / "a.jsonl")] == ["y", "z", "x"]


def test_files_of_killed_ranks_are_read_by_any_number_of_processes(tmp_path: Path) -> None:
    for rank, key in ((0, "x"), (7, "z")):
        lines = json.dumps({"key": key, "square": -1}) + '\n{"key": "to'
        (tmp_path / f"a.rank{rank}.jsonl").write_text(lines, encoding="utf-8")
    asked: list[int] = []
    found = complete(tmp_path / "a.jsonl", ["x", "y", "z"], squares(asked), World())
    assert asked == [1] and [record["square"] for record in found] == [-1, 1, -1]
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_records_made_before_a_failure_are_kept(tmp_path: Path) -> None:
    def work(share: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield share[0], {"square": 0}
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        complete(tmp_path / "a.jsonl", ["x", "y"], work, World())
    asked: list[int] = []
    complete(tmp_path / "a.jsonl", ["x", "y"], squares(asked), World())
    assert asked == [1]


def test_keys_depend_on_the_content(tmp_path: Path) -> None:
    assert key_of({"a": 1, "b": 2}, [3]) == key_of({"b": 2, "a": 1}, [3]) != key_of({"a": 1, "b": 2}, [4])
