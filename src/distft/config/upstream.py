"""The fields of TRL's `SFTConfig` (`training`) and PEFT's `LoraConfig` (`lora`), as strict pydantic models.

Importing TRL and PEFT takes seconds, which every command would pay to find a typo. Their configurations are
dataclasses, so this module reads the class bodies from the installed source files with `ast`, and imports neither.
"""

from __future__ import annotations

import ast
import contextlib
import enum
import functools
import importlib.metadata
import importlib.util
import operator
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, create_model

from distft.config.upstream_rules import ADDED, OWNED, RANGES, TYPES, UNITS
from distft.errors import UpstreamError

Upstream = Literal["lora", "training"]
UPSTREAMS: tuple[Upstream, ...] = ("lora", "training")


@dataclass(frozen=True)
class _Config:
    """A configuration dataclass, and the files in which it, its bases and the enumerations of its fields are
    written."""

    package: str
    name: str
    files: tuple[str, ...]


CONFIGS: dict[Upstream, _Config] = {
    "training": _Config(
        "trl",
        "SFTConfig",
        (
            "trl/trainer/sft_config.py",
            "trl/trainer/base_config.py",
            "transformers/training_args.py",
            "transformers/trainer_utils.py",
            "transformers/debug_utils.py",
        ),
    ),
    "lora": _Config("peft", "LoraConfig", ("peft/tuners/lora/config.py", "peft/config.py")),
}
_WITHOUT_FIELDS = {"PushToHubMixin"}
_PLACEHOLDER = re.compile(r"\[.*\]")


@dataclass(frozen=True)
class UpstreamField:
    """One field as upstream declares it. `has_default` is False if upstream computes the default."""

    name: str
    annotation: Any
    has_default: bool
    default: Any
    description: str | None


@functools.cache
def upstream_fields(section: Upstream) -> tuple[UpstreamField, ...]:
    """The fields of `section` that a recipe may set: all of the installed version's, except those of `OWNED`, and
    those of `ADDED`.

    Raises:
        UpstreamError: the installed version does not declare the class as this module expects.
    """
    config = CONFIGS[section]
    classes = {
        node.name: node
        for file in config.files
        for node in ast.parse(_source(config, file)).body
        if isinstance(node, ast.ClassDef)
    }
    types = _Types(classes)
    fields: dict[str, UpstreamField] = {}
    for statement in _annotated(config, config.name, classes):
        assert isinstance(statement.target, ast.Name)
        name, options = statement.target.id, _options(statement.value)
        if options.get("init", True) and name not in OWNED[section]:
            text = " ".join(str(options.get("help", "")).split()) or None
            kind = TYPES[section].get(name) or types.evaluate(statement.annotation)
            fields[name] = UpstreamField(name, kind, "default" in options, options.get("default"), text)
    for name, (kind, default, text) in ADDED[section].items():
        fields[name] = UpstreamField(name, kind, True, default, text)
    return tuple(fields.values())


@functools.cache
def upstream_section(section: Upstream) -> type[BaseModel]:
    """A strict model of `upstream_fields`. Every field is optional: what a recipe does not set keeps upstream's
    default."""
    config = CONFIGS[section]
    typed: dict[str, Any] = {}
    for field in upstream_fields(section):
        unit = UNITS[section].get(field.name)
        typed[field.name] = (
            field.annotation,
            Field(
                None,
                description=field.description,
                json_schema_extra={"unit": unit} if unit else None,
                **RANGES[section].get(field.name, {}),
            ),
        )
    return create_model(
        config.name,
        __config__=ConfigDict(
            extra="forbid", strict=True, arbitrary_types_allowed=True, protected_namespaces=(), allow_inf_nan=False
        ),
        __doc__=f"{config.package}.{config.name}: fields that are not set keep its defaults.",
        **typed,
    )


def _source(config: _Config, file: str) -> str:
    package, _, rest = file.partition("/")
    found = importlib.util.find_spec(package)  # does not import a top-level package
    if found is None or found.origin is None:
        raise UpstreamError(f"{package} is not installed")
    try:
        return (Path(found.origin).parent / rest).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise _unexpected(config, f"has no file {file}") from error


def _unexpected(config: _Config, problem: str) -> UpstreamError:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in (config.package, "transformers"))
    return UpstreamError(
        f"{config.package}.{config.name} {problem} in {versions}; install the versions of constraints.txt"
    )


def _annotated(config: _Config, name: str, classes: dict[str, ast.ClassDef]) -> Iterator[ast.AnnAssign]:
    """The annotated assignments of a class, those of its bases first, as `dataclass` collects them."""
    if name not in classes:
        raise _unexpected(config, f"or its base class {name} is not where it is expected")
    for base in map(ast.unparse, classes[name].bases):
        if base not in _WITHOUT_FIELDS:
            yield from _annotated(config, base, classes)
    for statement in classes[name].body:
        if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation):
            yield statement


def _options(value: ast.expr | None) -> dict[str, Any]:
    """`default`, `init` and `help` of a field, as far as they are literals or empty collections."""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field")):
        written = {} if value is None else {"default": value}
    else:
        written = {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg}
        metadata = written.pop("metadata", None)
        if isinstance(metadata, ast.Dict):
            written |= {
                ast.literal_eval(key): item for key, item in zip(metadata.keys, metadata.values, strict=True) if key
            }
        factory = written.pop("default_factory", None)
        if factory is not None:
            written["default"] = ast.parse(
                {"list": "[]", "dict": "{}"}.get(ast.unparse(factory), "None"), mode="eval"
            ).body
    options = {}
    for name, node in written.items():
        with contextlib.suppress(ValueError):  # upstream computes it
            options[name] = ast.literal_eval(node)
    return options


class _Types(dict[str, Any]):
    """Names in annotations: those of `typing` and the builtins, the enumerations among `classes`, and a stand-in
    without instances for any other class, which no value in a YAML file can be."""

    def __init__(self, classes: dict[str, ast.ClassDef]) -> None:
        super().__init__({name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union")})
        self.update({kind.__name__: kind for kind in (bool, dict, float, int, list, str, tuple)})
        self._classes = classes

    def __missing__(self, name: str) -> Any:
        members: dict[str, Any] = {}
        if name in self._classes and any("Enum" in ast.unparse(base) for base in self._classes[name].bases):
            for statement in self._classes[name].body:
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                    members[statement.targets[0].id] = ast.literal_eval(statement.value)
        self[name] = enum.Enum(name, members, type=str) if members else type(name, (), {})
        return self[name]

    def evaluate(self, annotation: ast.expr) -> Any:
        """The type of an annotation. An enumeration becomes a `Literal` of its values, as in `SchedulerType | str`."""
        source = ast.unparse(annotation)  # from an installed package, never from a file of the user's
        hint = eval(source, {"__builtins__": {}}, self)  # noqa: S307
        enums = [one for one in typing.get_args(hint) if isinstance(one, type) and issubclass(one, enum.Enum)]
        return Literal[tuple(member.value for member in enums[0])] if enums else _fill_in(hint)


def _fill_in(hint: Any) -> Any:
    """`hint`, in which text such as `pissa_niter_[number of iters]` accepts a number at the place in brackets."""
    if typing.get_origin(hint) is Union:
        return functools.reduce(operator.or_, map(_fill_in, typing.get_args(hint)))
    if typing.get_origin(hint) is not Literal:
        return hint
    texts = typing.get_args(hint)
    patterns = [_PLACEHOLDER.split(text) for text in texts if isinstance(text, str) and _PLACEHOLDER.search(text)]
    exact = tuple(text for text in texts if not (isinstance(text, str) and _PLACEHOLDER.search(text)))
    filled = [Annotated[str, Field(pattern="^" + r"\d+".join(map(re.escape, parts)) + "$")] for parts in patterns]
    return functools.reduce(operator.or_, filled, Literal[exact]) if filled else hint
