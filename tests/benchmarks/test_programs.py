"""Every benchmark program imports, and what some of them replace in distft exists."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("program", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_programs_import(program: str) -> None:
    importlib.import_module(program)


def test_names_that_programs_replace_exist() -> None:
    from distft.runs import manifest
    from distft.training import checkpoints, stopping, trainer, watchdog

    assert callable(trainer.keep_adapter_in_fp32)  # precision.py
    assert callable(trainer.Trainer) and callable(manifest.write)  # overhead.py
    assert {"on_step_begin", "on_step_end"} <= vars(watchdog.Watchdog).keys() & vars(stopping.StopTogether).keys()
    assert "save" in vars(checkpoints.Checkpoints)
