"""The tests that every run makes are chosen by name, and a name that no test has would choose nothing in silence."""

from __future__ import annotations

from pathlib import Path

from .conftest import EVERY_TIME


def test_every_name_here_is_that_of_a_test() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in EVERY_TIME if f"def {name.partition('[')[0]}(" not in source] == []
