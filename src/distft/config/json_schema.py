"""The JSON Schema of a recipe file, for editors: `recipes/recipe.schema.json`."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import PydanticOmit
from pydantic_core.core_schema import CoreSchema

from distft.config.recipe import Recipe
from distft.config.upstream import UPSTREAMS, upstream_section


class _FileValues(GenerateJsonSchema):
    """Leaves out alternatives that no value in a file can be, such as an instance of PEFT's `EvaConfig`."""

    def handle_invalid_for_json_schema(self, schema: CoreSchema, error_info: str) -> JsonSchemaValue:
        raise PydanticOmit


def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(schema_generator=_FileValues)


def json_schema() -> dict[str, Any]:
    """The schema of a recipe file; every field with its description, its range and, where it has one, its `unit`."""
    document = _schema_of(Recipe)
    document["title"] = "distft recipe"
    document["required"] = []  # `extends` may supply any of them
    document["properties"]["extends"] = {
        "type": "string",
        "description": "Another recipe, by name or path, whose values this one changes.",
    }
    for name in UPSTREAMS:
        section = _schema_of(upstream_section(name))
        document["$defs"] |= section.pop("$defs", {})
        description = document["properties"][name].get("description", "")
        variants: list[dict[str, Any]] = [section] if name == "training" else [section, {"type": "null"}]
        document["properties"][name] = {"description": description, "anyOf": variants}
    for definition in document["$defs"].values():
        definition.pop("required", None)
    _normalise(document)
    return document


def _normalise(node: Any) -> None:
    """Unwrap descriptions and sort every `anyOf`, whose order depends on what was imported before: `typing` caches
    unions."""
    if isinstance(node, dict):
        for value in node.values():
            _normalise(value)
        if "anyOf" in node:
            node["anyOf"].sort(key=lambda option: json.dumps(option, sort_keys=True))
        if isinstance(node.get("description"), str):
            node["description"] = " ".join(node["description"].split())
    elif isinstance(node, list):
        for value in node:
            _normalise(value)
