"""Rates and energy of a stretch of training, and the FLOPs of a token that utilisation is computed from."""

from __future__ import annotations

from dataclasses import dataclass


def model_flops_per_token(parameters: int, *, frozen_base: bool, forwards: float = 0.0) -> float:
    """Return 4·N if only an adapter trains (forward 2·N, backward through the activations 2·N), else 6·N; and 2·N for
    each of the other `forwards`, such as that of a reference.

    `parameters` is N, without the input embeddings. Recomputation does not count. Kaplan et al. 2020
    (arXiv:2001.08361), section 2.1.
    """
    return (4 if frozen_base else 6) * float(parameters) + 2 * forwards * parameters


@dataclass(frozen=True)
class Work:
    """FLOPs per token: those of the model, and those that recomputation adds."""

    model: float
    recomputed: float = 0.0

    @classmethod
    def of(cls, model: float, recomputed_parameters: int) -> Work:
        """Count 2 FLOPs for every parameter of a layer whose forward runs a second time."""
        return cls(model, 2.0 * recomputed_parameters)

    def utilisation(self, tokens_per_second: float, flops: float) -> tuple[float, float]:
        """Return MFU and HFU: the model's FLOP/s, without and with recomputation, over the devices' `flops` FLOP/s.

        Chowdhery et al. 2022 (arXiv:2204.02311), appendix B; Korthikanti et al. 2022 (arXiv:2205.05198), section 5.
        """
        share = tokens_per_second / flops
        return share * self.model, share * (self.model + self.recomputed)


@dataclass(frozen=True)
class Window:
    """A stretch of training: its seconds, without evaluation and saving, and the steps, samples and tokens in them.

    `joules` is the energy of all GPUs, or None where it is not measured.
    """

    seconds: float = 0.0
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    joules: float | None = None

    def __add__(self, other: Window) -> Window:
        joules = [each.joules for each in (self, other) if each.joules is not None]
        return Window(
            self.seconds + other.seconds,
            self.steps + other.steps,
            self.samples + other.samples,
            self.tokens + other.tokens,
            sum(joules) if joules else None,
        )

    def rates(self, world_size: int, work: Work, flops: float | None) -> dict[str, float | None]:
        """Return samples/s, tokens/s in total and per process, MFU and HFU.

        `flops` is the peak rate of one device in FLOP/s; if it is None, so are MFU and HFU.
        """
        if self.seconds <= 0:
            return dict.fromkeys(("samples_per_second", "tokens_per_second", "tokens_per_second_per_gpu", "mfu", "hfu"))
        tokens = self.tokens / self.seconds
        mfu, hfu = work.utilisation(tokens, world_size * flops) if flops else (None, None)
        return {
            "samples_per_second": self.samples / self.seconds,
            "tokens_per_second": tokens,
            "tokens_per_second_per_gpu": tokens / world_size,
            "mfu": mfu,
            "hfu": hfu,
        }

    def energy(self, idle_watts: float | None) -> dict[str, float | None]:
        """Return joules per sample and per step, and the share that the devices would have drawn when idle.

        `idle_watts` is the idle power of all devices together.
        """
        if self.joules is None or self.joules <= 0 or not self.samples:
            return dict.fromkeys(("joules_per_sample", "joules_per_step", "energy_idle_share"))
        return {
            "joules_per_sample": self.joules / self.samples,
            "joules_per_step": self.joules / self.steps,
            "energy_idle_share": None if idle_watts is None else min(idle_watts * self.seconds / self.joules, 1.0),
        }
