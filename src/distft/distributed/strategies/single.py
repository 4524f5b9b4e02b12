"""One process on one device."""

from __future__ import annotations

from collections.abc import MutableMapping

from distft.distributed.strategies.base import Strategy


class Single(Strategy):
    """One process, also as the fallback of the other strategies."""

    name = "single"
    title = "single"

    @property
    def notes(self) -> list[str]:
        if self.name == self.requested:
            return []
        device = "one GPU" if self.on_gpu else "the CPU"
        fallback = f"one process: falling back from {self.requested} to single on {device}"
        return [f"{fallback}; same global batch, same optimisation"]

    def configure(self, environment: MutableMapping[str, str]) -> None:
        for key in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            environment.pop(key, None)
        super().configure(environment)
