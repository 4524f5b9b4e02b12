"""The output head on the trained tokens alone, without a wait for the device.

TRL's fused head finds the positions to score with a mask, on the device: the host waits until it knows how many there are, and
each step brings matrix products of a new shape, for which cuBLAS looks up a kernel for milliseconds. The collator, on the host,
knows the positions before the batch leaves for the device (`distft.data.loader.trained_positions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distft import upstream_api


class Selection:
    """Lets the backbone of a causal language model hand only chosen positions to the head that TRL has put on it."""

    def __init__(self, model: Any) -> None:
        self._positions: torch.Tensor | None = None
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # what PEFT has wrapped
        causal.base_model.register_forward_hook(self._select)
        upstream_api.select_tokens_on_host()

    def _select(self, module: nn.Module, inputs: Sequence[Any], output: Any) -> Any:
        if self._positions is not None:
            hidden = output.last_hidden_state.flatten(0, 1)
            output.last_hidden_state, self._positions = hidden.index_select(0, self._positions)[None], None
        return output

    def of_next_call(self, positions: torch.Tensor) -> None:
        """The next call of the model hands on `positions` [n] of its flattened rows: a hidden state of [1, n, width]."""
        self._positions = positions
