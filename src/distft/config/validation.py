"""Where a recipe's values come from, and pydantic's errors as faults that name the place."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from distft.config.evaluation import Evaluation
from distft.config.preference import Preference
from distft.config.schema import Batching, Data, Model, Quantization, Run, Section, Tracking
from distft.config.slurm import Slurm
from distft.config.upstream import UPSTREAMS, upstream_section
from distft.config.upstream_rules import OWNED
from distft.errors import Fault

COMMAND_LINE = "command line"
DEFAULT = "default"
DERIVED = "derived"
SECTIONS: dict[str, type[Section]] = {
    "run": Run,
    "model": Model,
    "preference": Preference,
    "quantization": Quantization,
    "data": Data,
    "batching": Batching,
    "evaluation": Evaluation,
    "tracking": Tracking,
    "slurm": Slurm,
}
_SHOWN = 200
"""Characters of a value in a message."""
RENAMED: dict[str, str] = {
    "evaluation_strategy": "training.eval_strategy",
    "warmup_ratio": "training.warmup_steps, where a number below 1 is a ratio",
    "no_cuda": "training.use_cpu",
    "max_seq_length": "training.max_length",
    "torch_dtype": "model.dtype",
    "model_name_or_path": "model.name",
    "dataset_name": "data.name",
    "per_device_train_batch_size": "batching.micro_batch",
    "alpha": "lora.lora_alpha",
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "rank": "lora.r",
    "dropout": "lora.lora_dropout",
    "load_in_4bit": "quantization.load_in_4bit",
    "rpo_alpha": "preference.loss_type=[sigmoid,sft] with preference.loss_weights=[1.0,α]",
    "beta": "preference.beta",
}
"""Names that people know from older versions and other tools, and what they are called here."""


@dataclass(frozen=True)
class Source:
    """Where a recipe came from: its name, its files (base first), and the origin of each dotted key."""

    name: str = "recipe"
    files: tuple[Path, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)

    def of(self, key: str) -> str:
        """Origin of a dotted key: a file, `command line`, `derived` or `default`; for a section, that of its last
        change."""
        below = [origin for name, origin in self.origins.items() if name.startswith(f"{key}.")]
        if below:
            return COMMAND_LINE if COMMAND_LINE in below else below[-1]
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return DEFAULT


def faults_of(error: ValidationError, source: Source, section: str = "") -> list[Fault]:
    """One fault per key; pydantic reports one error for each alternative of a union."""
    found: dict[str, Fault] = {}
    for item in error.errors():
        location = (section, item["loc"][0]) if section else location_of(item)
        fault = _fault(location, item, source)
        first = found.get(fault.key)
        if first is None:
            found[fault.key] = fault
        elif first.problem.startswith("expected ") and fault.problem.startswith("expected "):
            alternative = fault.problem.removeprefix("expected ").split(", got ")[0]
            head, got = first.problem.split(", got ", 1)
            found[fault.key] = dataclasses.replace(first, problem=f"{head} or {alternative}, got {got}")
    return list(found.values())


def location_of(error: Mapping[str, Any]) -> tuple[Any, ...]:
    """The path of a pydantic error, without a union's alternative (`literal['auto']`), which pydantic appends."""
    location = tuple(error["loc"])
    return location[:-1] if location and set(str(location[-1])) & set("-[") else location


def _fault(location: Sequence[Any], error: Mapping[str, Any], source: Source) -> Fault:
    """A pydantic error in distft's words."""
    key = ".".join(map(str, location))
    where, leaf = source.of(key), str(location[-1])
    if error["type"] == "missing":
        files = str(source.files[-1]) if source.files else COMMAND_LINE
        return Fault(files, key, "is required and not set")
    if error["type"] == "extra_forbidden":
        section = str(location[0]) if len(location) > 1 else ""
        if leaf in OWNED.get(section, {}):
            return Fault(where, key, "cannot be set here", OWNED[section][leaf])
        return Fault(where, key, "unknown key", _suggestion(leaf, section, _fields(location[:-1])))
    if error["type"] == "string_pattern_mismatch":
        field = _fields(location[:-1]).get(leaf)
        description = (field.description or "") if field is not None else ""
        return Fault(where, key, f"{_shown(error['input'])} has the wrong format", " ".join(description.split()))
    expected = error["msg"].removeprefix("Input should be ")
    expected = re.sub(r"0\.0{6}\d+", lambda bound: f"{float(bound[0]):g}", expected)  # 1e-38, which pydantic writes out
    value = error["input"]
    got = "null" if value is None else f"{_shown(value)} ({type(value).__name__})"
    hint = _spelling(str(error["type"]), value, where)
    if error["type"] == "literal_error" and isinstance(value, str):
        hint = nearest(value, re.findall(r"'([^']+)'", expected))
    return Fault(where, key, f"expected {expected}, got {got}", hint)


def _spelling(problem: str, value: Any, where: str) -> str:
    """How to write in YAML what was probably meant: text that looks like a number, or a list of one text."""
    if problem == "string_type" and isinstance(value, int | float):
        text = json.dumps(value) if isinstance(value, int) else "…"  # 7e10 is not known as it was written
        return "in quotes it is text: " + (f"""'"{text}"'""" if where == COMMAND_LINE else f'"{text}"')
    if problem == "list_type" and isinstance(value, str):
        return f"in brackets it is a list: [{_shown(value)[1:-1]}]"
    return ""


def _shown(value: Any) -> str:
    """A value in a message, which may be a whole file by mistake."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text):,} characters)"


def _fields(location: Sequence[Any]) -> Mapping[str, FieldInfo]:
    """The fields of one of distft's own sections, which may be nested; none for another place."""
    cls = SECTIONS.get(str(location[0])) if location else None
    for name in location[1:]:
        field = None if cls is None else cls.model_fields.get(str(name))
        choices = () if field is None else (field.annotation, *get_args(field.annotation))
        cls = next((each for each in choices if isinstance(each, type) and issubclass(each, Section)), None)
    return {} if cls is None else cls.model_fields


def _suggestion(leaf: str, section: str, siblings: Iterable[str]) -> str:
    """What an unknown key may mean: one of its `siblings` first, as sections may be nested."""
    names = field_names()
    if leaf == "extends":
        return "extends belongs in a recipe file; on the command line, use recipe=NAME"
    if leaf in RENAMED:
        return f"it is {RENAMED[leaf]}"
    near = nearest(leaf, siblings) or nearest(leaf, names[section] if section in names else names[""])
    if near:
        return near
    elsewhere = [f"{other}.{leaf}" for other, fields in names.items() if other and leaf in fields]
    return f"did you mean {elsewhere[0]}?" if elsewhere else ""


def field_names() -> dict[str, list[str]]:
    """The fields of each section; under `""` the sections."""
    names = {name: list(cls.model_fields) for name, cls in SECTIONS.items()}
    names[""] = [*names, "strategy", "objective", "adapter", "lora", "training", "extends"]
    for upstream in UPSTREAMS:
        names[upstream] = list(upstream_section(upstream).model_fields)
    return names


def nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""
