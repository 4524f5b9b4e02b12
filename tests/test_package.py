"""`pip install .` is enough: the wheel carries the files that distft reads at run time, and they are found without a
checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from distft.config.files import list_recipes
from distft.experiments.schema import list_experiments

ROOT = Path(__file__).parents[1]


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--disable-pip-version-check", "-q"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", ".", "--no-build-isolation", "--wheel-dir", str(folder))  # hatchling is of the dev extra
    (built,) = folder.glob("distft-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel alone."""
    folder = tmp_path_factory.mktemp("site-packages")
    pip("install", "--target", str(folder), str(wheel))
    return folder


def test_files_read_at_run_time_travel_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [*ROOT.glob("recipes/**/*"), *ROOT.glob("accelerate_configs/*.yaml"), ROOT / "slurm" / "train.sbatch"]
    expected = {f"distft/{path.relative_to(ROOT).as_posix()}" for path in shipped if path.is_file()}
    assets = [path for path in (ROOT / "src" / "distft" / "assets").iterdir() if path.is_file()]
    expected |= {f"distft/assets/{path.name}" for path in assets} | {"distft/py.typed"}
    assert {
        "distft/recipes/tiny.yaml",
        "distft/recipes/experiments/tiny.yaml",
        "distft/recipes/recipe.schema.json",
        "distft/slurm/train.sbatch",
    } <= expected
    assert not expected - names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith("distft")]


def test_an_installed_distft_needs_no_checkout(installed: Path, tmp_path: Path) -> None:
    def distft(*words: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "distft.cli", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert [line.split()[0] for line in distft("recipes", "list").splitlines()] == list(list_recipes(tmp_path))
    assert [line.split()[0] for line in distft("experiments", "list").splitlines()] == list(list_experiments(tmp_path))
    shown = distft("recipes", "show", "tiny")
    assert str(installed / "distft" / "recipes" / "tiny.yaml") in shown
    assert str(ROOT) not in shown
