"""What the contracts of import-linter (pyproject.toml, `make lint`) cannot see: what an import of distft costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import distft

PACKAGE = Path(distft.__file__).parent
LIGHT = {
    "cli",
    "config",
    "console",
    "errors",
    "files",
    "hardware",
    "paths",
    "reports",
    "startup",
    "stats",
    "text",
    "upstream_api",
    "upstream_names",
}
"""Tier 1 without the kernels, and the packages whose commands must answer at once."""
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


SOURCES = [
    path for folder in ("src", "tests", "benchmarks") for path in (Path(__file__).parents[1] / folder).rglob("*.py")
]


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert len(lengths) > 300
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def run_python(program: str) -> str:
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_recipes_reports_and_commands_import_without_torch() -> None:
    paths = [path.relative_to(PACKAGE).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))]
    modules = [".".join(("distft", *parts)) for parts in paths if parts[0] in LIGHT and parts[-1] != "__main__"]
    assert len(modules) > 30
    program = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
    loaded = set({HEAVY}) & set(sys.modules)
    assert not loaded, f"{{name}} imports {{loaded}}"
"""
    run_python(program)


def test_import_distft_imports_nothing_else() -> None:
    """Under 0.1 s, which a test does not time: it would be a matter of what the import loads."""
    program = "import sys; before = set(sys.modules); import distft; print(*sorted(set(sys.modules) - before))"
    loaded = set(run_python(program).split())
    assert {name for name in loaded if name.partition(".")[0] == "distft"} == {"distft"}
    assert not loaded & {*HEAVY, "pydantic", "yaml", "numpy"}
