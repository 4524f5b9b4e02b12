"""TRL's SFTTrainer with what no callback can reach: the plan of the samples, a loss that never waits, a token-weighted evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from distft import upstream_api
from distft.config.recipe import Recipe
from distft.console import say
from distft.data.batch_plan import Plan
from distft.data.loader import Collator, DataWait, build_loader
from distft.data.prepare import lengths_of
from distft.data.tokenize import IGNORED
from distft.distributed.strategies import Strategy
from distft.runs.folder import RunFolder
from distft.training import invariants
from distft.training.checkpoints import Checkpoints
from distft.training.lm_head import Selection
from distft.training.nonfinite import BadNumbers

PACK_MULTIPLE = 512
"""On GPUs packs are filled up to a multiple of so many tokens, or of a sixteenth of the budget where that is less. cuBLAS looks for the
best kernel of each new shape for some 4 ms, on the host; with packs of every length a step spent a fifth of its time on that
(7B, 6,500 tokens on an H200)."""


def sft_config(recipe: Recipe, strategy: Strategy, folder: RunFolder, accumulation: int) -> SFTConfig:
    """The recipe's training section as SFTConfig, with what the other sections own filled in."""
    micro = recipe.batching.micro_batch if recipe.batching.micro_batch_tokens is None else 1
    given = {key: value for key, value in recipe.training.items() if key != "save_total_limit"}
    given.setdefault("bf16", recipe.mixed_precision == "bf16")
    given.setdefault("per_device_eval_batch_size", micro)
    # It hides bad numbers, and waits for the device in every micro-batch.
    given.setdefault("logging_nan_inf_filter", False)
    given.setdefault("dataloader_num_workers", 1 if strategy.on_gpu else 0)
    if strategy.on_gpu and isinstance(budget := recipe.batching.micro_batch_tokens, int):
        given.setdefault("pad_to_multiple_of", min(PACK_MULTIPLE, max(budget // 16, 1)))
    if strategy.checkpoints_by_layer(recipe):
        given["gradient_checkpointing"] = False
    config = SFTConfig(
        output_dir=str(folder.checkpoints),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        seed=recipe.run.seed,
        # `Checkpoints` retires them: the trainer would delete the last good one before the new one is known to be whole.
        save_total_limit=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",  # the trackers are ours to start: on rank 0, guarded, behind the telemetry
        disable_tqdm=True,
        **(strategy.training_arguments() | given),
    )
    upstream_api.use_one_gpu(config)
    return config


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer over prepared samples in the micro-batches of a plan, whose steps update nothing where their numbers are bad."""

    def __init__(
        self,
        *args: Any,
        plan: Plan,
        skips_spare_rounds: bool,
        numbers: BadNumbers,
        checkpoints: Checkpoints,
        waits: DataWait | None = None,
        **kwargs: Any,
    ) -> None:
        self._plan, self._skips_spare_rounds = plan, skips_spare_rounds
        self._numbers, self._checkpoints, self._waits = numbers, checkpoints, waits or DataWait()
        super().__init__(*args, **kwargs)
        self._collate = Collator(
            self.processing_class.pad_token_id, packed=plan.batching.micro_batch_tokens is not None,
            multiple=self.args.pad_to_multiple_of, for_head=True,
        )  # fmt: skip
        self._selection = Selection(self.accelerator.unwrap_model(self.model))
        self._spare = 0  # rounds of the optimizer step at hand that are still to be left out
        # Entropy, right predictions and trained tokens since the last log.
        self._sums = torch.zeros(3, device=self.args.device)

    def get_train_dataloader(self) -> Any:
        return self._loader(self.train_dataset, self._plan, self.args.gradient_accumulation_steps)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        plan = self._plan.evaluation(lengths_of(samples), self.args.per_device_eval_batch_size)
        return self._loader(samples, plan, plan.accumulation(self.args.world_size, 1))

    def _loader(self, samples: Any, plan: Plan, accumulation: int) -> Any:
        return build_loader(
            samples, plan, self._collate, self.args.process_index, self.args.world_size, accumulation, self.args.device,
            self.args.dataloader_num_workers,
        )  # fmt: skip

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        self._loss_before_step = upstream_api.running_loss(self)
        if self._skips_spare_rounds:
            rounds = len(self._plan.micro_batches(self.state.global_step, self.args.world_size))
            self._spare = self.args.gradient_accumulation_steps - rounds
        return super().get_batch_samples(self._waits.timed(epoch_iterator), *args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The trainer's step; a round in which no rank has anything to do costs nothing."""
        if self._spare:
            self._spare -= 1
            loss = torch.zeros((), device=self.args.device)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._numbers.watch(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Once a step, before the optimizer: the norm as the trainer knows it, and no gradients where the numbers are bad."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self._numbers.may_update(self.state.global_step + 1, norm, self.accelerator):
            model.zero_grad(set_to_none=True)  # an optimizer passes over what has no gradient: no decay, no momentum
            upstream_api.forget_step(self, self._loss_before_step)
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self._numbers.settle()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, without waiting for the device: TRL gathers its metrics over all ranks in every micro-batch.

        The negative log-likelihood (nats) summed over the trained tokens, divided by those of the whole global batch.
        """
        ours = ("scored", "targets")
        scored, targets = map(inputs.get, ours)
        inputs = {key: value for key, value in inputs.items() if key not in ours}
        if self.aux_loss_enabled or self.label_smoother is not None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if scored is not None:
            del inputs["labels"]
            inputs["shift_labels"] = targets
            self._selection.of_next_call(scored)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        loss = -outputs.log_probs  # zero where the label is ignored
        if self.args.loss_type == "dft":  # Wu et al. 2025 (arXiv:2508.05629)
            loss = loss * outputs.log_probs.detach().exp()
        trained = outputs.label_mask.sum()
        if self.model.training:
            self._sums += torch.stack([outputs.entropy.detach().sum(), outputs.is_top1.sum(), trained])
        if num_items_in_batch is None:
            return loss.sum() / trained.clamp(min=1)
        # Ranks average their gradients, and the number of trained tokens is that of all of them.
        return loss.sum() * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with the metrics since the last one, reduced over all ranks. All ranks enter."""
        if "loss" in logs:
            entropy, right, trained = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            self._sums.zero_()
            if trained:
                logs |= {"entropy": entropy / trained, "mean_token_accuracy": right / trained}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted here, in every micro-batch over all parameters: the telemetry knows the FLOPs of a token."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._checkpoints.save(
            self.state, model, self.optimizer, lambda: super(Trainer, self)._save_checkpoint(model, trial)
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: rank 0 would write it before the ranks meet, and could fail alone."""

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """Mean negative log-likelihood over all trained tokens of the split (nats): the same on any number of processes.

        Trainer's own loop averages the means of batches, which depends on how the samples fall into batches.
        """
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for inputs in dataloader:
            inputs = upstream_api.to_trainer_device(self, inputs)
            tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(self.model, inputs)
            total += torch.stack([loss.detach().double() * tokens, tokens.double()])
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        likelihood, tokens = self.accelerator.reduce(total, reduction="sum").tolist()
        upstream_api.clear_evaluation_metrics(self)
        metrics = {f"{metric_key_prefix}_loss": likelihood / max(tokens, 1)}
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=self.num_examples(dataloader)
        )


class Invariants(TrainerCallback):  # type: ignore[misc]
    """Before step 1 the model is what the recipe asked for; after the first real update the adapter has moved, alike
    everywhere. All ranks check and all stop where one finds a fault."""

    def __init__(self, strategy: Strategy, recipe: Recipe, trainable: int, numbers: BadNumbers) -> None:
        self._strategy, self._recipe, self._trainable, self._numbers = strategy, recipe, trainable, numbers
        self._before: dict[str, int] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        invariants.check_prepared(model, self._recipe, self._strategy, self._trainable)
        self._before = invariants.fingerprint(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        self._learning_rate = max(lr_scheduler.get_last_lr()) if lr_scheduler is not None else 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._before is not None and self._learning_rate > 0 and not self._numbers.in_a_row:
            invariants.check_updated(model, self._strategy, self._before, self._learning_rate)
            self._before = None


class InTime(TrainerCallback):  # type: ignore[misc]
    """Before step 1 the prepared model is told when to gather what is sharded; what that changes is said, and given to `record`."""

    def __init__(self, strategy: Strategy, memory_limit_gib: float | None, record: Callable[[str], None]) -> None:
        self._strategy, self._limit_gib, self._record = strategy, memory_limit_gib, record

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        note = self._strategy.prefetch(model, self._limit_gib)
        if note:
            self._record(note)
            if self._strategy.world.is_main:
                say(note)


class HeldOut(TrainerCallback):  # type: ignore[misc]
    """Loss on the held-out split before the first step; the trainer is given after it is built.

    `before` is what a resumed run measured when it began.
    """

    def __init__(self, samples: Any, before: float | None) -> None:
        self._samples = samples
        self.trainer: Trainer | None = None
        self.before = before

    def measure(self) -> float:
        """Mean negative log-likelihood of the held-out split in nats a token. All ranks enter."""
        assert self.trainer is not None
        return float(self.trainer.evaluate(self._samples, metric_key_prefix="test")["test_loss"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.before is None:
            self.before = self.measure()
