"""Without DeepSpeed and W&B, a recipe that needs one says which, and any other recipe runs."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from distft.api.recipe import load
from distft.distributed.world import World
from distft.errors import RecipeError
from distft.runs.folder import RunFolder
from distft.runs.trackers import trackers


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment where neither package can be found."""
    find = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in ("deepspeed", "wandb") else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.mark.usefixtures("bare")
def test_zero_says_which_extra_it_needs() -> None:
    with pytest.raises(RecipeError, match=r"strategy: needs deepspeed: pip install 'distft\[deepspeed\]'"):
        load(["tiny", "strategy=zero2"])
    assert load(["tiny"]).strategy == "ddp"


@pytest.mark.usefixtures("bare")
def test_a_run_goes_on_without_wandb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world: Any = World.from_environment({})
    assert trackers(load(["tiny"]), RunFolder(tmp_path / "run"), world) == []
    assert "wandb is not installed (pip install 'distft[wandb]')" in capsys.readouterr().err
