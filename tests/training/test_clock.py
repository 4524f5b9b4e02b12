"""What a run says about its time, by a clock that moves as told: a step is 1 s, a save and an evaluation are 10 s."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from distft.api.in_process import train_here
from distft.config.recipe import load_recipe
from distft.data.batch_plan import Plan
from distft.distributed.world import World
from distft.runs.folder import RunFolder
from distft.training import metrics, run
from distft.training.throughput import Work
from distft.training.trainer import Trainer

RECIPE = (
    *("recipe=tiny", "strategy=single", "quantization=null", "tracking.report_to=[]", "data.max_samples=80"),
    *("batching.global_batch_size=16", "batching.micro_batch=4", "evaluation.max_samples=4"),
    *("training.max_steps=7", "training.logging_steps=4", "training.eval_strategy=steps", "training.eval_steps=3"),
    *("training.save_strategy=steps", "training.save_steps=3", "tracking.throughput_warmup_steps=1"),
)
"""Logged after steps 1 (warm-up), 3 (save), 4, 6 (save) and 7 (the last); evaluated and saved after 3, 6 and 7;
evaluated before step 1 and after training, when the result is saved."""


@dataclass
class Timed:
    """A finished run, its records of training steps, and the loss of every step."""

    summary: dict[str, Any]
    records: dict[int, dict[str, Any]]
    losses: list[float]


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Timed:
    now, losses = [1000.0], []

    def taking(seconds: float, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            now[0] += seconds
            return result

        return call

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        losses.append((self.state.global_step, float(loss)))
        return loss

    step = Trainer.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("timed"))
        patch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now[0]))
        patch.setattr(Trainer, "training_step", taking(0.25, training_step))  # four micro-batches are a step
        patch.setattr(Trainer, "evaluation_loop", taking(10, Trainer.evaluation_loop))
        patch.setattr(Trainer, "_save_checkpoint", taking(10, Trainer._save_checkpoint))
        patch.setattr(run, "save_result", taking(10, run.save_result))
        folder = Path(train_here(RECIPE, 0)).resolve()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Timed(
        json.loads((folder / "summary.json").read_text()),
        {record["step"]: record for record in records if "loss" in record},
        [sum(loss for at, loss in losses if at == number) for number in range(7)],
    )


def test_saving_and_evaluation_are_not_part_of_the_rates(timed: Timed) -> None:
    """16 samples a second in every window, whatever lies between two windows."""
    assert list(timed.records) == [1, 3, 4, 6, 7]
    assert {step: record["samples_per_second"] for step, record in timed.records.items()} == dict.fromkeys(
        (1, 3, 4, 6, 7), 16.0
    )
    summary = timed.summary
    assert (summary["measured_steps"], summary["step_time_s"], summary["samples_per_second"]) == (6, 1.0, 16.0)
    tokens = timed.records[7]["tokens"] - timed.records[1]["tokens"]
    assert summary["tokens_per_second"] == summary["tokens_per_second_per_gpu"] == tokens / 6


def test_saving_and_evaluation_have_times_of_their_own(timed: Timed) -> None:
    """What comes after training is no part of `train_time_s`."""
    assert (timed.summary["evaluation_time_s"], timed.summary["saving_time_s"]) == (5 * 10, 4 * 10)
    assert timed.records[4]["time_s"] == 4 + 2 * 10 + 10
    assert timed.summary["train_time_s"] == 7 + 4 * 10 + 3 * 10


def test_the_train_loss_is_the_mean_over_steps(timed: Timed) -> None:
    """The windows between two logs have one or two steps, so the mean of what was logged would be another number."""
    assert len(timed.losses) == 7 and max(timed.losses) > 1.05 * min(timed.losses)
    assert timed.summary["train_loss"] == pytest.approx(sum(timed.losses) / 7, rel=1e-6)
    logged = [record["loss"] for record in timed.records.values()]
    assert timed.summary["train_loss"] != pytest.approx(sum(logged) / 5, rel=1e-3)


# ---- without a model -------------------------------------------------------------------------------------------------


def telemetry(*words: str) -> metrics.Telemetry:
    recipe = load_recipe(["recipe=tiny", "tracking.throughput_warmup_steps=1", *words])
    plan = Plan([5] * 320, recipe.batching)
    return metrics.Telemetry(RunFolder(Path("run")), recipe, World(), plan, Work(1.0), steps_total=9)


@pytest.mark.parametrize(
    ("follows", "words", "logged"),
    [
        ("should_save", (), True),  # a resumed run goes on from what was logged
        ("should_training_stop", (), True),  # as at the end of run.train_time
        ("should_evaluate", ("training.early_stopping_patience=2",), True),  # which may save, or end the run
        ("should_evaluate", (), False),
        ("should_epoch_stop", (), False),
    ],
)
def test_what_a_save_or_the_end_may_follow_is_logged_before(follows: str, words: tuple[str, ...], logged: bool) -> None:
    control = TrainerControl(**{follows: True})
    telemetry(*words).on_step_end(None, TrainerState(global_step=5, max_steps=9), control)
    assert control.should_log is logged


def test_the_last_steps_of_an_epoch_are_no_part_of_its_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    measured, control = telemetry(), TrainerControl(should_evaluate=True)
    now[0] += 3
    measured.on_epoch_end(None, TrainerState(global_step=5, max_steps=9), control)
    now[0] += 10
    measured.on_evaluate(None, TrainerState(), control)
    assert measured.carried()["evaluating_s"] == 10
