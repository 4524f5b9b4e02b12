"""Run the output head on the trained tokens only, without waiting for the device.

TRL's fused head selects the positions to score with a mask on the device. The host then waits to learn how many there
are, and every step has matrix products of a new shape, for which cuBLAS looks up a kernel for milliseconds. The
collator knows the positions on the host, before the batch is sent to the device (`data.loader.trained_positions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distft import upstream_api


class TrainedPositions:
    """Lets the backbone of a causal language model pass only chosen positions to the head that TRL has put on it."""

    def __init__(self, model: Any) -> None:
        self._positions: torch.Tensor | None = None
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # inside PEFT's wrapper
        causal.base_model.register_forward_hook(self._select)
        upstream_api.select_tokens_on_host()

    def _select(self, module: nn.Module, inputs: Sequence[Any], output: Any) -> Any:
        if self._positions is not None:
            hidden = output.last_hidden_state.flatten(0, 1)
            output.last_hidden_state, self._positions = hidden.index_select(0, self._positions)[None], None
        return output

    def select_in_next_call(self, positions: torch.Tensor) -> None:
        """Pass on only `positions` [n] of the flattened rows in the next call: a hidden state of [1, n, width]."""
        self._positions = positions
