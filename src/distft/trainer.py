"""TRL's SFTTrainer with what no callback can reach: the order of the samples and a token-weighted evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from distft.bad_numbers import BadNumbers
from distft.checkpoint import Checkpoints
from distft.recipe import Recipe
from distft.run import RunFolder
from distft.samples import IGNORED
from distft.strategy import Strategy


def sft_config(recipe: Recipe, strategy: Strategy, folder: RunFolder) -> SFTConfig:
    """The recipe's training section as SFTConfig, with what the other sections own filled in."""
    micro = recipe.micro_batch
    given = {key: value for key, value in recipe.training.items() if key != "save_total_limit"}
    # TRL trains in bf16 where nothing is said; here the model's own type decides.
    given.setdefault("bf16", recipe.model.dtype == "bfloat16" and not given.get("fp16"))
    given.setdefault("per_device_eval_batch_size", micro)
    given.setdefault(
        "logging_nan_inf_filter", False
    )  # it hides bad numbers and waits for the device in every micro-batch
    if recipe.bits == 8:
        # Non-reentrant checkpointing keeps LLM.int8()'s intermediates: 30 GiB instead of 5.5 at 16k tokens of a 1.5B model.
        given.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": True})
    config = SFTConfig(
        output_dir=str(folder.checkpoints),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.accumulation(strategy.world.world_size),
        seed=recipe.run.seed,
        # `Checkpoints` retires them: the trainer would delete the last good one before the new one is known to be whole.
        save_total_limit=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",  # the trackers are ours to start: on rank 0, guarded, behind the telemetry
        disable_tqdm=True,
        **(strategy.training_arguments() | given),
    )
    if config.n_gpu > 1:  # reading it settles the devices; one process uses one of them, never nn.DataParallel
        config._n_gpu = 1
    return config


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer over prepared samples in a given order, whose steps update nothing where their numbers are bad."""

    def __init__(
        self, *args: Any, order: Sampler[int], numbers: BadNumbers, checkpoints: Checkpoints, **kwargs: Any
    ) -> None:
        self._order, self._numbers, self._checkpoints = order, numbers, checkpoints
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._loss_before_step = self._tr_loss.clone()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._numbers.watch(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Once a step, before the optimizer: the norm as the trainer knows it, and no gradients where the numbers are bad."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self._numbers.may_update(self.state.global_step + 1, norm, self.accelerator):
            model.zero_grad(set_to_none=True)  # an optimizer passes over what has no gradient: no decay, no momentum
            self._tr_loss.copy_(self._loss_before_step)
            self._globalstep_last_logged += 1  # the mean loss of the next log is that of the steps which were taken
        return norm

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._checkpoints.save(
            self.state, model, self.optimizer, lambda: super(Trainer, self)._save_checkpoint(model, trial)
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: rank 0 would write it before the ranks meet, and could fail alone."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer does, but each trainable parameter keeps its type: PEFT loads the bf16 adapter of a quantised base
        as fp32, and the resumed run would round otherwise than the one that was interrupted."""
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        super()._load_from_checkpoint(*args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if name in dtypes and parameter.dtype != dtypes[name]:
                parameter.data = parameter.data.to(dtypes[name])

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
            inputs = self._prepare_inputs(inputs)
            tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(self.model, inputs)
            total += torch.stack([loss.detach().double() * tokens, tokens.double()])
        likelihood, tokens = self.accelerator.reduce(total, reduction="sum").tolist()
        self._metrics["eval"].clear()
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
        self._strategy.check_prepared(model, self._recipe, self._trainable)
        self._before = self._strategy.fingerprint(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        self._learning_rate = max(lr_scheduler.get_last_lr()) if lr_scheduler is not None else 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._before is not None and self._learning_rate > 0 and not self._numbers.in_a_row:
            self._strategy.check_updated(model, self._before, self._learning_rate)
            self._before = None


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
