"""Find a recipe's files, read them and merge them with the overrides; `distft.config.recipe` validates the result."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distft.config.validation import COMMAND_LINE, DERIVED, Source, nearest
from distft.config.yaml import parse_yaml
from distft.errors import Fault, RecipeError
from distft.paths import packaged

DEFAULT_RECIPE = "tiny"
_SHORT = "evaluation.judge"  # a plain name is short for its `model`


def read_values(arguments: Sequence[str], folder: Path, faults: list[Fault]) -> tuple[dict[str, Any], Source]:
    """The merged values of files and overrides, and where each came from. Appends what is wrong to `faults`.

    Raises:
        RecipeError: the recipe does not exist, or a file cannot be read.
    """
    overrides, wanted = _read_overrides(arguments, folder, faults)
    name, files, merged, origins = _read_files(wanted, folder, faults)
    if not files:
        raise RecipeError(faults)
    for key, value in overrides:
        _assign(merged, key.split("."), value)
        origins = {k: v for k, v in origins.items() if not related(k, key)} | {key: COMMAND_LINE}
    run = merged.setdefault("run", {})
    if isinstance(run, dict) and run.get("name") in (None, ""):
        run["name"], origins["run.name"] = folder_name(name), DERIVED
    return merged, Source(name, files, origins)


def related(key: str, other: str) -> bool:
    """Whether two dotted keys are equal, or one contains the other."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def recipe_folders(folder: Path) -> list[Path]:
    return [path for path in (folder / "recipes", packaged("recipes")) if path.is_dir()]


def list_recipes(folder: Path) -> dict[str, Path]:
    """Every recipe by name; one in `folder`/recipes hides a shipped recipe of the same name."""
    found: dict[str, Path] = {}
    for place in recipe_folders(folder):
        for path in yaml_files(place):
            found.setdefault(path.stem, path)
    return found


def yaml_files(folder: Path) -> list[Path]:
    """The YAML files in a folder, by name."""
    return sorted(path for path in folder.glob("*") if is_yaml(path.name) and path.is_file())


def is_yaml(name: str) -> bool:
    return name.lower().endswith((".yaml", ".yml"))


def folder_name(name: str) -> str:
    """A plain name for the run folder of a recipe or experiment whose file may be called anything."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-") or "run"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping from a file.

    Raises:
        RecipeError: it is unreadable, not YAML, or not a mapping.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([Fault(str(path), "", f"cannot be read: {error}")]) from error
    except ValueError as error:
        raise RecipeError([Fault(str(path), "", f"is not valid YAML: {error}")]) from error
    if not isinstance(content, dict):
        raise RecipeError([Fault(str(path), "", "expected a mapping of sections, got " + type(content).__name__)])
    return content


def _read_overrides(arguments: Sequence[str], folder: Path, faults: list[Fault]) -> tuple[list[tuple[str, Any]], str]:
    """The keys with their values, and the recipe: `recipe=NAME`, or a word that names one."""
    overrides: list[tuple[str, Any]] = []
    wanted = DEFAULT_RECIPE
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if any("\ud800" <= character <= "\udfff" for character in argument):
            problem = f"is not text in this terminal's encoding ({sys.getfilesystemencoding()})"
            faults.append(Fault(COMMAND_LINE, ascii(argument), problem, "set LC_ALL=C.UTF-8, and use UTF-8"))
        elif key == "recipe" and equals:
            wanted = text
        elif not equals and (is_yaml(key) or key in list_recipes(folder)):
            wanted = key
        elif not equals or not key:
            hint = nearest(key, list_recipes(folder)) or "for example recipe=ddp_qlora lora.r=8"
            faults.append(Fault(COMMAND_LINE, argument, "expected key.path=value or the name of a recipe", hint))
        else:
            try:
                value = text if text.startswith("*") else parse_yaml(text)  # `*.jsonl`; an alias would have no anchor
                short = key == _SHORT and isinstance(value, str)
                overrides.append((f"{key}.model" if short else key, value))
            except ValueError as error:
                faults.append(Fault(COMMAND_LINE, key, f"{text!r} is not valid YAML: {error}"))
    return overrides, wanted


def _read_files(
    wanted: str, folder: Path, faults: list[Fault]
) -> tuple[str, tuple[Path, ...], dict[str, Any], dict[str, str]]:
    """The recipe `wanted` merged over the one it extends, and the file that each leaf key came from."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    path = _find(wanted, folder, folder, faults)
    while path is not None:
        if len(chain) == 2:
            faults.append(
                Fault(
                    str(chain[-1][0]), "extends", "a recipe may extend one other recipe, which must not extend another"
                )
            )
            break
        content = _expand_judge(read_yaml(path))
        chain.append((path, content))
        base = content.pop("extends", None)
        if base is None:
            break
        path = _find(str(base), folder, path.parent, faults, where=str(path))
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path, content in reversed(chain):
        merged = _merge(merged, content)
        for key, _ in leaves(content):
            origins = {k: v for k, v in origins.items() if not related(k, key)} | {key: str(path)}
    name = chain[0][0].stem if chain else wanted
    return name, tuple(path for path, _ in reversed(chain)), merged, origins


def _find(wanted: str, folder: Path, relative_to: Path, faults: list[Fault], where: str = COMMAND_LINE) -> Path | None:
    """The path of the recipe `wanted`; None, after appending a fault, if it does not exist."""
    key = "recipe" if where == COMMAND_LINE else "extends"
    if "/" in wanted or is_yaml(wanted):
        path = relative_to / Path(wanted).expanduser()
        if path.is_file():
            return path
        problem = f"{wanted} is a folder, not a recipe" if path.is_dir() else f"there is no file {wanted}"
        faults.append(Fault(where, key, problem))
        return None
    known = list_recipes(folder)
    if key == "extends" and known.get(wanted) == Path(where):  # it extends the shipped recipe of its own name
        known = list_recipes(packaged("recipes").parent)
    if wanted in known:
        path = known[wanted]
        twins = [other.name for other in yaml_files(path.parent) if other.stem == wanted]
        if len(twins) > 1:
            faults.append(
                Fault(where, key, f"{' and '.join(twins)} in {path.parent} have the same name", "name a path")
            )
        return path
    hint = nearest(wanted, known) or f"known recipes: {', '.join(known)}"
    faults.append(Fault(where, key, f"there is no recipe {wanted!r}", hint))
    return None


def _expand_judge(content: dict[str, Any]) -> dict[str, Any]:
    """Expand `evaluation.judge: NAME` to `{model: NAME}`, so that merging keeps the judge's other settings."""
    section = content.get("evaluation")
    if isinstance(section, dict) and isinstance(section.get("judge"), str):
        return {**content, "evaluation": {**section, "judge": {"model": section["judge"]}}}
    return content


def _merge(base: Any, change: Any) -> Any:
    if isinstance(base, dict) and isinstance(change, dict):
        return {key: _merge(base.get(key), change[key]) if key in change else base[key] for key in {**base, **change}}
    return change


def _assign(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[path[-1]] = value


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, each with its dotted key."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
