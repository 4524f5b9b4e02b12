"""`import distft` is instant and offers the whole Python API."""

from __future__ import annotations

import subprocess
import sys

import pytest

import distft

NAMES = ("Run", "check", "compare", "errors", "evaluate", "load_recipe", "report", "submit", "train")


def test_importing_distft_takes_less_than_a_tenth_of_a_second() -> None:
    code = (
        "import time; began = time.process_time(); import distft; took = time.process_time() - began; "
        "import sys; print(took, len({'torch', 'numpy', 'pydantic', 'trl'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took, heavy = ended.stdout.split()
    assert float(took) < 0.1 and heavy == "0"


def test_every_name_of_the_api_is_there() -> None:
    assert set(NAMES) <= set(distft.__all__) and set(NAMES) <= set(dir(distft))
    assert all(getattr(distft, name).__doc__ for name in NAMES)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        distft.trian  # type: ignore[attr-defined]  # noqa: B018


def test_the_function_train_is_not_lost_to_the_module_of_that_name() -> None:
    code = (
        "import distft.train\n"
        "try: distft.train('no-such-recipe')\n"
        "except distft.errors.RecipeError as error: print(error)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "there is no recipe 'no-such-recipe'" in ended.stdout, ended.stderr
