"""From a foreign file to a `Draft`: read it, find out whose it is, translate it. Nothing in the file is executed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distft.config.yaml import parse_yaml
from distft.errors import Fault, RecipeError
from distft.importing import axolotl, llama_factory, trl, unsloth
from distft.importing.draft import Draft


@dataclass(frozen=True)
class Program:
    """A program whose files can be imported: what it is called, and the keys that tell its files from others'."""

    title: str
    marks: tuple[str, ...]
    translate: Callable[[Draft], None]


PROGRAMS = {
    "axolotl": Program("axolotl", axolotl.MARKS, axolotl.translate),
    "llamafactory": Program("LLaMA-Factory", llama_factory.MARKS, llama_factory.translate),
    "trl": Program("TRL", trl.MARKS, trl.translate),
    "unsloth": Program("Unsloth", unsloth.MARKS, unsloth.translate),
}


def read_foreign(path: Path, program: str | None = None, processes: int = 1) -> tuple[str, Draft]:
    """The name of the program that a file is for, and the recipe made of it.

    Args:
        path: a YAML or JSON file.
        program: one of `PROGRAMS`; None to tell by its keys.
        processes: with how many processes it is trained; their global batch depends on it.

    Raises:
        RecipeError: it cannot be read, is no mapping, or has the keys of none of the programs.
    """
    values, repeated = _read(path)
    name = program or _whose(values, path)
    draft = Draft(unsloth.flat(values) if name == "unsloth" else values, path.resolve().parent, processes)
    if repeated:
        draft.note("silent", "a key appears twice", f"the last one counts ({repeated})")
    PROGRAMS[name].translate(draft)
    return name, draft


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """The content of a file, and what was said of a key that appears twice, if one does."""
    repeated = ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        try:
            values = parse_yaml(text.replace("\t", "  ") if path.suffix == ".json" else text)
        except ValueError as error:
            if "appears twice" not in str(error):
                raise
            values, repeated = yaml.safe_load(text), str(error).split(" in ")[0]
    except FileNotFoundError as error:
        raise RecipeError([Fault(str(path), "", "there is no such file")]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([Fault(str(path), "", f"cannot be read: {error}")]) from error
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError([Fault(str(path), "", f"is not valid YAML or JSON: {error}")]) from error
    if not isinstance(values, dict):
        raise RecipeError([Fault(str(path), "", f"expected a mapping of settings, got {type(values).__name__}")])
    return {str(key): value for key, value in values.items()}, repeated


def _whose(values: Mapping[str, Any], path: Path) -> str:
    """The program most of whose marks are among the keys."""
    keys = set(values) | set(unsloth.flat(dict(values)))
    scores = {name: sum(mark in keys for mark in program.marks) for name, program in PROGRAMS.items()}
    best = max(scores, key=lambda name: scores[name])
    if not scores[best]:
        hint = f"say whose it is: --from {', '.join(PROGRAMS)}"
        problem = "has none of the keys of axolotl, LLaMA-Factory, TRL or Unsloth"
        raise RecipeError([Fault(str(path), "", problem, hint)])
    return best
