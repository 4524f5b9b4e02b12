"""YAML for recipes: PyYAML's safe loader and dumper with the scalars of YAML 1.2, and without duplicate keys."""

from __future__ import annotations

import re
from typing import Any

import yaml

_SCALARS = (  # YAML 1.2's core schema: `1e-4` is a number, `no` and `on` are text, 010 is ten, 2026-01-31 is text
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
)

_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")
"""The null character, and halves of a pair of surrogates."""


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's scalars, which refuses duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - as PyYAML declares it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} appears twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and (found := _NO_CHARACTER.search(value)):
            problem = f"{found[0]!r} is not a character that a file name or a text may contain"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return value


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which quotes text that `_Loader` would read as another type."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - as PyYAML declares it


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def parse_yaml(text: str) -> Any:
    """Parse YAML by the rules of YAML 1.2.

    Raises:
        ValueError: `text` is not valid YAML.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def dump_yaml(value: Any) -> str:
    """Write YAML that `parse_yaml` reads back as the same value; mappings keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def first_comment(text: str) -> str:
    """The first comment of a YAML file that is not for an editor, or ""."""
    comments = (line[2:] for line in text.splitlines() if line.startswith("# "))
    return next((comment for comment in comments if not comment.startswith("yaml-language-server")), "")
