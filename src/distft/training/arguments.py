"""The recipe's `training` section as TRL's `SFTConfig`, completed from the other sections and the strategy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trl import SFTConfig

from distft import upstream_api
from distft.config.recipe import Recipe
from distft.config.upstream_rules import ADDED
from distft.distributed.strategies import Strategy
from distft.runs.folder import RunFolder
from distft.training.selection import selection_arguments

PACK_MULTIPLE = 512
"""On GPUs, packs are padded to a multiple of this many tokens, or of a sixteenth of their budget if that is less.

cuBLAS takes about 4 ms on the host to choose a kernel for a shape it has not seen. With packs of every length, a step
spent a fifth of its time on that (7B model, 6,500 tokens, one H200).
"""

_OURS = ("save_total_limit", "load_best_model_at_end", *ADDED["training"])
"""What distft carries out in place of the trainer: `Checkpoints` and `BestModel`."""


def pad_multiple(recipe: Recipe, strategy: Strategy) -> int | None:
    """The number of tokens whose multiple every micro-batch is padded to; None to pad only to the longest sample."""
    given: int | str | None = recipe.training.get("pad_to_multiple_of", "auto")
    if not isinstance(given, str):
        return given
    budget = recipe.batching.micro_batch_tokens
    return min(PACK_MULTIPLE, max(budget // 16, 1)) if strategy.on_gpu and isinstance(budget, int) else None


def training_arguments(recipe: Recipe, strategy: Strategy, folder: RunFolder, accumulation: int) -> SFTConfig:
    """Build the trainer's arguments, and tell accelerate about the gradient accumulation before it can assume 1."""
    strategy.accumulate(os.environ, accumulation)
    arguments = build_arguments(SFTConfig, recipe, strategy, folder.checkpoints, accumulation)
    upstream_api.use_one_gpu(arguments)
    return arguments


def build_arguments(
    kind: type[SFTConfig], recipe: Recipe, strategy: Strategy, output: Path, accumulation: int, **changes: Any
) -> SFTConfig:
    """Build the trainer's arguments as an object of class `kind`, with the fields in `changes` replaced."""
    micro_batch = recipe.batching.micro_batch if recipe.batching.micro_batch_tokens is None else 1
    given = {key: value for key, value in recipe.training.items() if key not in _OURS}
    given.setdefault("bf16", recipe.mixed_precision == "bf16")
    given.setdefault("per_device_eval_batch_size", micro_batch)
    # The filter hides non-finite losses, and waits for the device in every micro-batch.
    given.setdefault("logging_nan_inf_filter", False)
    given.setdefault("dataloader_num_workers", 1 if strategy.on_gpu else 0)
    given["pad_to_multiple_of"] = pad_multiple(recipe, strategy)
    if given.get("router_aux_loss_coef") is not None:  # the model's configuration refuses an int
        given["router_aux_loss_coef"] = float(given["router_aux_loss_coef"])
    if strategy.checkpoints_by_layer(recipe):
        given["gradient_checkpointing"] = False
    own: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "seed": recipe.run.seed,
        # `Checkpoints` deletes old ones: the trainer would delete the last good one before the new one is complete.
        "save_total_limit": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "report_to": "none",  # `runs.trackers` starts them, on rank 0 only and after the telemetry
        "disable_tqdm": True,
    }
    return kind(**(own | strategy.training_arguments() | given | selection_arguments(recipe) | changes))
