"""The section `preference` of a recipe: the loss of `objective: dpo`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from pydantic import Field

from distft.config.schema import Section

PairLoss = Literal[
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
LossType = Literal[PairLoss, "orpo", "kto", "apo_zero_unpaired"]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
LOSS_TYPES: tuple[PairLoss, ...] = get_args(PairLoss)
"""The losses of TRL's `DPOTrainer`."""
UNPAIRED: tuple[LossType, ...] = ("kto", "apo_zero_unpaired")
"""The losses of TRL's `KTOTrainer`: over single answers, which a label calls good or bad."""
ALONE: tuple[LossType, ...] = ("orpo", *UNPAIRED)
"""Losses of trainers of their own in TRL, which are not summed with others."""
_DPO_ONLY = (
    *("label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "use_weighting"),
    "precompute_ref_log_probs",
)
_KTO_ONLY = ("desirable_weight", "undesirable_weight")
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
    `aot_unpaired` sort the rewards of a micro-batch, so that they depend on its size. On its own: `orpo` (as in TRL's
    ORPOTrainer), without a reference; `kto` and `apo_zero_unpaired` (as in its KTOTrainer), over single answers with a
    label."""
    loss_weights: list[float] | None = None
    """The weight of each loss in `loss_type`; null for 1 each."""
    beta: float = Field(0.1, gt=0)
    """β: how strongly the model is held to the reference; the regularisation τ of `ipo`; the weight λ of the odds ratio
    in `orpo`."""
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
    precompute_ref_log_probs: bool | Literal["auto"] = False
    """Compute what the reference says of all pairs once, before the first step, and keep it in the run's folder and in
    the cache; otherwise, it is computed with each micro-batch. `auto` does with more than one epoch, and with
    `lora: null`, where it is the only way."""

    desirable_weight: float = Field(1.0, ge=0)
    """`kto` and `apo_zero_unpaired`: the weight of the losses of good answers, which may be fewer or more."""
    undesirable_weight: float = Field(1.0, ge=0)
    """The weight of the losses of bad answers."""

    @property
    def names(self) -> list[LossType]:
        """The losses that `loss_type` names."""
        return self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]

    @property
    def unpaired(self) -> bool:
        """Whether the samples are single answers with a label."""
        return any(name in UNPAIRED for name in self.names)

    @property
    def refers(self) -> bool:
        """Whether the loss compares the model with a reference."""
        return "orpo" not in self.names

    @property
    def likelihood_weight(self) -> float:
        """The weight of the negative log-likelihood per token of the chosen answers."""
        return 1.0 if "orpo" in self.weights else self.weights.get("sft", 0.0)

    @property
    def weights(self) -> dict[LossType, float]:
        """The losses with their weights."""
        names = self.names
        found: dict[LossType, float] = dict.fromkeys(names, 0.0)
        for name, weight in zip(names, self.loss_weights or [1.0] * len(names), strict=True):
            found[name] += weight
        return found

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Fields that do not fit each other: the name, what is wrong, and what to do."""
        names = self.names
        if not names:
            yield "loss_type", "is an empty list", "name a loss, such as sigmoid"
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            problem = f"has {len(self.loss_weights)} weights, and loss_type has {len(names)}"
            yield "loss_weights", problem, "give each loss one weight"
        alone = [name for name in names if name in ALONE]
        if alone and (len(names) > 1 or self.loss_weights is not None):
            yield "loss_type", f"has {alone[0]}, which is not summed with other losses", f"set it to {alone[0]} alone"
        fields = type(self).model_fields
        changed = {name for name in fields if getattr(self, name) != fields[name].default}
        for name in (name for name in _DPO_ONLY if alone and name in changed):
            yield name, f"has no effect on {alone[0]}", "leave it out"
        for name in (name for name in _KTO_ONLY if name in changed and not set(names) & set(UNPAIRED)):
            yield (
                name,
                "weighs single answers with a label",
                f"leave it out, or set loss_type to {' or '.join(UNPAIRED)}",
            )
        if "exo_pair" in names and self.label_smoothing == 0:
            yield "label_smoothing", "is 0, where exo_pair takes a logarithm of it", "set it above 0, such as 1e-3"
        if "robust" in names and self.label_smoothing >= 0.5:
            yield "label_smoothing", f"is {self.label_smoothing:g}, and robust needs less than 0.5", "0.1 is typical"
        others = [name for name in names if name not in OF_DIFFERENCE]
        if self.f_divergence_type != "reverse_kl" and others and not alone:
            problem = f"{self.f_divergence_type} is not defined for {', '.join(others)}"
            yield "f_divergence_type", problem, f"set reverse_kl, or a loss of {', '.join(OF_DIFFERENCE)}"
        whole = [name for name in names if name in ("sft", *SORTED)]
        if self.use_weighting and whole:
            yield (
                "use_weighting",
                f"weights pairs, and {', '.join(whole)} is no loss of single pairs",
                "set it to false",
            )
