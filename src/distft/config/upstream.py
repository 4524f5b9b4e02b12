"""The fields that the installed PEFT and TRL take in `lora` and `training`, as strict models.

To import the two takes seconds, of which every command and every start of a run would have its share. So what they take is remembered
in distft's cache, under their versions, and a recipe is checked without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, TypeAdapter, create_model

from distft.files import write_atomically
from distft.paths import cache_folder

Upstream = Literal["lora", "training"]
UPSTREAMS: tuple[Upstream, ...] = ("lora", "training")

_BY_BATCHING = "set batching.micro_batch or batching.global_batch_size; accumulation is derived"
_BY_PACKING = "set batching.micro_batch_tokens: whole samples are packed up to so many tokens"
_BY_RUN = "set run.dir, run.name or run.seed"
_BY_STRATEGY = "set strategy; how it shards stands in accelerate_configs/"
_BY_TRACKING = "set tracking.report_to and tracking.project"
_BY_DATA = "distft prepares the data itself: see data.format, training.max_length, training.completion_only_loss"
_BY_MODEL = "set it in the model section"
_BY_ORDER = "the order of the samples is a function of run.seed alone, so that every world size sees the same"

OWNED: dict[str, dict[str, str]] = {
    "training": {
        **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"), _BY_BATCHING),
        **dict.fromkeys(("output_dir", "seed", "data_seed", "run_name", "resume_from_checkpoint"), _BY_RUN),
        **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "accelerator_config", "local_rank"), _BY_STRATEGY),
        **dict.fromkeys(("report_to", "project", "disable_tqdm"), _BY_TRACKING),
        **dict.fromkeys(
            ("dataset_text_field", "dataset_kwargs", "chat_template_path", "assistant_only_loss", "truncation_mode",
             "eos_token", "pad_token", "remove_unused_columns", "label_names"),
            _BY_DATA,
        ),
        **dict.fromkeys(("train_sampling_strategy", "length_column_name", "shuffle_dataset", "dataloader_drop_last"), _BY_ORDER),
        **dict.fromkeys(("packing", "packing_strategy", "eval_packing", "padding_free"), _BY_PACKING),
        **dict.fromkeys(("model_init_kwargs", "trust_remote_code", "use_cache"), _BY_MODEL),
        "average_tokens_across_devices": "the loss is always normalised over all trained tokens of the global batch",
        "do_train": "distft.train trains", "do_eval": "set training.eval_strategy", "do_predict": "set evaluation",
        "load_best_model_at_end": "not available in this version: the adapter of the last step is saved",
        **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
                         "hub_revision"), "distft writes to the run folder; push runs/<name>/adapter with `hf upload`"),
    },
    "lora": {
        **dict.fromkeys(("task_type", "peft_type", "inference_mode", "base_model_name_or_path", "peft_version",
                         "auto_mapping", "runtime_config"), "distft sets it"),
        "revision": "set model.revision",
    },
}  # fmt: skip
"""Upstream fields that a recipe does not set, each with what to set instead."""

_POSITIVE, _NOT_NEGATIVE, _PART = {"gt": 0}, {"ge": 0}, {"ge": 0, "lt": 1}
RANGES: dict[str, dict[str, dict[str, int]]] = {
    "training": {
        **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps", "max_length", "ddp_timeout"), _POSITIVE),
        **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon", "dataloader_num_workers",
                         "neftune_noise_alpha", "eval_delay"), _NOT_NEGATIVE),
        **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _PART),
        "max_steps": {"ge": -1},  # upstream's "as many as the epochs have"
    },
    "lora": {"r": _POSITIVE, "lora_alpha": _POSITIVE, "lora_dropout": _PART},
}  # fmt: skip
"""What upstream's types do not say. Some of it upstream finds once the weights are loaded; with the rest it trains: a negative
`max_grad_norm` turns the gradient around, a `lora_alpha` of 0 learns nothing."""

_CONFIGS = {"training": ("trl", "SFTConfig"), "lora": ("peft", "LoraConfig")}
_PACKAGES = ("trl", "peft", "transformers", "pydantic")
_SOURCES = (
    "trl/trainer/sft_config.py",
    "trl/trainer/base_config.py",
    "transformers/training_args.py",
    "peft/tuners/lora/config.py",
)
"""Where the fields are written: an installation that is edited in place keeps its version."""
_PLAIN = {
    str: "str",
    int: "int",
    float: "float",
    bool: "bool",
    list: "list",
    dict: "dict",
    type(None): "null",
    Any: "any",
}


def section_for(name: Upstream, keys: Iterable[str] = ()) -> type[BaseModel]:
    """A strict model of the section `name` that can check `keys`. PEFT or TRL is imported only where nothing is remembered of these
    versions, or where one of `keys` takes a class of their own."""
    remembered = _remembered(name)
    if remembered is None or set(keys) & remembered[1]:
        return upstream_section(name)
    return remembered[0]


@functools.cache
def upstream_section(name: Upstream) -> type[BaseModel]:
    """The section `name` as a strict model of the fields that the installed PEFT or TRL takes, less those of `OWNED`.

    Imports TRL or PEFT at the first call. All fields are optional: what a recipe does not set stays upstream's default.
    """
    module, cls = _CONFIGS[name]
    config = getattr(importlib.import_module(module), cls)
    hints = typing.get_type_hints(config)
    fields = [
        (field.name, _describable(hints[field.name]), " ".join(str(field.metadata.get("help", "")).split()) or None)
        for field in dataclasses.fields(config)
        if field.init and field.name not in OWNED[name]
    ]
    kept = [[field, _written(hint), help_text] for field, hint, help_text in fields]
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time and nothing else
        write_atomically(_memory(name), json.dumps(kept) + "\n")
    return _model(name, fields)


@functools.cache
def _remembered(name: Upstream) -> tuple[type[BaseModel], frozenset[str]] | None:
    """The model as it was written down, and its fields that take a class of upstream's own, which it does not check."""
    try:
        kept = json.loads(_memory(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fields = [(field, Any if hint is None else _read(hint), help_text) for field, hint, help_text in kept]
    return _model(name, fields), frozenset(field for field, hint, _ in kept if hint is None)


def _model(name: Upstream, fields: Iterable[tuple[str, Any, str | None]]) -> type[BaseModel]:
    module, cls = _CONFIGS[name]
    ranges: dict[str, dict[str, Any]] = RANGES[name]
    typed: dict[str, Any] = {
        field: (hint, Field(None, description=help_text, **ranges.get(field, {}))) for field, hint, help_text in fields
    }
    return create_model(
        cls,
        __config__=ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, protected_namespaces=()),
        __doc__=f"{module}.{cls}: fields that are not set keep its defaults.",
        **typed,
    )


def _memory(name: Upstream) -> Path:
    """The file of what is remembered of the installed versions."""
    known: list[Any] = [platform.python_version(), sorted(OWNED[name])]
    known += [importlib.metadata.version(package) for package in _PACKAGES]
    for source in _SOURCES:
        package, _, rest = source.partition("/")
        found = importlib.util.find_spec(package)  # of a package at the top, which imports nothing
        if found is not None and found.origin is not None:
            with contextlib.suppress(OSError):
                known.append((Path(found.origin).parent / rest).stat().st_mtime_ns)
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    return cache_folder() / f"fields-{name}-{digest}.json"


def _written(hint: Any) -> Any:
    """`hint` as JSON; None for a class of upstream's own, also within others."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"literal": list(of)}
    kind = {Union: "union", types.UnionType: "union", list: "list", dict: "dict", tuple: "tuple"}.get(origin)
    parts = [_written(part) for part in of]
    return None if kind is None or None in parts else {kind: parts}


def _read(written: Any) -> Any:
    """The hint that `_written` wrote."""
    if isinstance(written, str):
        return next(hint for hint, word in _PLAIN.items() if word == written)
    ((kind, parts),) = written.items()
    if kind == "literal":
        return Literal[tuple(parts)]
    of = tuple(map(_read, parts))
    if kind == "union":
        return Union[of]  # noqa: UP007 (of a tuple)
    builder: Any = {"list": list, "dict": dict, "tuple": tuple}[kind]
    return builder[of]


def _describable(hint: Any) -> Any:
    """`hint` as pydantic can check and describe it; Any for a class of upstream's own."""
    choices = [option for option in typing.get_args(hint) if isinstance(option, type) and issubclass(option, enum.Enum)]
    if choices:  # `SchedulerType | str`: only the names of the enumeration are understood
        return Literal[tuple(str(member.value) for member in choices[0])]
    try:
        TypeAdapter(hint).json_schema()
    except (PydanticUserError, ValueError):
        return Any
    return hint
