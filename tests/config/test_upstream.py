"""The fields of PEFT and TRL: what is read from their source files is what the imported classes have."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import os
import subprocess
import sys
import typing
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from distft.config import upstream
from distft.config.upstream import CONFIGS, UPSTREAMS, Upstream, upstream_fields, upstream_section
from distft.config.upstream_rules import ADDED, DEFAULTS, OWNED, RANGES, TYPES, UNITS
from distft.errors import UpstreamError


def imported(section: Upstream) -> tuple[type[Any], dict[str, Any]]:
    """The upstream class, and the type hints of the fields that a recipe may set."""
    cls = getattr(importlib.import_module(CONFIGS[section].package), CONFIGS[section].name)
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init and field.name not in OWNED[section]]
    return cls, {name: hints[name] for name in names}


def from_imported(section: Upstream) -> type[BaseModel]:
    """The model of `upstream_section`, made from the imported class."""
    typed: dict[str, Any] = {}
    for name, hint in imported(section)[1].items():
        enums = [one for one in typing.get_args(hint) if isinstance(one, type) and issubclass(one, enum.Enum)]
        if enums:
            hint = Literal[tuple(member.value for member in enums[0])]
        hint = TYPES[section].get(name, hint)
        typed[name] = (hint, Field(None, **RANGES[section].get(name, {})))
    strict = ConfigDict(
        extra="forbid", strict=True, arbitrary_types_allowed=True, protected_namespaces=(), allow_inf_nan=False
    )
    return create_model(section, __config__=strict, **typed)


def errors(model: type[BaseModel], values: dict[str, Any]) -> list[tuple[Any, ...]]:
    try:
        model.model_validate(values)
    except ValidationError as error:
        return [(item["loc"], item["msg"]) for item in error.errors()]
    return []


VALUES: dict[Upstream, list[dict[str, Any]]] = {
    "training": [
        {"learning_rate": 1e-4, "max_steps": 50, "optim": "adamw_torch", "bf16": True, "warmup_steps": 0.03},
        {"learning_rate": "1e-4"},
        {"optim": "adamw_torhc"},
        {"bf16": 1},
        {"evaluation_strategy": "no"},
        {"eval_strategy": "never"},
        {"max_length": None},
        {"lr_scheduler_kwargs": {"num_cycles": 2}},
        {"lr_scheduler_kwargs": [1]},
        {"report_to": "wandb"},
        {"logging_steps": 5},
        {"logging_steps": "5"},
        {"max_grad_norm": -1.0},
        {"debug": "underflow_overflow"},
        {"debug": ["underflow_overflow"]},
    ],
    "lora": [
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "lora_dropout": 0.05, "bias": "none"},
        {"target_modules": "all-linear"},
        {"r": "eight"},
        {"rank": 8},
        {"r": 0},
        {"bias": "some"},
        {"layer_replication": [[0, 4], [2, 5]]},
        {"rank_pattern": {"q": 4}},
        {"init_lora_weights": "gaussian"},
        {"loftq_config": {"loftq_bits": 4}},
        {"eva_config": {"rho": 2.0}},
        {"eva_config": None},
        {"velora_config": {"num_groups": 8}},
    ],
}


@pytest.mark.parametrize("section", UPSTREAMS)
def test_the_source_gives_the_fields_and_descriptions_of_the_imported_class(section: Upstream) -> None:
    cls, hints = imported(section)
    declared = {field.name: field for field in dataclasses.fields(cls)}
    added, fields = ADDED[section], {field.name: field for field in upstream_fields(section)}
    assert list(fields) == [*hints, *added] and not set(added) & set(declared)
    for name, (_, default, text) in added.items():
        assert (fields.pop(name).default, bool(text)) == (default, True)
    for field in fields.values():
        text = " ".join(str(declared[field.name].metadata.get("help", "")).split())
        assert field.description == text and text, field.name
        if field.has_default:
            factory = declared[field.name].default_factory
            default = declared[field.name].default if factory is dataclasses.MISSING else factory()
            assert field.default == default, field.name
    assert [field.name for field in upstream_fields(section) if not field.has_default] in ([], ["optim"])


@pytest.mark.parametrize("section", UPSTREAMS)
def test_the_source_gives_a_model_that_judges_as_the_imported_class_does(section: Upstream) -> None:
    model, oracle = upstream_section(section), from_imported(section)
    verdicts = [errors(model, values) for values in VALUES[section]]
    assert verdicts == [errors(oracle, values) for values in VALUES[section]]
    assert [] in verdicts and sum(map(bool, verdicts)) >= 4


def test_a_placeholder_in_a_name_takes_a_number() -> None:
    """PEFT declares the literal text `pissa_niter_[number of iters]`."""
    lora = upstream_section("lora")
    for value in ("pissa_niter_4", "pissa_niter_16", "pissa", True, False):
        assert errors(lora, {"init_lora_weights": value}) == []
    for value in ("pissa_niter_", "pissa_niter_x", "pissa_niter_[number of iters]", "pissa_niter_4 ", "pisa", 3):
        assert errors(lora, {"init_lora_weights": value})


@pytest.mark.parametrize("section", UPSTREAMS)
def test_ranges_units_and_defaults_are_those_of_fields_that_exist(section: Upstream) -> None:
    known = set(upstream_section(section).model_fields)
    for table in (RANGES, TYPES, UNITS, DEFAULTS):
        assert set(table[section]) <= known
    assert not set(OWNED[section]) & known


def test_a_recipe_is_checked_without_importing_the_libraries() -> None:
    program = (
        "import sys\nfrom distft.config.recipe import load_recipe\nfrom distft.data.checks import data_faults\n"
        "words = ['recipe=ddp_qlora', 'lora.r=8', 'training.max_steps=3', 'lora.loftq_config={}']\n"
        "print(load_recipe(words, checks=[data_faults]).lora['r'], 'torch' in sys.modules)\n"
        "from distft.distributed.strategies import strategy_faults\n"
        "print(load_recipe(words, checks=[strategy_faults]).lora['r'])\n"
        "print(sorted({'peft', 'trl', 'transformers', 'bitsandbytes', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["8 False", "8", "[]"]


@pytest.mark.parametrize("missing", ["file", "base class"])
def test_another_layout_of_the_source_is_an_error_not_a_missing_field(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS["lora"]
    files = ("peft/tuners/lora/gone.py",) if missing == "file" else config.files[:1]
    monkeypatch.setitem(CONFIGS, "lora", dataclasses.replace(config, files=files))
    upstream_fields.cache_clear()
    with pytest.raises(UpstreamError, match=r"peft\.LoraConfig .*(gone\.py|PeftConfig).* in peft [\d.]+"):
        upstream_fields("lora")
    upstream_fields.cache_clear()


def test_the_classes_of_annotations_have_no_instances_in_a_file() -> None:
    (error,) = errors(upstream_section("lora"), {"eva_config": {"rho": 2.0}})
    assert error[1] == "Input should be an instance of EvaConfig"
    assert upstream.upstream_section("lora").model_fields["loftq_config"].description
