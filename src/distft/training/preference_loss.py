"""The losses of direct preference optimisation, from the log-probabilities of pairs of answers.

They are those of TRL's `DPOTrainer` under its names; the tests compare each with it. There, they are part of a method
that also runs the model and waits for all ranks; here, they are functions of what the model says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from distft.config.preference import Preference


@dataclass(frozen=True)
class Pairs:
    """The pairs of a micro-batch, [pairs] each: the log-probability of the chosen and of the rejected answer, in nats,
    under the model and under the reference, and their tokens."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """log π(chosen) - log π_ref(chosen); β times it is the reward."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        return self.rejected - self.reference_rejected


def pair_losses(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """The weighted sum of the losses for each pair, [pairs], without `sft`, which is a mean over tokens."""
    total = torch.zeros_like(pairs.chosen)
    for name, weight in preference.weights.items():
        if name != "sft":
            total = total + weight * _LOSSES[name](pairs, preference)
    return total


def _scores(pairs: Pairs, preference: Preference) -> tuple[torch.Tensor, torch.Tensor]:
    """f'(π / π_ref) of both answers, up to a constant that cancels (f-DPO, arXiv:2309.16240)."""
    return _score(pairs.chosen_ratio, preference), _score(pairs.rejected_ratio, preference)


def _score(ratio: torch.Tensor, preference: Preference) -> torch.Tensor:
    kind, power = preference.f_divergence_type, preference.f_alpha_divergence_coef - 1
    if kind == "forward_kl":
        return 1 - torch.exp(-ratio)
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(ratio)
    if kind == "alpha_divergence" and abs(power) >= 1e-6:  # at α = 1, the limit is the reverse KL
        return (torch.exp((power * ratio).clamp(max=80.0)) - 1) / power
    return ratio


def _margin(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """β times the difference of the scores."""
    chosen, rejected = _scores(pairs, preference)
    return preference.beta * (chosen - rejected)


def _margin_per_token(pairs: Pairs, preference: Preference) -> torch.Tensor:
    chosen, rejected = _scores(pairs, preference)
    return chosen / pairs.chosen_tokens.clamp(min=1) - rejected / pairs.rejected_tokens.clamp(min=1)


def _sigmoid(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """Rafailov et al. 2023 (arXiv:2305.18290), equation 7."""
    return -logsigmoid(_margin(pairs, preference))


def _sigmoid_norm(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """`sigmoid` of the mean over tokens (Tülu 3, arXiv:2411.15124)."""
    return -logsigmoid(preference.beta * _margin_per_token(pairs, preference))


def _hinge(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """SLiC (arXiv:2305.10425), as in RSO (arXiv:2309.06657)."""
    return torch.relu(1 - _margin(pairs, preference))


def _ipo(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """Azar et al. 2023 (arXiv:2310.12036), equation 17, of the mean over tokens; β is their τ."""
    return (_margin_per_token(pairs, preference) - 1 / (2 * preference.beta)) ** 2


def _exo_pair(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """Ji et al. 2024 (arXiv:2402.00856), equation 16: KL from the model's preference to the smoothed label's."""
    margin, smoothing = _margin(pairs, preference), preference.label_smoothing
    won, lost = logsigmoid(margin), logsigmoid(-margin)
    return won.exp() * (won - math.log1p(-smoothing)) + lost.exp() * (lost - math.log(smoothing))


def _nca_pair(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """Chen et al. 2024 (arXiv:2402.05369)."""
    chosen, rejected = preference.beta * pairs.chosen_ratio, preference.beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _robust(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """Chowdhury et al. 2024 (arXiv:2403.00409)."""
    margin, flipped = _margin(pairs, preference), preference.label_smoothing
    return (-(1 - flipped) * logsigmoid(margin) + flipped * logsigmoid(-margin)) / (1 - 2 * flipped)


def _bco_pair(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """Jung et al. 2024 (arXiv:2404.04656), without the shift of the rewards, as in TRL."""
    return -logsigmoid(preference.beta * pairs.chosen_ratio) - logsigmoid(-preference.beta * pairs.rejected_ratio)


def _sppo_hard(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """Wu et al. 2024 (arXiv:2405.00675), equation 4.7, with probability 1 for the winner."""
    half = 0.5 / preference.beta
    return (pairs.chosen_ratio - half) ** 2 + (pairs.rejected_ratio + half) ** 2


def _smoothed(margin: torch.Tensor, preference: Preference) -> torch.Tensor:
    smoothing = preference.label_smoothing
    return -logsigmoid(margin) * (1 - smoothing) - logsigmoid(-margin) * smoothing


def _aot(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """Melnyk et al. 2024 (arXiv:2406.05882), over the pairs of a micro-batch."""
    ours = (pairs.chosen - pairs.rejected).sort().values
    reference = (pairs.reference_chosen - pairs.reference_rejected).sort().values
    return _smoothed(preference.beta * (ours - reference), preference)


def _aot_unpaired(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """As `_aot`, with chosen and rejected answers sorted separately."""
    margin = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return _smoothed(preference.beta * margin, preference)


def _apo_zero(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """D'Oosterlinck et al. 2024 (arXiv:2408.06266), equation 7."""
    beta = preference.beta
    return 1 - torch.sigmoid(beta * pairs.chosen_ratio) + torch.sigmoid(beta * pairs.rejected_ratio)


def _apo_down(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """The same paper, equation 8."""
    margin = preference.beta * (pairs.chosen_ratio - pairs.rejected_ratio)
    return torch.sigmoid(preference.beta * pairs.chosen_ratio) + 1 - torch.sigmoid(margin)


def _discopop(pairs: Pairs, preference: Preference) -> torch.Tensor:
    """Lu et al. 2024 (arXiv:2406.08414), equation 5."""
    margin = _margin(pairs, preference)
    share = torch.sigmoid(margin / preference.discopop_tau)
    return -logsigmoid(margin) * (1 - share) + torch.exp(-margin) * share


_LOSSES: dict[Any, Callable[[Pairs, Preference], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}
