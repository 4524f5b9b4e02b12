"""Fixtures of the data tests: prepared samples from an empty cache, and the real data samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.data.prepare import prepare_data
from tests.data.rows import Prepare, recipe_of


@pytest.fixture
def prepare(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """`prepare_data` for the tiny recipe with overrides, with an empty cache: an old one may come from other code."""
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    return lambda *overrides: prepare_data(recipe_of(*overrides), tokenizer)


@pytest.fixture
def dolly(shared_data: Path) -> str:
    return f"data.path={shared_data / 'dolly_sample.jsonl'}"


@pytest.fixture
def imdb(shared_data: Path) -> tuple[str, str]:
    return "data.name=imdb", f"data.path={shared_data / 'imdb_sample.jsonl'}"
