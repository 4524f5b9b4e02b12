"""The result of a run is the model of its best evaluation, also if the run is interrupted in between."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from distft.api.in_process import train_here
from distft.config.recipe import load_recipe
from distft.distributed.strategies.single import Single
from distft.distributed.world import World
from distft.errors import InvariantError, StorageError
from distft.runs import manifest
from distft.runs.folder import RunFolder
from distft.training import run as run_module
from distft.training.best_model import BestModel
from distft.training.checkpoints import read_tensors
from distft.training.trainer import Trainer

# The learning rate is too high: the first evaluation is the best, and the run is stopped three evaluations later.
# Dropout, so that a step that is repeated or left out changes every later one.
RECIPE = (
    *("recipe=tiny", "strategy=single", "quantization=null", "tracking.report_to=[]", "data.max_samples=48"),
    *("data.validation_fraction=0.2", "batching.global_batch_size=8", "evaluation.before_and_after=false"),
    *("training.learning_rate=0.02", "training.lr_scheduler_type=constant", "training.max_steps=14"),
    *("training.warmup_steps=0", "training.logging_steps=1", "training.eval_strategy=steps", "training.eval_steps=1"),
    *("training.save_strategy=steps", "training.save_steps=2", "training.save_total_limit=1"),
    *("training.load_best_model_at_end=true", "training.early_stopping_patience=3"),
)
BEST, LAST = 1, 4


def train(where: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> RunFolder:
    monkeypatch.chdir(where)
    return RunFolder(train_here([*RECIPE, *words], 0).resolve())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that was not interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        return train(tmp_path_factory.mktemp("whole"), patch)


def logged(folder: RunFolder, key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in folder.read_metrics() if key in record}


def assert_result_is(folder: RunFolder, step: int) -> None:
    """The saved adapter is that of the checkpoint of `step`, to the bit."""
    saved, expected = (read_tensors(path) for path in (folder.adapter, folder.checkpoints / f"checkpoint-{step}"))
    assert set(saved) == set(expected) and saved
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor), name


def test_the_run_stops_and_ends_with_the_best_model(whole: RunFolder) -> None:
    losses = logged(whole, "eval_loss")
    assert list(losses) == [1, 2, 3, 4] and min(losses, key=losses.__getitem__) == BEST
    summary = whole.read_summary()
    assert summary["best"] == {"metric": "eval_loss", "value": losses[BEST], "step": BEST, "is_result": True}
    assert summary["stopped_early"] == {"step": LAST, "of": 14, "evaluations": 3}
    assert (summary["status"], summary["steps"]) == ("finished", LAST)
    assert list(logged(whole, "loss")) == [1, 2, 3, 4], "every evaluation that may be saved is logged before"
    assert_result_is(whole, BEST)


def test_the_best_checkpoint_is_kept_besides_the_newest(whole: RunFolder) -> None:
    """`save_total_limit=1`, and step 1 is not among those of `save_steps=2`."""
    assert sorted(path.name for path in whole.checkpoints.iterdir()) == [f"checkpoint-{BEST}", f"checkpoint-{LAST}"]


def test_interrupted_twice_the_run_decides_and_ends_alike(
    whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once between evaluations that did not improve, once after the last step was saved and before the result was."""

    def fail(*_: Any, **__: Any) -> None:
        raise InvariantError("interrupted")

    step = Trainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer,
            "training_step",
            lambda self, *args: fail() if self.state.global_step == 3 else step(self, *args),
        )
        with pytest.raises(InvariantError, match="interrupted"):
            train(tmp_path, monkeypatch)
    folder = RunFolder(tmp_path / "runs" / "tiny")
    newest, _ = manifest.newest(folder.checkpoints)
    assert newest is not None and manifest.read(newest)["carried"]["best"]["unimproved"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "finish", fail)
        with pytest.raises(InvariantError, match="interrupted"):
            train(tmp_path, monkeypatch)
    assert list(logged(folder, "eval_loss")) == [1, 2, 3, 4]
    capsys.readouterr()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", fail)  # nothing is left to train
        assert train(tmp_path, monkeypatch) == folder
    for key in ("loss", "eval_loss"):
        assert logged(folder, key) == logged(whole, key)
    summary, expected = folder.read_summary(), whole.read_summary()
    assert summary["restarts"] == 2
    for key in ("best", "stopped_early", "steps", "samples", "train_loss"):
        assert summary[key] == expected[key], key
    ours, theirs = read_tensors(folder.adapter), read_tensors(whole.adapter)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    said = capsys.readouterr().err
    assert "stopped early at step 4 of 14: eval_loss did not improve for 3 evaluations; the best was eval_loss" in said
    assert "the result is the model of the best evaluation: eval_loss" in said


def test_a_best_checkpoint_that_is_damaged_is_not_taken_and_without_it_the_last_model_is(
    whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First a run that ends with a best checkpoint of which a byte is wrong, then the same run without it."""
    unfinished(whole, tmp_path)
    best = tmp_path / "runs" / "tiny" / "checkpoints" / f"checkpoint-{BEST}"
    file = best / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"checkpoint-1, which has its best model, cannot be read: .* is damaged"):
        train(tmp_path, monkeypatch)
    shutil.rmtree(best)
    folder = train(tmp_path, monkeypatch)
    notes = " ".join(folder.read_summary()["changed_for_you"])
    assert "the checkpoint of step 1, whose eval_loss of" in notes and "is not there any more" in notes
    assert "no evaluation gave a finite eval_loss: the result is the model of the last step" in notes
    assert_result_is(folder, LAST)


def test_a_run_that_was_saved_after_its_last_step_trains_no_further(
    whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of `training.max_steps`, in the middle of an epoch. That of early stopping is in the test above."""

    def fail(*_: Any) -> None:
        raise AssertionError("a step after the last")

    unfinished(whole, tmp_path)
    monkeypatch.setattr(Trainer, "training_step", fail)
    changes = (f"training.max_steps={LAST}", "training.early_stopping_patience=9", "run.force=true")
    folder = train(tmp_path, monkeypatch, *changes)
    assert (folder.read_summary()["steps"], folder.read_summary()["stopped_early"]) == (LAST, None)
    assert_result_is(folder, BEST)


def test_other_weights_than_those_that_were_evaluated_are_an_error(
    whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(whole, tmp_path)
    monkeypatch.setattr(Trainer, "_load_best_model", lambda self: None)
    with pytest.raises(InvariantError, match=r"the weights loaded from \S+checkpoint-1 are not those whose eval_loss"):
        train(tmp_path, monkeypatch)


def unfinished(whole: RunFolder, where: Path) -> None:
    """Copy the run of `whole` to `where`, as one that was killed before its result was saved."""
    copy = RunFolder(where / "runs" / "tiny")
    shutil.copytree(whole.path, copy.path)
    shutil.rmtree(copy.adapter)
    copy.write_summary(copy.read_summary() | {"status": "running"})


# ---- decisions, without a model --------------------------------------------------------------------------------------


class Judged:
    """A run of evaluations, which the trainer's own code finds the best of."""

    def __init__(self, *words: str) -> None:
        recipe = load_recipe([*RECIPE, *words])
        self.state, self.control = TrainerState(max_steps=100), TrainerControl()
        self.stop: Any = SimpleNamespace(stopped=False)
        self.best = BestModel(recipe, Single(World(), False, "single"), RunFolder(Path("none")), self.stop, {}, print)
        self.higher = "accuracy" in self.best._metric
        self.model = torch.nn.Linear(1, 1)

    def evaluate(self, value: float) -> tuple[bool, bool]:
        """Whether the run saves and whether it stops after a step whose evaluation gives `value`."""
        self.state.global_step += 1
        self.control.should_save = False
        metrics = {self.best._metric: value}

        def find_best() -> bool:
            args = SimpleNamespace(
                metric_for_best_model=self.best._metric, greater_is_better=self.higher, save_strategy="steps"
            )
            trainer: Any = SimpleNamespace(args=args, state=self.state)
            return bool(super(Trainer, Trainer)._determine_best_metric(trainer, metrics, None))  # type: ignore[misc]

        self.best.judge(metrics, self.model, self.state, self.control, find_best)
        return self.control.should_save, self.control.should_training_stop


def test_every_new_best_is_saved_and_patience_counts_evaluations_in_a_row() -> None:
    run = Judged()
    values = (3.0, 2.0, 2.5, 2.1, 1.9, 1.9, 2.0, math.nan)
    assert [run.evaluate(value)[0] for value in values] == [True, True, False, False, True, False, False, False]
    assert (run.state.best_metric, run.state.best_global_step, run.control.should_training_stop) == (1.9, 5, True)


def test_evaluations_that_are_not_finite_are_no_improvement_from_the_first_on() -> None:
    run = Judged("training.early_stopping_patience=2")
    assert [run.evaluate(math.nan) for _ in range(2)] == [(False, False), (False, True)]


def test_a_higher_accuracy_is_an_improvement() -> None:
    run = Judged("training.metric_for_best_model=imdb_accuracy", "training.early_stopping_patience=2")
    ends = [run.evaluate(value) for value in (0.5, 0.6, 0.55, 0.5)]
    assert ends == [(True, False), (True, False), (False, False), (False, True)]
    assert run.state.best_metric == 0.6


def test_an_improvement_within_the_threshold_is_saved_and_does_not_count_as_one() -> None:
    run = Judged("training.early_stopping_threshold=0.1", "training.early_stopping_patience=2")
    assert [run.evaluate(value) for value in (2.0, 1.95, 1.91)] == [(True, False), (True, False), (True, True)]
    assert run.state.best_metric == 1.91


def test_a_run_that_only_stops_early_saves_nothing_more() -> None:
    run = Judged("training.load_best_model_at_end=false", "training.early_stopping_patience=1")
    assert [run.evaluate(value) for value in (2.0, 3.0)] == [(False, False), (False, True)]
    assert run.best.facts(run.state)["best"]["is_result"] is False


def test_a_best_checkpoint_that_was_lost_gives_way_to_the_one_before() -> None:
    """As on a full disk: what is better than the older one is the best again."""
    run = Judged()
    for value in (3.0, 2.0):
        run.evaluate(value)
    run.best.forget(2, run.state)
    assert (run.state.best_metric, run.state.best_global_step) == (3.0, 1)
    assert run.evaluate(2.5) == (True, False) and run.state.best_global_step == 3
    run.best.forget(3, run.state)
    run.best.forget(1, run.state)
    assert (run.state.best_metric, run.state.best_global_step) == (None, None)


def test_values_of_another_metric_are_not_compared() -> None:
    """`run.force=true` resumes with another `metric_for_best_model`."""
    run = Judged("training.metric_for_best_model=perplexity")
    run.best._judged_by, run.best._unimproved = "eval_loss", 3
    run.state.best_metric, run.state.best_global_step = 1.5, 7
    run.best.on_train_begin(SimpleNamespace(), run.state, run.control)
    assert (run.state.best_metric, run.control.should_training_stop) == (None, False)
    assert run.evaluate(9.0) == (True, False) and run.state.best_metric == 9.0


@pytest.mark.parametrize(("stopped", "evaluates"), [(False, True), (True, False)])
def test_the_model_that_a_time_limit_ends_with_is_evaluated(stopped: bool, evaluates: bool) -> None:
    """Not where the run is only interrupted, and will go on."""
    run = Judged()
    run.stop.stopped, run.control.should_training_stop = stopped, True
    run.best.on_step_end(SimpleNamespace(eval_strategy="steps", eval_delay=0), run.state, run.control)
    assert run.control.should_evaluate is evaluates
