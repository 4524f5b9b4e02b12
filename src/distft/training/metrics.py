"""What a run measures about itself: loss, samples/s, tokens/s, MFU, memory and energy.

All ranks measure and reduce; only rank 0 writes metrics.jsonl, the console and the trackers.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from distft.config.recipe import Recipe
from distft.console import say
from distft.data.batch_plan import Plan
from distft.data.loader import DataWait
from distft.distributed.collectives import gather, reduce
from distft.distributed.world import World
from distft.files import disk_full_reason
from distft.hardware import GIB, EnergyMeter, device_flops
from distft.runs.folder import RunFolder
from distft.training.progress import Progress, loss_name
from distft.training.selection import metric_of, selects
from distft.training.throughput import Window, Work

_RANKS_LISTED = 64
"""Log per-rank memory up to this many ranks; beyond that, only the worst."""


@dataclass
class Telemetry(TrainerCallback):  # type: ignore[misc]
    """Measures a run, and adds the figures to the trainer's logs; the trackers must come after it."""

    folder: RunFolder
    recipe: Recipe
    world: World
    plan: Plan
    """Counts the samples and tokens of a step: TRL's own count loses ranks in the last batch of an epoch."""
    work: Work
    profiled: Callable[[int], bool] = lambda step: False
    """Whether a step runs under the profiler, so that its time is left out."""
    waits: DataWait = field(default_factory=DataWait)
    resumed: Mapping[str, Any] = field(default_factory=dict)
    """What `carried` returned when the checkpoint that the run resumes from was saved."""
    steps_total: int = 0
    whole: Window = field(default_factory=Window)
    _window: Window = field(default_factory=Window)
    _clock: float = 0.0
    _joules: float | None = None
    _idle_watts: float | None = None
    _evaluating_s: float = 0.0
    _saving_s: float = 0.0
    _began_at: int = 0
    _step_logged: int = 0
    _tokens_logged: int = 0
    _losses: float = 0.0
    _unwritten: list[dict[str, Any]] = field(default_factory=list)
    _by_rank: dict[str, list[float]] = field(default_factory=dict)
    _bar: Progress | None = None
    _energy: EnergyMeter | None = None
    _energy_j: float | None = None
    _started: float = 0.0
    train_time_s: float | None = None

    def __post_init__(self) -> None:
        self._flops = device_flops()
        self._selects = selects(self.recipe)
        if self.resumed:
            self.whole = Window(**self.resumed["whole"])
            losses = self.resumed["losses"]  # None if it was NaN, which JSON lacks
            self._losses = math.nan if losses is None else losses
            self._evaluating_s, self._saving_s = self.resumed["evaluating_s"], self.resumed["saving_s"]
            self.waits.seconds += self.resumed["waited_s"]

    def carried(self) -> dict[str, Any]:
        """Return what a resumed run needs so that its figures cover all steps, not only those since the resume."""
        return {
            "whole": dataclasses.asdict(self.whole),
            "losses": self._losses,
            "evaluating_s": self._evaluating_s,
            "saving_s": self._saving_s,
            "waited_s": self.waits.seconds,
            "trained_s": self._trained_s,
            "energy_j": self._energy_j,
        }

    @property
    def _trained_s(self) -> float:
        """Seconds of training so far, including those before a resume, up to the checkpoint."""
        return float(time.perf_counter() - self._started + self.resumed.get("trained_s", 0.0))

    @property
    def mean_loss(self) -> float | None:
        """Mean over all steps until the last log; the last step and every save are logged."""
        return self._losses / self._step_logged if self._step_logged else None

    # Trainer's events -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._energy = EnergyMeter()
        watts = self._energy.idle_watts()
        total = reduce([watts or 0.0], "sum", self.world)[0]
        self._idle_watts = None if watts is None else total
        self.steps_total = state.max_steps
        self._began_at = self._step_logged = state.global_step
        self._tokens_logged = self.plan.tokens_after(state.global_step)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if self.world.is_main:
            self._bar = Progress(state.max_steps, state.global_step)
        self._started = time.perf_counter()
        self._lap()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # End a window after the warm-up, which the rates exclude, and after the last step, which they include.
        control.should_log |= state.global_step in (self._warmup, state.max_steps)
        self._pause(control)
        if self._bar is not None:
            self._bar.update(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._pause(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self._evaluating_s += self._lap().seconds

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saving_s += self._lap().seconds

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count the time of the block as evaluation."""
        self._lap()
        yield
        self._evaluating_s += self._lap().seconds

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the time of the block, after training, as saving."""
        self._lap()
        yield
        self._saving_s += self._lap().seconds

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is None or "train_runtime" in logs:
            return
        if "loss" in logs:
            self._add_rates(state.global_step, logs)
        else:  # an evaluation: when its weights were reached
            logs["time_s"] = self._clock - self._started + self.resumed.get("trained_s", 0.0)
        for key in [key for key in logs if key.endswith("_loss") and not self.recipe.prefers]:
            logs[key.removesuffix("loss") + "perplexity"] = perplexity(logs[key])
        if self.world.is_main:
            self._write({"step": state.global_step, **logs, **(self._by_rank if "loss" in logs else {})})
            self._show(logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.train_time_s = self._trained_s
        self._lap()
        self._write()
        if self._unwritten:
            say(f"warning: {len(self._unwritten)} records could not be written to {self.folder.metrics}")
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # ------------------------------------------------------------------------------------------------------------------

    def _write(self, *records: dict[str, Any]) -> None:
        """Append records to metrics.jsonl, or keep them for the next call if the disk is full."""
        self._unwritten += records
        try:
            self.folder.append_metrics(*self._unwritten)
        except OSError as error:
            why = disk_full_reason(error)
            if why is None:
                raise
            if len(self._unwritten) == len(records):  # the first time
                say(
                    f"warning: {self.folder.metrics} cannot be written ({why}); records are kept in memory until it can"
                )
            return
        self._unwritten.clear()

    def _pause(self, control: Any) -> None:
        """End a stretch of training if something else follows.

        A save or the end of training is logged first, so that the log covers everything before it; so is an
        evaluation from which either may follow.
        """
        control.should_log |= control.should_save or control.should_training_stop
        control.should_log |= control.should_evaluate and self._selects
        if control.should_log or control.should_evaluate:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._window += self._lap()

    @property
    def _warmup(self) -> int:
        """The last step after this start that the rates exclude; at least one step is always measured."""
        warm = self._began_at + self.recipe.tracking.throughput_warmup_steps
        return min(warm, max(self.steps_total - 1, 0))

    def _lap(self) -> Window:
        """Return the seconds, and the joules of this process's GPU, since the last call."""
        now, joules = time.perf_counter(), self._energy.joules() if self._energy else None
        used = None if joules is None else joules - (self._joules or 0.0)
        lap = Window(now - self._clock, joules=used)
        self._clock, self._joules = now, joules
        return lap

    def _add_rates(self, step: int, logs: dict[str, Any]) -> None:
        """Add the rates since the last log to `logs`, and the window to that of the whole run. All ranks enter."""
        samples, tokens = self.plan.samples_after(step), self.plan.tokens_after(step)
        logs.pop("num_tokens", None)
        window, self._window = self._window, Window()
        joules = reduce([window.joules or 0.0], "sum", self.world)[0]
        window = Window(
            window.seconds,
            step - self._step_logged,
            samples - self.plan.samples_after(self._step_logged),
            tokens - self._tokens_logged,
            None if window.joules is None else joules,
        )
        if self.profiled(step):
            window = Window()  # the profiler slows it down
        elif self._step_logged >= self._warmup:
            self.whole += window
        self._losses += logs["loss"] * (step - self._step_logged)
        self._step_logged, self._tokens_logged = step, tokens
        logs |= {"samples": samples, "tokens": tokens, "time_s": self._trained_s}
        logs |= window.rates(self.world.world_size, self.work, self._flops) | self.memory()
        logs["energy_j"] = self.energy()

    def energy(self) -> float | None:
        """Return the joules that the GPUs of all ranks have used since training began. All ranks enter."""
        joules = self._energy.joules() if self._energy else None
        total = float(reduce([joules or 0.0], "sum", self.world)[0]) + (self.resumed.get("energy_j") or 0.0)
        self._energy_j = total if joules is not None else None
        return self._energy_j

    def memory(self) -> dict[str, float | None]:
        """Return the peak GPU memory (allocated, reserved) and host RSS of the worst rank, in GiB. All ranks enter."""
        on_gpu = torch.cuda.is_available()
        numbers = [
            torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0,
            torch.cuda.max_memory_reserved() / GIB if on_gpu else 0.0,
            psutil.Process(os.getpid()).memory_info().rss / GIB,
        ]
        everyone = gather(numbers, self.world)
        worst = [max(column) for column in zip(*everyone, strict=True)]
        self._by_rank = {"peak_memory_by_rank_gib": [rank[0] for rank in everyone]} if on_gpu else {}
        self._by_rank["host_rss_by_rank_gib"] = [rank[2] for rank in everyone]
        if self.world.world_size > _RANKS_LISTED:
            self._by_rank = {}
        return {
            "peak_memory_gib": worst[0] if on_gpu else None,
            "peak_reserved_gib": worst[1] if on_gpu else None,
            "host_rss_gib": worst[2],
        }

    def figures(self) -> dict[str, Any]:
        """Return the run's figures for `summary.json`, by the keys of `runs.figures`. All ranks enter."""
        waited, evaluating, saving = reduce([self.waits.seconds, self._evaluating_s, self._saving_s], "max", self.world)
        return {
            "train_time_s": self.train_time_s,
            "samples": self.plan.samples_after(self._step_logged),
            "tokens": self._tokens_logged,
            "energy_j": self.energy(),
            "idle_watts": self._idle_watts,
            **self.whole.energy(self._idle_watts),
            "measured_steps": self.whole.steps,
            "step_time_s": self.whole.seconds / self.whole.steps if self.whole.steps else None,
            "data_wait_s": waited,
            "evaluation_time_s": evaluating,
            "saving_time_s": saving,
            **self.whole.rates(self.world.world_size, self.work, self._flops),
            **self.memory(),
        }

    def _show(self, logs: dict[str, Any]) -> None:
        if self._bar is None:
            return
        if "loss" in logs:
            self._bar.show(logs)
        for key in logs:
            if key.endswith("_loss") and not key.endswith("nll_loss") and "loss" not in logs:  # of an evaluation
                scored = {metric_of(self.recipe)} & set(logs) - {"eval_loss", "eval_perplexity"}
                scores = "".join(f", {name.removeprefix('eval_')} {logs[name]:.3f}" for name in scored)
                loss = f"{loss_name(key)} {logs[key]:.4f}"
                accuracy = logs.get(key.removesuffix("loss") + "rewards/accuracies")
                if not self.recipe.prefers:
                    loss += f", perplexity {perplexity(logs[key]):.3f}"
                elif accuracy is not None:
                    loss += f", reward accuracy {accuracy:.3f}"
                self._bar.say(f"{loss}{scores}")


def perplexity(loss: float) -> float:
    """Return exp of a mean negative log-likelihood in nats, or infinity if that overflows."""
    return math.inf if loss >= 700 else math.exp(loss)
