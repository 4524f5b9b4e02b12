"""The list of private upstream names is complete, fits the installed versions, and notices when it no longer does."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distft import upstream_api, upstream_names
from distft.errors import UpstreamError
from distft.upstream_names import PRIVATE_NAMES, PrivateName, check

SOURCES = sorted(Path(upstream_api.__file__).parent.rglob("*.py"))
LISTED = {name.name for name in PRIVATE_NAMES}


def imported(name: PrivateName) -> Any:
    """The owner of a listed name, or a skip where its library is not installed."""
    if importlib.util.find_spec(name.module.partition(".")[0]) is None:
        pytest.skip(f"{name.library} is not installed")
    module = importlib.import_module(name.module)
    inside = name.owner.partition(":")[2]
    return getattr(module, inside) if inside else module


def title(name: PrivateName) -> str:
    return f"{name.library}-{name.owner.rpartition(':')[2].rpartition('.')[2]}.{name.name}"


@pytest.mark.parametrize("name", PRIVATE_NAMES, ids=title)
def test_every_name_is_as_expected_in_the_installed_library(name: PrivateName) -> None:
    imported(name)
    assert name.problem() is None
    check(names=[name])


@pytest.mark.parametrize("name", PRIVATE_NAMES, ids=title)
def test_a_name_that_disappears_is_an_error(name: PrivateName, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = imported(name)
    if name.use == "attribute" or name.name == "__init__":  # no class has it, or none is without it
        pattern = name.source or name.name
        name = replace(name, name="_renamed", parameters=("renamed",), source=f"({pattern})_renamed")
    else:
        definer = owner if inspect.ismodule(owner) else next(cls for cls in owner.__mro__ if name.name in vars(cls))
        monkeypatch.delattr(definer, name.name)
    with pytest.raises(UpstreamError) as raised:
        check(names=[name])
    assert name.library in str(raised.value) and name.name in str(raised.value) and name.purpose in str(raised.value)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "name", [each for each in PRIVATE_NAMES if each.parameters and each.name != "__init__"], ids=title
)
def test_a_changed_signature_is_an_error(name: PrivateName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imported(name), name.name, lambda: None)
    with pytest.raises(UpstreamError, match=f"no longer accepts {', '.join(name.parameters)}"):
        check(names=[name])


@pytest.mark.parametrize("name", [each for each in PRIVATE_NAMES if each.use in ("override", "replace")], ids=title)
def test_a_hook_that_is_no_longer_called_is_an_error(name: PrivateName, monkeypatch: pytest.MonkeyPatch) -> None:
    imported(name)
    monkeypatch.setattr(upstream_names, "_source", lambda module: "def nothing_of_the_kind(): ...")
    with pytest.raises(UpstreamError, match=r"no longer (called|used in the same way)"):
        check(names=[name])


def test_only_imported_libraries_of_the_choice_are_checked() -> None:
    absent = PrivateName("torch", "torch.not_imported", "_gone", "call", "test")
    gone = PrivateName("torch", "distft.errors", "_gone", "call", "test")
    check(names=[absent])
    check(["accelerate"], names=[gone])
    with pytest.raises(UpstreamError, match=r"torch [\d.]+.*distft\.errors\._gone is gone"):
        check(["torch"], names=[gone])


def test_the_module_imports_no_library() -> None:
    code = "import sys; import distft.upstream_api; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "trl", "accelerate", "peft"} & set(ast.literal_eval(found))


def test_training_checks_every_overridden_hook_before_it_loads_anything() -> None:
    """`check` looks at imported modules only, so those that hold the hooks must be imported before `train` calls it."""
    hooks = sorted({name.module for name in PRIVATE_NAMES if name.use in ("override", "replace")})
    code = f"import sys; import distft.training.run; print([m for m in {hooks!r} if m not in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.splitlines()[-1] == "[]"


# The sources use no private name that the list lacks ------------------------------------------------------------------


def own_names(*paths: Path) -> set[str]:
    """Private names that functions, classes and assignments in these sources define."""
    found: set[str] = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if is_private(name)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every private name that is imported, read from an object, or named in getattr and its like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("distft"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for name in names if is_private(name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("os", "sys")):  # documented: os._exit
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            what = node.args[1]
            named = str(what.value) if isinstance(what, ast.Constant) else ""
            if node.func.id in ("getattr", "hasattr", "setattr") and is_private(named):
                yield node.lineno, named


def test_no_module_but_the_adapter_uses_a_private_name_of_another_library() -> None:
    own = own_names(*SOURCES)
    overridden = {name.name for name in PRIVATE_NAMES if name.use == "override"}
    found = [
        f"{path.name}:{line}: {name}"
        for path in SOURCES
        if path != Path(upstream_api.__file__)
        for line, name in private_uses(ast.parse(path.read_text(encoding="utf-8")))
        if name not in overridden and name not in (own_names(path) if name in LISTED else own)
    ]
    assert found == [], "call a function of upstream_api instead, and list the name there"


def test_the_adapter_itself_uses_listed_names_only() -> None:
    tree = ast.parse(Path(upstream_api.__file__).read_text(encoding="utf-8"))
    allowed = LISTED | own_names(*SOURCES) | {"_name"}  # of a ctypes library: documented
    assert [name for _, name in private_uses(tree) if name not in allowed] == []


def test_every_listed_name_is_used() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    unused = [name.name for name in PRIVATE_NAMES if len(re.findall(rf"\b{name.name}\b", text)) < 2]
    assert unused == []


def test_no_subclass_collides_with_a_private_name_of_its_base() -> None:
    """A private method or attribute of ours that has the name of one of theirs would replace it unnoticed."""
    from lm_eval.models.huggingface import HFLM
    from transformers import TrainerCallback
    from trl import SFTTrainer

    bases = {"SFTTrainer": SFTTrainer, "TrainerCallback": TrainerCallback, "HFLM": HFLM}
    checked = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [base.id for base in getattr(node, "bases", []) if isinstance(base, ast.Name)]
            for base in (bases[name] for name in names if name in bases):
                checked += 1
                ours = {each.name for each in ast.walk(node) if isinstance(each, ast.FunctionDef)}
                ours |= {
                    each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and is_self(each.value)
                }
                theirs = {name for cls in base.__mro__[:-1] for name in vars(cls)}
                for cls in base.__mro__[:-1]:
                    theirs |= set(re.findall(r"self\.(_\w+)[^=\n]*=[^=]", inspect.getsource(cls)))
                assert {name for name in ours & theirs if is_private(name)} <= LISTED, f"{path.name}: {node}"
    assert checked >= 8
