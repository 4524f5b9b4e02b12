"""Each strategy is a class in `distributed/strategies`; no module branches on a strategy's name.

The check reads source text, so that a test can show that it fails on a branch.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import distft

STRATEGIES = {"ddp", "fsdp", "zero2", "zero3", "deepspeed"}  # not `single`: `distft train` counts processes by it
PACKAGE = Path(distft.__file__).parent
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def branches(source: str) -> list[str]:
    """Places in `source` where a strategy's name decides something.

    These are string constants in a comparison (`==`, `!=`, `in`), in the pattern of a `case`, or passed to startswith
    or endswith. Names in types, tables, defaults and messages decide nothing.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        deciding = isinstance(node, ast.Compare | ast.match_case) or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("startswith", "endswith")
        )
        if not deciding:
            continue
        # A `case` decides by its pattern; the nodes of its body are visited separately.
        parts = ast.walk(node.pattern) if isinstance(node, ast.match_case) else ast.walk(node)
        for part in parts:
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.lower() in STRATEGIES:
                found.append(f"line {part.lineno}: {part.value!r}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_module_branches_on_a_strategy_s_name(module: str) -> None:
    assert branches(MODULES[module].read_text(encoding="utf-8")) == []


def test_every_strategy_of_the_recipe_schema_has_a_class() -> None:
    from distft.config.schema import StrategyName
    from distft.distributed.strategies.selection import STRATEGIES as KINDS

    assert list(KINDS) == list(StrategyName.__args__)


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
def test_the_check_sees_branches(source: str, count: int) -> None:
    assert len(branches(source)) == count
