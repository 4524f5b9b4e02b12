"""PyTorch's DistributedDataParallel: a whole copy of the model on every process, gradients averaged."""

from __future__ import annotations

from typing import Any

from distft.distributed.strategies.base import Strategy


class DDP(Strategy):
    name = "ddp"
    title = "DDP"

    def training_arguments(self) -> dict[str, Any]:
        return super().training_arguments() | {"ddp_find_unused_parameters": False}
