"""The trainer over single answers that a label calls good or bad (`preference.loss_type: kto`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from distft import upstream_api
from distft.config.preference import Preference
from distft.data.batch_plan import RankBatches
from distft.data.pairs import mismatched
from distft.training.preference import KL, Compared, PreferenceTrainer, drift, sums_of


class RatedTrainer(PreferenceTrainer):
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306) as in TRL's `KTOTrainer`. The global batch counts answers.

    The loss compares each answer's reward with the KL divergence of the model from the reference, which is estimated
    from answers to other prompts: of each sample, the prompt with the answer of the sample before it. TRL estimates it
    in each micro-batch of all ranks. Here it is one number for the global batch, before its first micro-batch, so that
    it does not depend on how the batch is divided; in an evaluation, one for the split.
    """

    measured = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl", KL)
    figures = ("loss", *measured[:2], "rewards/margins", *measured[2:], "answers")

    def __init__(self, *args: Any, max_length: int | None, **kwargs: Any) -> None:
        self._max_length = max_length
        super().__init__(*args, **kwargs)
        self._kl = torch.zeros((), dtype=torch.float64, device=self.args.device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        found = super().get_batch_samples(*args, **kwargs)
        self._kl = self._estimate(self._samples, self._plan.samples(self.state.global_step).tolist())
        return found

    def _sizes(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return torch.tensor([len(inputs["good"]), 0], device=inputs["good"].device)

    def _compare(self, model: Any, inputs: dict[str, Any]) -> Compared:
        counts, good = inputs["counts"], inputs["good"]
        of_reference = self._of_reference(inputs)
        if self.aux_loss_enabled:
            inputs = inputs | {"output_router_logits": True}
        outputs = self._score(model, inputs)
        answers = sums_of(outputs.log_probs, counts)
        ratios = answers - sums_of(of_reference, counts)
        losses = rated_losses(ratios, good, self._kl, self._preference)
        columns = [
            (self._preference.beta * ratios[good], ratios[good]),
            (self._preference.beta * ratios[~good], ratios[~good]),
            (answers[good], ratios[good]),
            (answers[~good], ratios[~good]),
            (self._kl.expand(len(good)), good),
        ]
        sums = [column.detach().sum() for column, _ in columns] + [drift(outputs.log_probs, of_reference).double()]
        sizes = [float(len(each)) for _, each in columns] + [outputs.label_mask.sum()]
        figures = torch.stack(
            [torch.stack(sums), torch.stack([torch.as_tensor(size, device=sums[0].device).double() for size in sizes])]
        )
        return Compared(None, losses, torch.zeros_like(self._kl), outputs, figures)

    def _metrics_of(self, figures: Sequence[float]) -> dict[str, float]:
        """The metrics; NaN over the good or the bad answers where there are none."""
        sums, sizes = figures[: len(self.measured)], figures[len(self.measured) :]
        found = {
            name: total / size if size else math.nan
            for name, total, size in zip(self.measured, sums, sizes, strict=True)
        }
        return found | {"rewards/margins": found["rewards/chosen"] - found["rewards/rejected"]}

    def _means(self, sums: torch.Tensor) -> dict[str, float]:
        found = super()._means(sums)
        return found | {"answers": found.pop("pairs")}

    def _sums_of(self, dataloader: Any) -> torch.Tensor:
        of_step, samples = self._kl, dataloader.dataset
        self._kl = self._estimate(samples, range(len(samples)))
        try:
            return super()._sums_of(dataloader)
        finally:
            self._kl = of_step

    def _estimate(self, samples: Any, order: Sequence[int]) -> torch.Tensor:
        """The mean of log π - log π_ref over the samples with these numbers, each with the answer of the one before it
        (the first with that of the last), or 0 if it is negative. All ranks enter, and get the same."""
        if "kto" not in self._preference.weights:
            return torch.zeros_like(self._kl)
        rows = [samples[index] for index in order]
        others = [mismatched(row, other, self._max_length) for row, other in zip(rows, [rows[-1], *rows], strict=False)]
        lengths = np.array([len(other["input_ids"]) for other in others])
        plan = self._plan.evaluation(lengths, self.args.per_device_eval_batch_size)
        world = self.args.world_size
        total = torch.zeros_like(self._kl)
        for indices in RankBatches(plan, self.args.process_index, world, plan.accumulation(world, 1)):
            batch = self._collate([others[index] | {"chosen": 0} for index in indices])
            inputs = upstream_api.to_trainer_device(self, batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                ratios = self._score(self.model, inputs).log_probs - self._of_reference(inputs)
            total += sums_of(ratios, inputs["counts"]).sum()
        summed: torch.Tensor = self.accelerator.reduce(total, reduction="sum")
        return (summed / len(others)).clamp(min=0)


def rated_losses(ratios: torch.Tensor, good: torch.Tensor, kl: torch.Tensor, preference: Preference) -> torch.Tensor:
    """The loss of each answer, [answers], from its log π - log π_ref in nats and whether it is good.

    `kto`: arXiv:2402.01306. `apo_zero_unpaired`: equation 7 of arXiv:2408.06266, without pairs.
    """
    shift = kl if "kto" in preference.weights else torch.zeros_like(kl)
    sign = torch.where(good, 1.0, -1.0).to(ratios)
    weight = torch.where(good, preference.desirable_weight, preference.undesirable_weight).to(ratios)
    return weight * (1 - torch.sigmoid(preference.beta * sign * (ratios - shift)))
