"""Under every strategy the result is the best model, also if a rank was killed between the best step and the end."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import torch

from distft.runs.folder import RunFolder
from distft.training.checkpoints import read_tensors

from ..faults.conftest import ranks
from .conftest import finish, needs_compiler, start
from .test_guards import wait_for_step

# The learning rate is too high, and the first evaluation the best.
RUN = (
    *("recipe=tiny", "quantization=null", "tracking.report_to=[]", "data.max_samples=40", "lora.lora_dropout=0"),
    *("data.validation_fraction=0.2", "batching.global_batch_size=8", "evaluation.before_and_after=false"),
    *("training.learning_rate=0.02", "training.lr_scheduler_type=constant", "training.warmup_steps=0"),
    *("training.max_steps=40", "training.logging_steps=1", "training.eval_strategy=steps", "training.eval_steps=1"),
    *("training.save_strategy=steps", "training.save_steps=1", "training.save_total_limit=1"),
    *("training.load_best_model_at_end=true", "training.early_stopping_patience=10"),
)
STOPS = 11


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter of the best step, which a run that ends there saves."""
    where = tmp_path_factory.mktemp("best")
    words = (*RUN, "strategy=single", "training.max_steps=1", "training.load_best_model_at_end=false")
    ended = finish(start([sys.executable, "-m", "distft.cli", "train", *words], where, OMP_NUM_THREADS="1"), where)
    assert ended.code == 0, ended.stderr[-3000:]
    return read_tensors(ended.folder.adapter)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_a_run_whose_rank_is_killed_ends_with_the_best_model(
    strategy: str, best: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    needs_compiler(strategy)
    command = [sys.executable, "-m", "distft.cli", "train", *RUN, f"strategy={strategy}", "--nproc", "2"]
    process = start(command, tmp_path, OMP_NUM_THREADS="1")
    folder: RunFolder = wait_for_step(tmp_path, 3)
    ranks(process)[1].send_signal(signal.SIGKILL)
    ended = finish(process, tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    losses = {record["step"]: record["eval_loss"] for record in folder.read_metrics() if "eval_loss" in record}
    assert list(losses) == list(range(1, STOPS + 1)) and min(losses, key=losses.__getitem__) == 1
    summary = folder.read_summary()
    assert summary["restarts"] == 1
    assert (summary["best"]["step"], summary["best"]["value"]) == (1, losses[1])
    assert summary["stopped_early"] == {"step": STOPS, "of": 40, "evaluations": 10}
    assert {path.name for path in folder.checkpoints.iterdir()} == {"checkpoint-1", f"checkpoint-{STOPS}"}
    saved = read_tensors(folder.adapter)
    assert set(saved) == set(best)
    difference = torch.cat([(saved[name] - tensor).flatten() for name, tensor in best.items()]).norm()
    updates = torch.cat([tensor.flatten() for name, tensor in best.items() if "lora_B" in name]).norm()
    assert difference <= 1e-3 * updates, "the later steps move each weight by as much again"
