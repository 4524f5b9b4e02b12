"""Models for other tools: `distft merge` writes base and adapter as plain transformers weights, and checks them."""

from __future__ import annotations

import gc
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM

from distft.config.recipe import Recipe
from distft.console import say
from distft.errors import InvariantError, ModelError
from distft.files import share
from distft.models.loading import load_base, load_tokenizer
from distft.models.saved_adapter import SavedAdapter
from distft.text import first_line

_PROBES = 8
"""How many random inputs each merged module is compared with."""


def merge(recipe: Recipe, adapter: Path, target: Path, device_map: dict[str, int] | None = None) -> None:
    """Write the trained model to the folder `target`: the dequantised base with the adapter merged into it.

    Raises:
        ModelError: the base or the adapter cannot be loaded, they do not fit each other, or PEFT cannot merge them.
        InvariantError: the merged model, read back, does not compute what base and adapter do.
    """
    saved = SavedAdapter.read(adapter)
    if note := saved.base_note(recipe):
        say(f"warning: {note}")
    base = load_base(recipe, device_map=device_map)
    if recipe.bits < 16:
        base = base.dequantize(dtype=getattr(torch, recipe.model.dtype))
    model: Any = saved.put_on(base, recipe.model.name)
    expected, outputs = _logits(model), _outputs(model)
    merged = merge_into_base(model)
    try:
        _require_same_outputs(merged, outputs)
        _require_close(_logits(merged), expected, _rounding(merged), "merging has changed")
        merged.save_pretrained(str(target), safe_serialization=True)
        load_tokenizer(recipe).save_pretrained(str(target))
        share(target)
        expected, options = _logits(merged), {"trust_remote_code": recipe.model.trust_remote_code}
        del base, model, merged
        gc.collect()
        again = AutoModelForCausalLM.from_pretrained(target, dtype="auto", device_map=device_map, **options)
        _require_close(_logits(again), expected, 1e-3, "saving has changed")
    except InvariantError:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _owned_weight(module: nn.Module) -> nn.Parameter | None:
    """The parameter `weight` of the module itself; PEFT's wrappers have an attribute of this name that they wrap."""
    return dict(module.named_parameters(recurse=False)).get("weight")


def merge_into_base(model: Any) -> Any:
    """The base with the adapter merged into it.

    Where the output head shares its weight with the input embedding and only one of them was trained, they part:
    merging in place would change both. PEFT, for its part, declares them parted wherever they are two tensors.

    Raises:
        ModelError: PEFT cannot merge an adapter of this kind (`lora_bias` on modules without a bias).
    """
    embedding = _unwrapped(model.get_input_embeddings())
    tied = [m for m in model.modules() if m is not embedding and _owned_weight(m) is embedding.weight]
    for module in tied:
        module.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about embeddings that are no longer tied
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise ModelError(
                f"PEFT cannot merge this adapter: {first_line(error)}\n  load base and adapter with PEFT instead"
            ) from error
    rows, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if tied and head is not None:
        alike = torch.equal(rows.weight, head.weight)
        if alike:
            head.weight = rows.weight
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = alike
    return merged


def _unwrapped(module: Any) -> Any:
    """The base's own module in PEFT's wrappers."""
    while True:
        inner = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
        if inner is None:
            return module
        module = inner


@torch.inference_mode()
def _logits(model: Any) -> torch.Tensor:
    """The logits of tokens from the whole vocabulary, [positions, vocabulary]."""
    model.eval()
    rows = _unwrapped(model.get_input_embeddings()).weight
    ids = torch.linspace(0, rows.shape[0] - 1, 32, device=rows.device).long()
    logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0].float().cpu()
    return logits


@torch.inference_mode()
def _outputs(model: Any) -> dict[str, torch.Tensor]:
    """What each linear module with an adapter gives for random inputs, by its name in the base."""
    return {
        name.removeprefix("base_model.model."): module(_probe(module.base_layer)).float().cpu()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and isinstance(getattr(module, "base_layer", None), nn.Linear)
    }


def _probe(linear: nn.Linear) -> torch.Tensor:
    """The same random inputs for all modules of a size, [_PROBES, in_features]."""
    values = torch.randn(_PROBES, linear.in_features, generator=torch.Generator().manual_seed(0))
    return values.to(linear.weight)


@torch.inference_mode()
def _require_same_outputs(merged: Any, expected: Mapping[str, torch.Tensor]) -> None:
    """Check each merged module by itself: one that is wrong may change the logits less than rounding all others does.

    Rounding its weights and its outputs to their type changes the outputs by up to half the type's epsilon each, by
    less than the epsilon in the root mean square.

    Raises:
        InvariantError: names the first module that gives something else.
    """
    for name, outputs in expected.items():
        module = merged.get_submodule(name)
        off = ((module(_probe(module)).float().cpu() - outputs).square().mean().sqrt() / outputs.std()).item()
        limit = max(torch.finfo(module.weight.dtype).eps, 1e-5)  # float32: sums are taken in another order
        if not off <= limit:  # or it is NaN
            raise InvariantError(
                f"merging has changed what {name} computes: its outputs differ by {off:.1%} of their spread, where "
                f"rounding explains {limit:.1%}; nothing was written"
            )


def _rounding(model: Any) -> float:
    """By how much rounding explains that logits differ, relative to their spread: errors of the size of half the type's
    epsilon add up over the layers like random numbers. They are a quarter of this in a model of 4 layers in bf16."""
    layers = model.config.get_text_config().num_hidden_layers
    return max(2 * torch.finfo(model.dtype).eps * math.sqrt(layers), 1e-3)


def _require_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """Raise InvariantError if two sets of logits differ by more than `tolerance` of their spread."""
    if found.shape == expected.shape:
        off = ((found - expected).square().mean().sqrt() / expected.std()).item()
        if off <= tolerance:  # not if it is NaN
            return
        how = f"its logits differ by {off:.1%} of their spread, where rounding explains {tolerance:.1%}"
    else:
        how = f"its logits have the shape {[*found.shape]}, not {[*expected.shape]}"
    raise InvariantError(f"{what} what the model computes: {how}; nothing was written")
