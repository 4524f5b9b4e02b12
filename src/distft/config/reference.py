"""Every key of a recipe with its type, default, unit, origin and description, for the documentation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distft.config.json_schema import json_schema
from distft.config.schema import Quantization
from distft.config.upstream import UPSTREAMS, upstream_fields
from distft.config.upstream_rules import ADDED, DEFAULTS

_ORIGINS = {"training": "TRL SFTConfig", "lora": "PEFT LoraConfig"}
_NAMES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "array": "list", "object": "mapping"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class RecipeKey:
    """One key of a recipe.

    `section` is the dotted path of its section, empty for a key at the top; `default` is YAML, empty for a required
    key, `(computed)` where upstream computes it, and words where it depends on other keys; `origin` is `distft` or
    the upstream configuration that the key belongs to.
    """

    section: str
    key: str
    type: str
    default: str
    unit: str | None
    origin: str
    description: str


def recipe_reference() -> list[RecipeKey]:
    """Every key that a recipe may set, in the order of the schema."""
    document = json_schema()
    return list(_keys("", document, document["$defs"]))


def section_descriptions() -> dict[str, str]:
    """What each section of `recipe_reference` is for, by its dotted path."""
    document = json_schema()
    return dict(_sections("", document, document["$defs"]))


def _keys(section: str, node: dict[str, Any], definitions: dict[str, Any]) -> Iterator[RecipeKey]:
    computed = _upstream_defaults(section)
    for key, item in node["properties"].items():
        nested = _nested(item, definitions)
        if nested is not None:
            yield from _keys(f"{section}.{key}".lstrip("."), nested, definitions)
        elif (type_ := _type(item)) != "null":  # upstream's type is a Python object, which YAML cannot express
            default = computed[key] if key in computed else _yaml(item["default"]) if "default" in item else ""
            yield RecipeKey(
                section, key, type_, default, item.get("unit"), _origin(section, key), item.get("description", "")
            )


def _sections(section: str, node: dict[str, Any], definitions: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, item in node["properties"].items():
        nested = _nested(item, definitions)
        if nested is not None:
            name = f"{section}.{key}".lstrip(".")
            yield name, item.get("description") or nested.get("description", "")
            yield from _sections(name, nested, definitions)


def _nested(item: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of a section; None for a plain value."""
    for option in (item, *item.get("anyOf", [])):
        if "$ref" in option:
            option = definitions[option["$ref"].removeprefix("#/$defs/")]
        if "properties" in option:
            return dict(option)
    return None


def _upstream_defaults(section: str) -> dict[str, str]:
    for upstream in UPSTREAMS:
        if section == upstream:
            return {
                field.name: _yaml(field.default) if field.has_default else "(computed)"
                for field in upstream_fields(upstream)
            } | DEFAULTS[upstream]
    return {}


def _origin(section: str, key: str) -> str:
    if section == "quantization" and key in Quantization().arguments() | {"llm_int8_skip_modules": None}:
        return "transformers BitsAndBytesConfig"
    if key in ADDED.get(section, {}):
        return "transformers EarlyStoppingCallback"
    return _ORIGINS.get(section, "distft")


def _yaml(value: Any) -> str:
    """A value in YAML's flow style, which for plain values and lists of them is JSON with fewer quotes."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _type(item: dict[str, Any]) -> str:
    """A JSON Schema type in words: `int ≥ 1 or null`."""
    if "anyOf" in item:
        options = dict.fromkeys(_type(option) for option in item["anyOf"] if "$ref" not in option)
        return " or ".join(sorted(options, key=lambda option: option == "null"))
    if "enum" in item or "const" in item:
        return " | ".join(_yaml(value) for value in item.get("enum", [item.get("const")]))
    name = _NAMES.get(item.get("type", ""), item.get("type", "any"))
    if item.get("items"):
        of = _type(item["items"])
        name += f" of ({of})" if "|" in of else f" of {of}"
    bounds = [f"{sign} {item[bound]}" for bound, sign in _BOUNDS.items() if bound in item]
    return " ".join([name, " and ".join(bounds)]).strip()
