"""Adapters as other programs load them, and the commands that serve a model in vLLM."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

from distft.config.recipe import Recipe
from distft.errors import RunFolderError
from distft.evaluation.engines.vllm import LORA_RANKS
from distft.files import share


def obstacle(adapter: Path) -> str | None:
    """Why servers (vLLM, SGLang, llama.cpp) do not load this adapter beside its base; None if they do."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    kinds = {
        "DoRA": settings.get("use_dora"),
        "whole modules (lora.modules_to_save)": settings.get("modules_to_save"),
        "single rows of the embedding": settings.get("trainable_token_indices"),
        "biases": settings.get("bias", "none") != "none" or settings.get("lora_bias"),
        "parameters of experts": settings.get("target_parameters"),
        f"the type {settings.get('peft_type')}": settings.get("peft_type") != "LORA",
        f"the rank {_rank(adapter)}": _rank(adapter) > LORA_RANKS[-1],
    }
    return next((kind for kind, found in kinds.items() if found), None)


def _rank(adapter: Path) -> int:
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return int(max([settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()]))


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
    """The command that serves the export in `folder`: with `adapter`, beside its base."""
    dtype = ["--dtype", recipe.model.dtype]
    if adapter is None:
        return shlex.join(["vllm", "serve", str(folder), "--served-model-name", name, *dtype])
    rank = next(each for each in LORA_RANKS if each >= _rank(adapter))
    revision = ["--revision", recipe.model.revision] if recipe.model.revision else []
    packed = ["--quantization", "bitsandbytes"] if recipe.bits == 4 else []
    lora = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={folder}"]
    return shlex.join(["vllm", "serve", recipe.model.name, *revision, *dtype, *packed, *lora])
