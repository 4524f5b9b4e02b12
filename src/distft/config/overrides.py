"""Overrides as Python values: from a mapping to the `key.path=value` words of the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from distft.config.yaml import parse_yaml


def override_words(overrides: Mapping[str, Any]) -> list[str]:
    """`{"lora.r": 8, "training": {"max_steps": 5}}` as `lora.r=8` and `training.max_steps=5`.

    Nested mappings change single keys of a section and leave the others.
    """
    return [f"{key}={override_text(value)}" for key, value in override_leaves(overrides)]


def override_leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and the value of every leaf that an override can name.

    Unlike for `files.leaves`, a mapping with a dot in a key (`layers.0`) or without keys is a leaf: no dotted key could
    name what is inside it.
    """
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and all("." not in str(inner) for inner in value):
            yield from override_leaves(value, f"{key}.")
        else:
            yield key, value


def override_text(value: Any) -> str:
    """`value` as text that the command line reads back as the same value."""
    try:
        if isinstance(value, str) and parse_yaml(value) == value:
            return value
    except ValueError:
        pass
    return json.dumps(value, ensure_ascii=False, default=str)  # JSON is YAML on one line
