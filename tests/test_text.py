"""Counts, shortened lists and durations in messages."""

from __future__ import annotations

import pytest

from distft.text import count, parse_duration, shorten


def test_a_noun_is_plural_except_after_one() -> None:
    assert [count(n, "process") for n in (0, 1, 2)] == ["0 processes", "1 process", "2 processes"]
    assert count(1_024, "GPU") == "1,024 GPUs"


def test_a_long_list_ends_with_how_many_more_there_are() -> None:
    assert shorten("abc", 3) == "a, b, c"
    assert shorten("abcde", 3, "; ") == "a; b; c and 2 more"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("1:30", 90), ("01:00:00", 3600), ("2-3", 183600), ("2-3:04", 183840), ("1-00:00:01", 86401)],
)
def test_a_duration_is_read_as_sbatch_reads_it(text: str, expected: float) -> None:
    assert parse_duration(text) == expected
