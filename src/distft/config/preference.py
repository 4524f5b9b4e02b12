"""The section `preference` of a recipe: the loss of `objective: dpo`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from pydantic import Field

from distft.config.schema import Section

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)
SORTED: tuple[LossType, ...] = ("aot", "aot_unpaired")
"""Losses that compare the sorted rewards of a micro-batch, and so depend on how a step is divided."""
OF_DIFFERENCE: tuple[LossType, ...] = (
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"),
)
"""Losses that `f_divergence_type` generalises, as in TRL."""


class Preference(Section):
    """The loss over pairs of answers, under the field names of TRL's `DPOConfig`; only with `objective: dpo`."""

    loss_type: LossType | list[LossType] = "sigmoid"
    """The loss, by TRL's name, or a list of losses that are summed. `sft` is the negative log-likelihood of the chosen
    answers, over the tokens of the global batch: `[sigmoid, sft]` with `loss_weights: [1.0, α]` is RPO. `aot` and
    `aot_unpaired` sort the rewards of a micro-batch, so that they depend on its size."""
    loss_weights: list[float] | None = None
    """The weight of each loss in `loss_type`; null for 1 each."""
    beta: float = Field(0.1, gt=0)
    """β: how strongly the model is held to the reference; the regularisation τ of `ipo`."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """The probability that a pair is the wrong way round, for `robust` (below 0.5) and `aot`; ε of `exo_pair`."""
    f_divergence_type: Divergence = "reverse_kl"
    """The divergence between the model and the reference (f-DPO, arXiv:2309.16240)."""
    f_alpha_divergence_coef: float = 0.5
    """α of `f_divergence_type: alpha_divergence`."""
    ld_alpha: float | None = Field(None, ge=0, le=1)
    """α of LD-DPO (arXiv:2409.06411): the weight of the tokens of an answer beyond the length of the shorter one; null
    for 1."""
    use_weighting: bool = False
    """Weight pairs by how likely the model is to write them (WPO, arXiv:2406.11827)."""
    discopop_tau: float = Field(0.05, gt=0)
    """τ of `discopop` (arXiv:2406.08414)."""

    @property
    def weights(self) -> dict[LossType, float]:
        """The losses with their weights."""
        names = self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]
        found: dict[LossType, float] = dict.fromkeys(names, 0.0)
        for name, weight in zip(names, self.loss_weights or [1.0] * len(names), strict=True):
            found[name] += weight
        return found

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Fields that do not fit each other: the name, what is wrong, and what to do."""
        names = self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]
        if not names:
            yield "loss_type", "is an empty list", "name a loss, such as sigmoid"
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            problem = f"has {len(self.loss_weights)} weights, and loss_type has {len(names)}"
            yield "loss_weights", problem, "give each loss one weight"
        if "exo_pair" in names and self.label_smoothing == 0:
            yield "label_smoothing", "is 0, where exo_pair takes a logarithm of it", "set it above 0, such as 1e-3"
        if "robust" in names and self.label_smoothing >= 0.5:
            yield "label_smoothing", f"is {self.label_smoothing:g}, and robust needs less than 0.5", "0.1 is typical"
        others = [name for name in names if name not in OF_DIFFERENCE]
        if self.f_divergence_type != "reverse_kl" and others:
            problem = f"{self.f_divergence_type} is not defined for {', '.join(others)}"
            yield "f_divergence_type", problem, f"set reverse_kl, or a loss of {', '.join(OF_DIFFERENCE)}"
        whole = [name for name in names if name in ("sft", *SORTED)]
        if self.use_weighting and whole:
            yield (
                "use_weighting",
                f"weights pairs, and {', '.join(whole)} is no loss of single pairs",
                "set it to false",
            )
