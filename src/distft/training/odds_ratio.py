"""The trainer of `preference.loss_type: orpo`: likelihood and odds ratio of pairs of answers, without a reference."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid

from distft.training.preference import FIGURES, Compared, PreferenceTrainer, halves, sums_of


class OddsRatioTrainer(PreferenceTrainer):
    """ORPO (Hong et al. 2024, arXiv:2403.07691, equation 6), as in TRL's `ORPOTrainer`: the negative log-likelihood per
    token of prompts with their chosen answers, plus β times -log σ of the log odds ratio of both answers, whose
    log-probabilities are means over their tokens."""

    measured = (*FIGURES, "nll_loss", "log_odds_ratio", "log_odds_chosen")
    figures = ("loss", *measured, "pairs")

    def _compare(self, model: Any, inputs: dict[str, Any]) -> Compared:
        counts, answers = inputs["counts"], inputs["answers"]
        if self.aux_loss_enabled:
            inputs = inputs | {"output_router_logits": True}
        outputs = self._score(model, inputs)
        lengths = sums_of(answers, counts).clamp(min=1)
        chosen, rejected = halves(sums_of(outputs.log_probs.flatten() * answers, counts) / lengths)
        log_odds = (chosen - rejected) - (_log_rest(chosen) - _log_rest(rejected))
        ratio = logsigmoid(log_odds)
        likelihood = sums_of(outputs.log_probs, counts)[::2].sum()
        beta = self._preference.beta
        rewards = [beta * each.detach() for each in (chosen, rejected)]
        columns = [*rewards, (rewards[0] > rewards[1]).double(), rewards[0] - rewards[1], chosen, rejected]
        sums = [*(column.sum() for column in columns), -likelihood, ratio.sum(), log_odds.sum()]
        pairs, tokens = self._sizes(inputs)
        sizes = [tokens if name == "nll_loss" else pairs for name in self.measured]
        figures = torch.stack([torch.stack(sums).detach(), torch.stack(sizes).double()])
        return Compared(None, -beta * ratio, likelihood, outputs, figures)


def _log_rest(log_probability: torch.Tensor) -> torch.Tensor:
    """log(1 - p) for log p, without cancellation on either side of p = 1/2 (Mächler 2012, "Accurately computing
    log(1 - exp(-|a|))")."""
    near = log_probability > -0.693
    inside = torch.where(near, log_probability, -1.0)
    outside = torch.where(near, -1.0, log_probability)
    return torch.where(near, torch.log(-torch.expm1(inside)), torch.log1p(-torch.exp(outside)))
