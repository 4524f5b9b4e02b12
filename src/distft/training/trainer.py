"""TRL's SFTTrainer with what no callback can reach: planned batches, a loss that never waits, and skipped steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from distft import upstream_api
from distft.config.recipe import Recipe
from distft.data.batch_plan import Plan, RankBatches
from distft.data.curriculum import trained_tokens
from distft.data.loader import Collator, DataWait, build_loader
from distft.data.prepare import Splits
from distft.data.splits import first_samples, lengths_of
from distft.data.tokenize import IGNORED
from distft.distributed.strategies import Strategy
from distft.models.adapter import keep_adapter_in_fp32, trained_values
from distft.models.generation import save_stop_tokens
from distft.training.arguments import pad_multiple
from distft.training.best_model import BestModel
from distft.training.callbacks import FSDPPrefetch
from distft.training.checkpoints import Checkpoints
from distft.training.lm_head import TrainedPositions
from distft.training.metrics import perplexity
from distft.training.nonfinite import BadNumbers
from distft.training.reviews import ValidationReviews

_OURS = ("scored", "targets", "counts", "good", "answers", "reference")
"""What `data.loader` adds to a batch: for the head, the trained positions of the flattened rows, and their tokens; of
preferences, how many of them each sequence has, which answers are good, which positions are of answers, and what the
reference says of them, if that is known."""


def build_trainer(
    recipe: Recipe,
    strategy: Strategy,
    model: Any,
    arguments: SFTConfig,
    plan: Plan,
    tokenizer: Any,
    splits: Splits,
    *,
    callbacks: Sequence[TrainerCallback],
    changed: Callable[[str], None],
    numbers: BadNumbers | None = None,
    checkpoints: Checkpoints | None = None,
    best: BestModel | None = None,
    reviews: ValidationReviews | None = None,
    waits: DataWait | None = None,
    create: Callable[..., Trainer] | None = None,
) -> Trainer:
    """Build the trainer for a model, ready to train.

    Runs and the search for a micro-batch both use it, so that the search measures the program that will run. `changed`
    receives what the strategy does differently from the recipe, `create` makes a trainer of another class.
    """
    exact = [] if recipe.adapter is None else trained_values(model)
    trainer = (create or Trainer)(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        plan=plan,
        collator=collator(recipe, strategy, tokenizer),
        skips_empty_rounds=strategy.skips_empty_rounds,
        numbers=numbers,
        checkpoints=checkpoints,
        best=best,
        reviews=reviews,
        waits=waits or DataWait(),
        samples=splits.samples,
        train_dataset=splits.train,
        eval_dataset=first_samples(splits.validation, recipe.evaluation.max_samples),
        sources={
            "eval": splits.by_source("validation", recipe.evaluation.max_samples),
            "test": splits.by_source("test", recipe.evaluation.max_samples),
        },
        callbacks=[FSDPPrefetch(strategy, recipe.batching.memory_limit_gib, changed), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    keep_adapter_in_fp32(model, recipe, strategy, exact)
    strategy.before_preparing(trainer.accelerator, model)
    return trainer


def collator(recipe: Recipe, strategy: Strategy, tokenizer: Any) -> Collator:
    """The collator for micro-batches of the size that the recipe has."""
    packed = recipe.batching.micro_batch_tokens is not None
    multiple = pad_multiple(recipe, strategy)
    return Collator(
        tokenizer.pad_token_id,
        packed=packed,
        multiple=multiple,
        for_head=True,
        pairs=recipe.pairs,
        rated=recipe.rates,
        whole_chosen=recipe.scores_prompts,
        shared=recipe.shares_prompts is True,
    )


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer over prepared samples, in the micro-batches of a plan.

    `samples` are those that the plan numbers: `train_dataset`, or those of a stream that begins with it. `numbers`
    decides whether a step may update the weights (None: every step may). `checkpoints` saves (None: the trainer's own
    way). `best` judges the evaluations (None: nothing follows from them). `reviews` are classified in each (None: none
    are). `sources` are the samples of each source of a mixture, by the prefix of an evaluation's metrics.
    """

    figures: tuple[str, ...] = ("loss", "perplexity")
    """What an evaluation measures."""

    def __init__(
        self,
        *args: Any,
        plan: Plan,
        samples: Any,
        collator: Collator,
        skips_empty_rounds: bool,
        numbers: BadNumbers | None,
        checkpoints: Checkpoints | None,
        best: BestModel | None,
        reviews: ValidationReviews | None,
        waits: DataWait,
        sources: Mapping[str, Mapping[str, Any]],
        **kwargs: Any,
    ) -> None:
        self._plan, self._collate, self._skips_empty_rounds = plan, collator, skips_empty_rounds
        self._numbers, self._checkpoints, self._best, self._waits = numbers, checkpoints, best, waits
        self._reviews, self._sources, self._samples = reviews, sources, samples
        super().__init__(*args, **kwargs)
        self._trained_positions = TrainedPositions(self.accelerator.unwrap_model(self.model))
        self._empty_rounds = 0  # rounds of the current optimizer step that are still to be skipped
        # Entropy, correct predictions, auxiliary loss and trained tokens since the last log.
        self._sums = torch.zeros(4, device=self.args.device)

    def get_train_dataloader(self) -> Any:
        return self._loader(self._samples, self._plan, self.args.gradient_accumulation_steps)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        plan = self._plan.evaluation(lengths_of(samples), self.args.per_device_eval_batch_size)
        return self._loader(samples, plan, plan.accumulation(self.args.world_size, 1))

    def _batches(self, plan: Plan, accumulation: int) -> RankBatches:
        return RankBatches(plan, self.args.process_index, self.args.world_size, accumulation)

    def _loader(self, samples: Any, plan: Plan, accumulation: int) -> Any:
        batches = self._batches(plan, accumulation)
        given, workers = self.args, self.args.dataloader_num_workers
        options = {"pin_memory": given.dataloader_pin_memory and given.device.type == "cuda"}
        if workers:  # torch refuses these without
            options |= {
                "persistent_workers": given.dataloader_persistent_workers,
                "prefetch_factor": given.dataloader_prefetch_factor,
                "multiprocessing_context": given.dataloader_multiprocessing_context,
                "in_order": given.dataloader_in_order,
            }
        return build_loader(samples, batches, self._collate, given.device, workers, **options)

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        self._loss_before_step = upstream_api.running_loss(self)
        if self._skips_empty_rounds:
            self._empty_rounds = self.args.gradient_accumulation_steps - self._rounds()
        return super().get_batch_samples(self._waits.timed(epoch_iterator), *args, **kwargs)

    def _rounds(self) -> int:
        """The rounds of gradient accumulation in which any rank has samples, in the coming optimizer step."""
        return len(self._plan.micro_batches(self.state.global_step, self.args.world_size))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The trainer's step; rounds in which no rank has samples are skipped."""
        if self._empty_rounds:
            self._empty_rounds -= 1
            loss = torch.zeros((), device=self.args.device)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._numbers is not None:
            self._numbers.watch(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once per step, before the optimizer: drops the gradients of a step that may not update the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step = self.state.global_step + 1
        if self._numbers is not None and not self._numbers.may_update(step, norm, self.accelerator):
            model.zero_grad(set_to_none=True)  # optimizers skip parameters without gradients: no decay, no momentum
            upstream_api.forget_step(self, self._loss_before_step)
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        due = control.should_log or control.should_save or control.should_evaluate or control.should_training_stop
        if self._numbers is not None and due:
            self._numbers.settle()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, without gathering metrics from all ranks in every micro-batch, which waits for the device.

        Returns the summed loss of the trained tokens, for `loss_type: nll` their negative log-likelihood in nats,
        divided by the number of trained tokens in the whole global batch. The auxiliary loss of a mixture of experts is
        averaged over micro-batches and ranks by their trained tokens: an empty micro-batch has none.
        """
        if self.label_smoother is not None or return_outputs:
            inputs = {key: value for key, value in inputs.items() if key not in _OURS}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = self._score(model, inputs | ({"output_router_logits": True} if self.aux_loss_enabled else {}))
        loss = -outputs.log_probs  # zero for ignored labels
        if self.args.loss_type == "dft":  # Wu et al. 2025 (arXiv:2508.05629)
            loss = loss * outputs.log_probs.detach().exp()
        total, trained = loss.sum(), outputs.label_mask.sum()
        auxiliary = trained * outputs.aux_loss if self.aux_loss_enabled else torch.zeros_like(total)
        if self.model.training:
            sums = [outputs.entropy.detach().sum(), outputs.is_top1.sum(), auxiliary.detach(), trained]
            self._sums += torch.stack(sums)
        total = total + self.router_aux_loss_coef * auxiliary
        if num_items_in_batch is None:
            return total / trained.clamp(min=1)
        # Ranks average their gradients, but `num_items_in_batch` counts the trained tokens of all of them.
        return total * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)

    def _score(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The outputs of TRL's fused head: log-probabilities (zero for ignored labels), entropy, `label_mask`, …"""
        scored, targets = inputs.get("scored"), inputs.get("targets")
        inputs = {key: value for key, value in inputs.items() if key not in _OURS}
        if scored is not None:
            inputs.pop("labels", None)
            inputs["shift_labels"] = targets
            self._trained_positions.select_in_next_call(scored)
        return model(**inputs, use_cache=False, fused_lm_head=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the metrics since the last one reduced over all ranks. All ranks enter."""
        if "loss" in logs:
            entropy, right, auxiliary, trained = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            self._sums.zero_()
            if trained:
                logs |= {"entropy": entropy / trained, "mean_token_accuracy": right / trained}
                logs |= {"aux_loss": auxiliary / trained} if self.aux_loss_enabled else {}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the trainer would count all parameters in every micro-batch. The telemetry computes FLOPs."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        def write() -> None:
            super(Trainer, self)._save_checkpoint(model, trial)
            if self.args.should_save:
                save_stop_tokens(self.model, Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"))

        if self._checkpoints is None:
            write()
        else:
            self._checkpoints.save(self.state, model, self.optimizer, write)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        def find_best() -> bool:
            return bool(super(Trainer, self)._determine_best_metric(metrics, trial))

        if self._best is None:
            return find_best()
        return self._best.judge(metrics, self.model, self.state, self.control, find_best)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's epoch; none is begun in a run that was saved after its last step and did not end."""
        if not (self.control.should_training_stop or self.state.global_step >= self.state.max_steps):
            super()._run_epoch(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: rank 0 would do it before the ranks meet, and could fail alone."""

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute the mean negative log-likelihood over all trained tokens of the split, in nats.

        It is the same for any training loss and any number of processes. The trainer's own loop would evaluate the
        training loss (smoothed, weighted, or with a mixture of experts' auxiliary loss), and average the means of
        batches, which depends on how the samples fall into batches.
        """
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        metrics: dict[str, float] = {}
        loss = trained = 0.0
        sources = self._sources.get(metric_key_prefix) or {"": None}
        for label, samples in sources.items():
            nats, tokens = self._nats(dataloader if samples is None else self.get_eval_dataloader(samples))
            loss, trained = loss + nats, trained + tokens
            if label:
                metrics[f"{metric_key_prefix}_{label}_loss"] = nats / max(tokens, 1)
        upstream_api.clear_evaluation_metrics(self)
        mean = loss / max(trained, 1)
        metrics |= {f"{metric_key_prefix}_loss": mean, f"{metric_key_prefix}_perplexity": perplexity(mean)}
        if self._reviews is not None and metric_key_prefix == "eval":
            metrics |= self._reviews.metrics(self.log_likelihoods(self._reviews.samples))
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=self.num_examples(dataloader)
        )

    def _nats(self, dataloader: DataLoader[Any]) -> tuple[float, float]:
        """The negative log-likelihood of all trained tokens, in nats, and their number. All ranks enter."""
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for inputs in dataloader:
            inputs = upstream_api.to_trainer_device(self, inputs)
            tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
            with torch.no_grad(), self.compute_loss_context_manager():
                likelihood = self._score(self.model, inputs).log_probs.double().sum()
            total += torch.stack([-likelihood, tokens.double()])
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        nats, trained = self.accelerator.reduce(total, reduction="sum").tolist()
        return nats, trained

    def log_likelihoods(self, samples: Any) -> list[float]:
        """The sum of the log-probabilities of each sample's trained tokens, in nats. All ranks enter, and get all."""
        self.model.eval()
        plan = self._plan.evaluation(lengths_of(samples), self.args.per_device_eval_batch_size)
        accumulation = plan.accumulation(self.args.world_size, 1)
        trained = trained_tokens(samples)
        found = torch.zeros(len(samples), dtype=torch.float64, device=self.args.device)
        loader = self._loader(samples, plan, accumulation)
        for indices, inputs in zip(self._batches(plan, accumulation), loader, strict=True):
            inputs = upstream_api.to_trainer_device(self, inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                scores = self._score(self.model, inputs).log_probs.double().flatten()
            # The head has scored the trained tokens alone, in the order of the samples.
            owners = [index for index in indices for _ in range(trained[index])]
            found.index_add_(0, torch.tensor(owners, dtype=torch.long, device=found.device), scores[: len(owners)])
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        everywhere: list[float] = self.accelerator.reduce(found, reduction="sum").tolist()
        return everywhere
