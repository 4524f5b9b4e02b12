"""Linears that `lora.target_modules: all-linear` reaches and that cannot have an adapter."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distft import upstream_api


def without_unsuitable(lora: Mapping[str, Any], base: nn.Module) -> dict[str, Any]:
    """`lora`, a LoraConfig's arguments; for all-linear, with the linears of `base` that cannot have an adapter in
    `exclude_modules`."""
    found = unsuitable(base) if lora.get("target_modules") == "all-linear" else []
    if not found:
        return dict(lora)
    given = lora.get("exclude_modules") or []
    if isinstance(given, str):  # a pattern of whole names
        ends = "|".join(map(re.escape, found))
        return {**lora, "exclude_modules": rf"(?:{given})|(?:.*\.)?(?:{ends})"}
    return {**lora, "exclude_modules": [*given, *(name for name in found if name not in given)]}


def unsuitable(base: nn.Module) -> list[str]:
    """Ends of the names of linears in `base` that cannot have an adapter: those that PEFT refuses because a fused
    kernel reads their weights, and those that do not return a single tensor, as some routers."""
    linears = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    refused = {name for name, module in linears.items() if _is_refused(base, name) or not _returns_tensor(module)}
    ends = {name.rpartition(".")[2] for name in refused}
    whole = {end for end in ends if all(name in refused for name in linears if name.rpartition(".")[2] == end)}
    return sorted(whole | {name for name in refused if name.rpartition(".")[2] not in whole})


def _is_refused(base: nn.Module, name: str) -> bool:
    return upstream_api.peft_refuses(base, name.rpartition(".")[2])


def _returns_tensor(module: nn.Linear) -> bool:
    """Whether a linear with a forward of its own returns one tensor, tried out without weights."""
    if type(module).forward is nn.Linear.forward or type(module).__module__.startswith("bitsandbytes"):
        return True
    trial = copy.copy(module)
    weight = torch.empty(module.out_features, module.in_features, device="meta")
    bias = None if module.bias is None else torch.empty(module.out_features, device="meta")
    vars(trial).update(_parameters={"weight": weight, "bias": bias}, training=False)
    try:
        out = type(module).forward(trial, torch.empty(2, module.in_features, device="meta"))
    except Exception:  # it needs more than it was given; the check before step 1 computes the whole model
        return True
    return isinstance(out, torch.Tensor)
