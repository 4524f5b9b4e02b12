"""What single modules compute before and after a merge, and what configurations say: causes, where they can be told.

Over a whole model, one module that is merged wrongly may change the predictions less than rounding does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

_ROWS = 8
"""Random inputs per module."""
_FREE = (
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "quantization_config"),
    *("use_cache", "eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings", "vocab_size"),
)
"""Keys of config.json that a merge may change, or that change nothing of what is computed."""


@torch.inference_mode()
def module_outputs(model: Any) -> dict[str, torch.Tensor]:
    """What the modules that training changed give for random inputs, and the input embedding and the output head, by
    their names in the base."""
    found = {}
    for name, module in model.named_modules():
        inner = _unwrapped(module)
        if isinstance(module, LoraLayer) and isinstance(inner, nn.Linear):
            found[_plain(name)] = _output(module, inner.in_features, model)
    rows, head = model.get_input_embeddings(), model.get_output_embeddings()
    ids = torch.linspace(0, _unwrapped(rows).weight.shape[0] - 1, 64, device=_unwrapped(rows).weight.device).long()
    found["the input embedding"] = rows(ids).float().cpu()
    if head is not None:
        found["the output head"] = _output(head, _unwrapped(head).in_features, model)
    return found


def _output(module: Any, features: int, model: Any) -> torch.Tensor:
    values = torch.randn(_ROWS, features, generator=torch.Generator().manual_seed(0))
    output: torch.Tensor = module(values.to(_unwrapped(model.get_input_embeddings()).weight.device, model.dtype))
    return output.float().cpu()


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _unwrapped(module: Any) -> Any:
    while (inner := getattr(module, "original_module", None) or getattr(module, "base_layer", None)) is not None:
        module = inner
    return module


@torch.inference_mode()
def differing_module(model: Any, expected: Mapping[str, torch.Tensor], precision: torch.dtype) -> str | None:
    """The module of a merged `model` whose outputs are furthest from the `expected` ones, in words; None if rounding to
    `precision` explains all differences.

    Rounding weights and outputs changes the outputs by less than the type's epsilon in the root mean square.
    """
    limit = max(2 * torch.finfo(precision).eps, 1e-5)
    worst, worst_name = limit, None
    special = {"the input embedding": model.get_input_embeddings(), "the output head": model.get_output_embeddings()}
    for name, outputs in expected.items():
        module = special[name] if name in special else model.get_submodule(name)
        if name == "the input embedding":
            ids = torch.linspace(0, module.weight.shape[0] - 1, 64, device=module.weight.device).long()
            found = module(ids).float().cpu()
        else:
            found = _output(module, module.in_features, model)
        if found.shape != outputs.shape:
            return f"{name} has the shape {[*found.shape]} where training had {[*outputs.shape]}"
        off = ((found - outputs).square().mean().sqrt() / outputs.std()).item()
        if not off <= worst:  # or it is NaN
            worst, worst_name = off, name
            if off != off:
                break
    if worst_name is None:
        return None
    return f"{worst_name} computes something else: outputs differ by {worst:.1%}, where rounding explains {limit:.1%}"


def broken_values(model: Any) -> str | None:
    """The first parameter with a value that is not finite, in words."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"{name} has infinite values or NaN in {str(parameter.dtype).removeprefix('torch.')}"
    return None


def config_changes(folder: Path, base: Any) -> str | None:
    """What config.json in `folder` says otherwise than the configuration of the base, in words."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    expected = json.loads(base.to_json_string(use_diff=False))
    changed = [
        f"{key} is {found[key]}, the base's {expected[key]}"
        for key in found
        if key in expected and key not in _FREE and found[key] != expected[key]
    ]
    return "config.json: " + "; ".join(changed) if changed else None
