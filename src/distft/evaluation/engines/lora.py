"""What vLLM can do with an adapter, and the words of its command for one. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LORA_RANKS = (8, 16, 32, 64, 128, 256)
"""The LoRA ranks for which vLLM can reserve memory."""
_BEYOND_VLLM = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
)
"""Settings of an adapter that vLLM refuses or ignores."""


def obstacle_to_lora(adapter: Mapping[str, Any]) -> str | None:
    """Why vLLM could not put an adapter with these settings on its base; None if it can."""
    for key in _BEYOND_VLLM:
        if adapter.get(key):
            return f"vLLM does not support adapters with {key}"
    init, biases = str(adapter.get("init_lora_weights")), adapter.get("bias", "none")
    if init.startswith(("pissa", "olora", "corda")) or biases != "none":
        return "vLLM leaves the base's weights as they are, and this adapter changes them"
    if adapter.get("r", 0) > max(LORA_RANKS):
        return f"vLLM supports adapters up to rank {max(LORA_RANKS)}"
    return None


def lora_words(name: str, folder: str, rank: int) -> list[str]:
    """The words of `vllm serve` for the adapter in `folder`, of this rank, under a `name`."""
    reserved = next(each for each in LORA_RANKS if each >= rank)
    return ["--enable-lora", "--max-lora-rank", str(reserved), "--lora-modules", f"{name}={folder}"]
