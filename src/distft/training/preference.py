"""The trainer of `objective: dpo`: the loss over pairs of answers, on the same plan, batches and invariants as SFT's.

The reference is the model with its adapter off: it needs no memory of its own. Both run through the head on the trained
tokens alone, so that no logits of a whole sequence exist.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from distft import upstream_api
from distft.config.preference import Preference
from distft.config.recipe import Recipe
from distft.data.batch_plan import Plan
from distft.data.pieces import Array
from distft.data.splits import lengths_of
from distft.training.preference_loss import Pairs, pair_losses
from distft.training.reference import Base, FrozenAdapter, Reference
from distft.training.reference_log_probs import Known, WithReference, apart, precomputes
from distft.training.trainer import Trainer

FIGURES = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)
"""The metrics over pairs, under TRL's names."""
KL = "kl_per_token"
"""How far the model is from the reference on the trained tokens, in nats per token; see `drift`."""


class Compared(NamedTuple):
    """What a micro-batch says of the model and the reference."""

    pairs: Pairs | None
    """None for losses over something else."""
    losses: torch.Tensor
    """Of each pair, without `sft`, [pairs]."""
    likelihood: torch.Tensor
    """The log-likelihood of all chosen answers, in nats."""
    outputs: Any
    """Those of the head."""
    figures: torch.Tensor
    """The sums of the metrics, and what each is divided by, [2, metrics]."""


class PreferenceTrainer(Trainer):
    """The trainer over prepared pairs. The global batch counts pairs, and the loss is their mean over all of it.

    `on_adapter`: the reference is the model with the adapter that it has now, in place of the base alone.
    """

    figures: tuple[str, ...] = ("loss", *FIGURES, KL, "pairs")
    measured: tuple[str, ...] = (*FIGURES, KL)
    """The metrics that are logged at each step besides the loss."""

    def __init__(self, *args: Any, model: Any, preference: Preference, on_adapter: bool = False, **kwargs: Any) -> None:
        self._preference = preference
        self._reference: Reference = FrozenAdapter(model) if on_adapter else Base()  # before TRL casts the adapter
        self._known: Known | None = None
        super().__init__(*args, model=model, **kwargs)
        upstream_api.disable_dropout(self.model)
        if preference.use_weighting:
            upstream_api.score_squares(self.accelerator.unwrap_model(self.model))
        # Entropy, auxiliary loss, trained tokens and samples since the last log, then what `Compared.figures` has.
        self._pair_sums = torch.zeros(4 + 2 * len(self.measured), device=self.args.device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, _ = super().get_batch_samples(*args, **kwargs)
        return batches, self.step_sizes(batches)

    def step_sizes(self, batches: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """The pairs, and the tokens of chosen answers, in the `batches` of all ranks, [2]. All ranks enter."""
        sizes = [self._sizes(batch) for batch in batches]
        summed: torch.Tensor = self.accelerator.reduce(torch.stack(sizes).sum(0).to(self.args.device), reduction="sum")
        return summed

    def _sizes(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The number of pairs in a micro-batch, and of the tokens of their chosen answers, [2]."""
        counts = inputs["counts"]
        chosen = counts[:-1:2]
        return torch.stack([torch.full_like(counts[0], len(chosen)), chosen.sum()])

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the micro-batch's pairs, divided by the number of pairs in the whole global batch.

        `sft` is a mean over the tokens of the chosen answers in it. The auxiliary loss of a mixture of experts is
        averaged over micro-batches and ranks by their pairs.
        """
        assert not return_outputs
        _, losses, likelihood, outputs, figures = self._compare(model, inputs)
        number = len(losses)
        auxiliary = number * outputs.aux_loss if self.aux_loss_enabled else torch.zeros_like(likelihood)
        if self.model.training:
            entropy, trained = outputs.entropy.detach().sum(), outputs.label_mask.sum()
            sums = torch.stack([entropy, auxiliary.detach(), trained, trained.new_full((), number)])
            self._pair_sums += torch.cat([sums, figures.flatten()])
        whole = self._sizes(inputs) if num_items_in_batch is None else num_items_in_batch
        everyone = 1 if num_items_in_batch is None else self.accelerator.num_processes  # ranks average their gradients
        of_pairs, of_tokens = whole.clamp(min=1)
        total = (losses.sum() + self.router_aux_loss_coef * auxiliary) / of_pairs
        return (everyone * (total - self._preference.likelihood_weight * likelihood / of_tokens)).float()

    def _compare(self, model: Any, inputs: dict[str, Any]) -> Compared:
        counts = inputs["counts"]
        of_reference = self._of_reference(inputs)
        reference = self._answers(of_reference, counts)
        if self.aux_loss_enabled:
            inputs = inputs | {"output_router_logits": True}
        outputs = self._score(model, inputs)
        answers = self._answers(outputs.log_probs, counts)
        lengths = counts[:-1]
        pairs = Pairs(*halves(answers), *halves(reference), *halves(lengths))
        losses = pair_losses(pairs, self._preference)
        if self._preference.use_weighting:
            typical = (outputs.log_probs - outputs.log_sum_sq_probs).detach()
            chosen, rejected = halves((sums_of(typical, counts) / lengths.clamp(min=1)).exp())
            losses = losses * chosen * rejected
        likelihood = sums_of(outputs.log_probs, counts)[::2].sum()
        kl = torch.stack([drift(outputs.log_probs, of_reference), outputs.label_mask.sum()])
        return Compared(pairs, losses, likelihood, outputs, torch.cat([self._figures(pairs), kl[:, None]], 1))

    @torch.no_grad()
    def _of_reference(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The reference's log-probabilities of the scored tokens, as the head returns them."""
        if self._known:  # on all ranks: one without pairs computes nothing either
            known: torch.Tensor = inputs.get("reference", torch.zeros_like(inputs["targets"], dtype=torch.float32))
            return known
        with self._reference.on(self.model, self.accelerator):
            log_probs: torch.Tensor = self._score(self.model, inputs).log_probs
        return log_probs

    def expect_reference(self) -> Known:
        """Where to put the reference's log-probabilities of all pairs before the first step. From then on, they are
        read and not computed."""
        self._known = {}
        return self._known

    def _loader(self, samples: Any, plan: Plan, accumulation: int) -> Any:
        samples = samples if self._known is None else WithReference(samples, self._known)
        return super()._loader(samples, plan, accumulation)

    def reference_log_probs(self, samples: Any) -> list[Array]:
        """The reference's log-probabilities of each pair's trained tokens. All ranks enter, and get all."""
        self.model.eval()
        plan = self._plan.evaluation(lengths_of(samples), self.args.per_device_eval_batch_size)
        accumulation = plan.accumulation(self.args.world_size, 1)
        loader, mine = self._loader(samples, plan, accumulation), dict[int, Array]()
        for indices, inputs in zip(self._batches(plan, accumulation), loader, strict=True):
            inputs = upstream_api.to_trainer_device(self, inputs)
            with self.compute_loss_context_manager():
                found = self._of_reference(inputs)
            mine |= zip(indices, apart(found, inputs["counts"]), strict=True)
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        everyone = {index: values for rank in gather_object([mine]) for index, values in rank.items()}
        return [everyone[index] for index in range(len(samples))]

    def _answers(self, log_probs: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The log-probability of each sequence's answer, [sequences]; with `ld_alpha`, what is beyond the length of the
        shorter answer of a pair counts less."""
        if self._preference.ld_alpha is not None:
            lengths = counts[:-1]
            shared = lengths.view(-1, 2).amin(1, keepdim=True).expand(-1, 2).flatten()
            shared, starts = (torch.cat([each, each.new_zeros(1)]) for each in (shared, lengths.cumsum(0) - lengths))
            size = log_probs.numel()
            shared, starts = (torch.repeat_interleave(each, counts, output_size=size) for each in (shared, starts))
            beyond = torch.arange(size, device=counts.device) - starts >= shared
            log_probs = log_probs * torch.where(beyond, self._preference.ld_alpha, 1.0)
        return sums_of(log_probs, counts)

    def _figures(self, pairs: Pairs) -> torch.Tensor:
        """The sums of FIGURES over the pairs, without gradients, and the number of pairs, [2, figures]."""
        beta = self._preference.beta
        chosen, rejected = (beta * ratio.detach() for ratio in (pairs.chosen_ratio, pairs.rejected_ratio))
        columns = [chosen, rejected, (chosen > rejected).float(), chosen - rejected]
        columns += [pairs.chosen.detach(), pairs.rejected.detach()]
        sums = torch.stack([column.sum() for column in columns])
        return torch.stack([sums, torch.full_like(sums, len(chosen))])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The trainer's log, with the metrics since the last one reduced over all ranks. All ranks enter."""
        if "loss" in logs:
            sums = self.accelerator.reduce(self._pair_sums, reduction="sum").tolist()
            self._pair_sums.zero_()
            (entropy, auxiliary, trained, number), figures = sums[:4], sums[4:]
            if number:
                logs |= {"entropy": entropy / max(trained, 1)}
                logs |= self._metrics_of(figures)
                logs |= {"aux_loss": auxiliary / number} if self.aux_loss_enabled else {}
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute the mean loss and metrics over all pairs of the split."""
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        metrics: dict[str, float] = {}
        sources: Mapping[str, Any] = self._sources.get(metric_key_prefix) or {"": None}
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for label, samples in sources.items():
            sums = self._sums_of(dataloader if samples is None else self.get_eval_dataloader(samples))
            total = total + sums
            if label:
                metrics[f"{metric_key_prefix}_{label}_loss"] = self._means(sums)["loss"]
        upstream_api.clear_evaluation_metrics(self)
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self._means(total).items()}
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=self.num_examples(dataloader)
        )

    def _sums_of(self, dataloader: DataLoader[Any]) -> torch.Tensor:
        """The losses of all pairs, the log-likelihood of the chosen answers, the pairs and the tokens of chosen
        answers, and what `Compared.figures` has, in one. All ranks enter."""
        total = torch.zeros(4 + 2 * len(self.measured), dtype=torch.float64, device=self.args.device)
        for inputs in dataloader:
            inputs = upstream_api.to_trainer_device(self, inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                found = self._compare(self.model, inputs)
            sums = [found.losses.sum()[None], found.likelihood[None], self._sizes(inputs), found.figures.flatten()]
            total += torch.cat([each.double() for each in sums])
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        summed: torch.Tensor = self.accelerator.reduce(total, reduction="sum")
        return summed

    def _means(self, sums: torch.Tensor) -> dict[str, float]:
        loss, likelihood, number, tokens, *figures = sums.tolist()
        mean = loss / max(number, 1) - self._preference.likelihood_weight * likelihood / max(tokens, 1)
        return {"loss": mean} | self._metrics_of(figures) | {"pairs": number}

    def _metrics_of(self, figures: Sequence[float]) -> dict[str, float]:
        """The metrics from the sums of `Compared.figures`, flat."""
        sums, sizes = figures[: len(self.measured)], figures[len(self.measured) :]
        return {name: total / max(size, 1) for name, total, size in zip(self.measured, sums, sizes, strict=True)}


def trainer_class(recipe: Recipe) -> functools.partial[Trainer] | None:
    """What makes the trainer of the recipe's objective; None for that of SFT."""
    from distft.training.odds_ratio import OddsRatioTrainer  # these import this module
    from distft.training.rated import RatedTrainer

    if not recipe.prefers:
        return None
    preference, on_adapter = recipe.preference or Preference(), recipe.adapter is not None
    if preference.unpaired:
        length = recipe.training.get("max_length", 1024)
        return functools.partial(RatedTrainer, preference=preference, on_adapter=on_adapter, max_length=length)
    if not preference.refers:
        return functools.partial(OddsRatioTrainer, preference=preference)
    return functools.partial(PreferenceTrainer, preference=preference, on_adapter=on_adapter)


def other_forwards(recipe: Recipe, epochs: int) -> float:
    """How many forward passes each token takes besides that of the trained model: one of the reference, unless that is
    known before the first of so many epochs; with `kto`, two of both models on mismatched answers."""
    preference = recipe.preference or Preference()
    if not (recipe.prefers and preference.refers):
        return 0.0
    if "kto" in preference.names:
        return 3.0
    return 0.0 if precomputes(recipe, epochs) else 1.0


def drift(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The sum over tokens of exp(d) - 1 - d, where d = log π_ref - log π, without gradients.

    On tokens that the model wrote itself, its mean is an unbiased estimate of the KL divergence of π from π_ref, and no
    term is negative (Schulman 2020, "Approximating KL divergence", k3). Here the tokens are those of the data.
    """
    apart = (reference - log_probs).detach().float()
    return (torch.expm1(apart) - apart).sum()


def preference_notes(recipe: Recipe) -> list[str]:
    """What a user may not expect of a run over pairs."""
    if not recipe.prefers:
        return []
    dropout = (recipe.lora or {}).get("lora_dropout")
    sorting = [name for name in (recipe.preference or Preference()).weights if name.startswith("aot")]
    return [
        *(
            [f"lora.lora_dropout={dropout:g} is off: preferences are compared without noise, as in TRL"]
            if dropout
            else []
        ),
        *(
            [f"{' and '.join(sorting)} sort the pairs of a micro-batch: the result depends on how a step is divided"]
            if sorting
            else []
        ),
    ]


def sums_of(log_probs: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The sum of the log-probabilities of each sequence's trained tokens, [sequences]. Without atomics, so that it is
    the same every time, and in fp64: the difference of two sums of hundreds of nats is what counts."""
    return torch.segment_reduce(log_probs.flatten().double(), "sum", lengths=counts, unsafe=True)[:-1]


def halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of values [sequences], those of the chosen and those of the rejected answers, [pairs] each."""
    return values[::2], values[1::2]
