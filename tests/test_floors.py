"""The house stands: modules import downwards only, and strategies are told apart in one room.

The checks read source text, so that they can be shown to fail on a tampered one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import distft

FLOORS = (
    (
        "errors",
        "packaged",
        "batch",
        "yaml12",
        "kernels",
        "recompute",
        "offline",
        "head",
        "intervals",
        "equality",
        "devices",
        "section",
        "sentiment",
        "evaluation.figures",
        "evaluation.columns",
        "evaluation.verdicts",
        "evaluation.vllm_worker",
    ),
    (
        "sections",
        "run",
        "world",
        "dropout",
        "fsdp2",
        "sharding",
        "weights",
        "verdict",
        "bound",
        "drawing",
        "evaluation.settings",
        "evaluation.details",
    ),
    ("upstream",),
    ("origin", "launcher", "results", "history", "lora_nodes"),
    ("recipe_file", "report"),
    (
        "recipe",
        "machine",
        "samples",
        "plan",
        "manifest",
        "markdown",
        "charts",
        "evaluation_charts",
        "fused",
        "evaluation.journal",
    ),
    (
        "outcome",
        "strategy",
        "tiny",
        "attention",
        "loader",
        "logs",
        "experiment_file",
        "page",
        "wandb_report",
        "evaluation.checks",
        "evaluation.writing",
    ),
    (
        "model",
        "data",
        "telemetry",
        "trackers",
        "profile",
        "bad_numbers",
        "checkpoint",
        "record",
        "launch",
        "slurm",
        "stopping",
        "experiment",
        "bandwidth",
        "evaluation.scores",
        "evaluation.vllm_engine",
    ),
    ("watch", "trainer", "estimate", "probe", "fetch", "preview", "facts", "live", "evaluation.target"),
    (
        "memory",
        "submission",
        "doctor",
        "evaluation.generation",
        "evaluation.reviews",
        "evaluation.endpoint",
        "evaluation.likelihood",
    ),
    ("train", "trial", "evaluation.judge", "evaluation.perplexity", "evaluation.imdb", "evaluation.lm_eval"),
    ("evaluation.mt_bench", "evaluation.alpaca", "evaluation.fetching"),
    ("evaluation.ready",),
    ("evaluation.tasks", "compare"),
    ("evaluation.__main__",),
    ("commands",),
    ("cli",),
)
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}
STRATEGIES = {"ddp", "fsdp", "zero2", "zero3", "deepspeed"}  # not `single`: `distft train` counts processes by it
ROOM = "strategy"  # the one that may branch on them

PACKAGE = Path(distft.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
SUBPACKAGES = {module.partition(".")[0] for module in SOURCES if "." in module}


def imported(source: str) -> Iterator[str]:
    """Modules of distft that `source` imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` and `from .x import y` are `from distft import x` and `from distft.x import y`.
            base = ".".join(part for part in ("distft" if node.level else "", node.module or "") if part)
            # What the package itself offers (`__version__`) is no module.
            names = (
                [f"{base}.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
                if base in ("distft", *(f"distft.{name}" for name in SUBPACKAGES))
                else [base]
            )
        else:
            continue
        yield from (_module(name) for name in names if name.startswith("distft."))


def _module(name: str) -> str:
    """`distft.a.b` as `a.b` where `a` is a sub-package, else `a`: what comes after it is no module."""
    parts = name.split(".")[1:]
    return ".".join(parts[: 2 if parts[0] in SUBPACKAGES else 1])


def climbs(module: str, source: str) -> list[str]:
    """Imports of `module` that do not go to a strictly lower floor."""
    return [name for name in imported(source) if name not in FLOOR or FLOOR[name] >= FLOOR[module]]


def branches(source: str) -> list[str]:
    """Places where a strategy's name decides: a string constant inside a comparison (`==`, `!=`, `in`), in a `case`, or
    as the argument of startswith or endswith. Names in types, tables, defaults and messages decide nothing."""
    found = []
    for node in ast.walk(ast.parse(source)):
        deciding = isinstance(node, ast.Compare | ast.match_case) or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("startswith", "endswith")
        )
        if not deciding:
            continue
        # A `case` decides by its pattern; its body is looked at on its own.
        parts = ast.walk(node.pattern) if isinstance(node, ast.match_case) else ast.walk(node)
        for part in parts:
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.lower() in STRATEGIES:
                found.append(f"line {part.lineno}: {part.value!r}")
    return found


def test_every_module_has_a_floor_and_every_floor_its_modules() -> None:
    assert set(SOURCES) == set(FLOOR)


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_from_lower_floors_only(module: str) -> None:
    assert climbs(module, SOURCES[module]) == []


@pytest.mark.parametrize("module", [module for module in SOURCES if module != ROOM])
def test_a_module_does_not_branch_on_a_strategy(module: str) -> None:
    assert branches(SOURCES[module]) == []


def test_the_room_of_the_strategies_does_branch_on_them() -> None:
    """Else the rule has lost sight of how strategies are told apart."""
    assert branches(SOURCES[ROOM])


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from distft.train import main", ["train"]),  # upward
        ("from distft.model import load_model", ["model"]),  # sideways
        ("from distft import recipe, telemetry", ["telemetry"]),
        ("import distft.cli as entry", ["cli"]),
        ("from .trainer import Trainer", ["trainer"]),
        ("from . import checkpoint", ["checkpoint"]),
        ("def later():\n    from distft.launch import run", ["launch"]),
        ("from distft.utils import anything", ["utils"]),  # has no floor
        ("from distft.evaluation.target import Target", ["evaluation.target"]),
        ("from distft.evaluation import tasks, settings", ["evaluation.tasks"]),
        ("from distft.evaluation.figures import Estimate", []),
        ("from distft import __version__\nfrom distft.recipe import Recipe\nimport datasets", []),
    ],
)
def test_the_check_of_imports_sees(line: str, found: list[str]) -> None:
    assert climbs("data", line) == found


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('if recipe.strategy == "fsdp": pass', 1),
        ('if "ddp" != name: pass', 1),
        ('if name in ("zero2", "zero3"): pass', 2),
        ('shards = name not in {"single", "ddp"}', 1),
        ('if state.distributed_type == "DEEPSPEED": pass', 1),
        ('match name:\n    case "fsdp" | "zero3":\n        pass', 2),
        ('loss = 1 if name == "ddp" else 2', 1),
        ('if name.startswith("fsdp"): pass', 1),
        ('Name = Literal["single", "ddp", "fsdp"]', 0),
        ('PACKAGES = ("torch", "deepspeed")\nprint("ddp")', 0),
        ('one = recipe.strategy == "single"', 0),
    ],
)
def test_the_check_of_branches_sees(source: str, count: int) -> None:
    assert len(branches(source)) == count
