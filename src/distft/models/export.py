"""Models for other tools: `distft merge` writes base and adapter as plain transformers weights."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from distft.config.recipe import Recipe
from distft.models.loading import load_base, load_tokenizer


def merge(recipe: Recipe, adapter: Path, target: Path, device_map: dict[str, int] | None = None) -> None:
    """Write the trained model to the folder `target`: the dequantised base with the adapter merged into it.

    Raises:
        ModelError: the base cannot be loaded.
    """
    base = load_base(recipe, device_map=device_map)
    if recipe.bits < 16:
        base = base.dequantize(dtype=getattr(torch, recipe.model.dtype))
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.save_pretrained(str(target), safe_serialization=True)
    load_tokenizer(recipe).save_pretrained(str(target))
