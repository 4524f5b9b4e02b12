"""The JSON Schema of recipes, and the reference made from it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distft.config.files import read_yaml
from distft.config.json_schema import json_schema
from distft.config.reference import RecipeKey, recipe_reference, section_descriptions
from tests.config.loading import RECIPES, SHIPPED


def test_the_shipped_schema_is_up_to_date() -> None:
    shipped = json.loads((RECIPES / "recipe.schema.json").read_text(encoding="utf-8"))
    assert shipped == json_schema(), "write it again: distft recipes schema > recipes/recipe.schema.json"


def described(document: dict[str, Any], key: str) -> str:
    """What the schema says of a dotted key, "" where nothing, found as an editor does: through $ref and anyOf."""
    nodes: list[dict[str, Any]] = [document]
    for part in (*key.split("."), None):
        for node in nodes:  # grows while it is walked
            nodes += node.get("anyOf", [])
            if "$ref" in node:
                nodes.append(document["$defs"][node["$ref"].removeprefix("#/$defs/")])
        if part is not None:
            nodes = [node["properties"][part] for node in nodes if part in node.get("properties", {})]
    return next((str(node["description"]) for node in nodes if node.get("description")), "")


def keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Every dotted key of a recipe file, sections included."""
    found = []
    for name, item in tree.items():
        found += [f"{prefix}{name}", *(keys(item, f"{prefix}{name}.") if isinstance(item, dict) else [])]
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_the_schema_describes_every_key_of_a_shipped_recipe(name: str) -> None:
    document, used = json_schema(), keys(read_yaml(RECIPES / f"{name}.yaml"))
    assert used
    assert [key for key in used if not described(document, key)] == []


@pytest.mark.parametrize("key", ["bogus", "lora.rank", "training.warmup_ratio", "data.format.bogus"])
def test_the_schema_knows_no_key_that_a_recipe_refuses(key: str) -> None:
    assert described(json_schema(), key) == ""


def test_the_schema_is_closed_to_unknown_keys() -> None:
    document = json_schema()
    sections = [
        document,
        *document["$defs"].values(),
        *(document["properties"][name]["anyOf"][0] for name in ("lora", "training")),
    ]
    assert [
        section["title"]
        for section in sections
        if "properties" in section and section.get("additionalProperties") is not False
    ] == []


# ---- the reference ---------------------------------------------------------------------------------------------------


def reference() -> dict[str, RecipeKey]:
    return {f"{key.section}.{key.key}".lstrip("."): key for key in recipe_reference()}


def test_every_key_of_the_reference_has_a_description_and_a_type() -> None:
    found = reference()
    assert len(found) == len(recipe_reference()) > 200
    assert [name for name, key in found.items() if not (key.description and key.type)] == []
    assert {key.section for key in found.values()} <= {"", *section_descriptions()}
    assert all(section_descriptions().values())


def test_a_key_whose_name_carries_a_unit_has_that_unit() -> None:
    units = {"_s": "s", "_gib": "GiB", "_tokens": "tokens", "_steps": "steps"}
    exceptions = {"lora.alora_invocation_tokens", "training.eval_accumulation_steps"}  # token IDs, and batches
    wrong = {
        name
        for name, key in reference().items()
        for suffix, unit in units.items()
        if name.endswith(suffix) and not (key.unit or "").startswith(unit)
    }
    assert wrong == exceptions


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora.r", ("int > 0", "8", None, "PEFT LoraConfig")),
        ("training.max_length", ("int > 0 or null", "1024", "tokens", "TRL SFTConfig")),
        ("training.bf16", ("bool or null", "true if model.dtype is bfloat16", None, "TRL SFTConfig")),
        ("quantization.load_in_4bit", ("bool", "false", None, "transformers BitsAndBytesConfig")),
        ("quantization.dequantize_at_load", ("bool", "false", None, "distft")),
        ("evaluation.judge.timeout_s", ("float > 0", "300.0", "s", "distft")),
        ("batching.micro_batch", ("auto or int ≥ 1", "1", "samples", "distft")),
        ("model.name", ("str", "", None, "distft")),
    ],
)
def test_the_reference_gives_type_default_unit_and_origin(name: str, expected: tuple[str | None, ...]) -> None:
    key = reference()[name]
    assert (key.type, key.default, key.unit, key.origin) == expected


def test_the_reference_lists_no_key_that_a_recipe_cannot_set() -> None:
    assert not {"lora.eva_config", "lora.task_type", "training.seed"} & set(reference())
