"""Adapters as other programs load them, and the commands that serve an export in vLLM."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from distft.config.recipe import Recipe
from distft.errors import RunFolderError
from distft.evaluation.engines.lora import lora_words, obstacle_to_lora
from distft.files import share


def obstacle(adapter: Path) -> str | None:
    """Return why vLLM cannot serve this adapter on top of its base model, or None if it can."""
    settings = _settings(adapter)
    if (kind := settings.get("peft_type")) != "LORA":
        return f"vLLM does not support adapters of the type {kind}"
    return obstacle_to_lora(settings)


def _settings(adapter: Path) -> dict[str, Any]:
    return dict(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")))


def copy_adapter(result: Path, target: Path) -> None:
    """Write the adapter with its tokenizer, its template and the tokens at which it stops.

    Raises:
        RunFolderError: the run has trained a whole model.
    """
    if not (result / "adapter_config.json").is_file():
        raise RunFolderError(f"{result} is a whole model: the run has no adapter; use --to merged")
    shutil.copytree(result, target, dirs_exist_ok=True)
    share(target)


def vllm_command(recipe: Recipe, name: str, folder: Path, adapter: Path | None) -> str:
    """Return the command that serves the export in `folder`. An `adapter` is served on top of its base model."""
    dtype = ["--dtype", recipe.model.dtype]
    if adapter is None:
        return shlex.join(["vllm", "serve", str(folder), "--served-model-name", name, *dtype])
    revision = ["--revision", recipe.model.revision] if recipe.model.revision else []
    packed = ["--quantization", "bitsandbytes"] if recipe.bits == 4 else []
    lora = lora_words(name, str(folder), int(_settings(adapter).get("r", 8)))
    return shlex.join(["vllm", "serve", recipe.model.name, *revision, *dtype, *packed, *lora])
