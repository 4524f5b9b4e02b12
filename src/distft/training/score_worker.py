"""python -m distft.training.score_worker RUN_FOLDER recipe=…: score training samples with the untouched base.

`distft.training.scores` starts one process per rank, in a process group of their own, because a model is loaded there
that differs from the run's: its adapter does nothing. Its trainer prepares the model as the strategy does it for the
run, scores in place of training, and writes the scores to the run's folder after every chunk of samples.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from transformers import TrainerCallback

from distft.config.recipe import Recipe, load_recipe
from distft.console import say
from distft.data.batch_plan import Plan
from distft.data.curriculum import sample_hashes, trained_tokens
from distft.distributed.launcher_args import Launcher
from distft.distributed.supervisor import end_with_parent
from distft.distributed.world import World
from distft.errors import DistftError, ModelError
from distft.hardware import limit_gpu
from distft.models.loading import load_model
from distft.runs.folder import RunFolder
from distft.text import first_line
from distft.training.arguments import training_arguments
from distft.training.micro_batches import settle
from distft.training.oom import is_out_of_memory
from distft.training.scores import CHUNK, OUT_OF_MEMORY, ScoreFiles
from distft.training.setup import setup_data, setup_strategy
from distft.training.trainer import Trainer, build_trainer


class Score(TrainerCallback):  # type: ignore[misc]
    """Scores the samples once the trainer has prepared the model, and ends before the first step."""

    def __init__(self, samples: Any, files: ScoreFiles, world: World) -> None:
        self._samples, self._files, self._world = samples, files, world
        self.trainer: Trainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.trainer is not None
        began = psutil.Process().create_time()  # the time of the first chunk includes loading the model
        for start in range(0, len(self._samples), CHUNK):
            some = self._samples.select(range(start, min(start + CHUNK, len(self._samples))))
            nats = -np.array(self.trainer.log_likelihoods(some)) / np.maximum(trained_tokens(some), 1)
            if not np.isfinite(nats).all():
                raise ModelError(
                    "the base's log-likelihoods are NaN or infinite, so samples cannot be ordered by them: its weights "
                    "are damaged, or its dtype overflows (try model.dtype=bfloat16 or float32)"
                )
            if self._world.is_main:
                self._files.add(sample_hashes(some), nats, time.time() - began)
            began = time.time()
        control.should_training_stop = True


def scoring_recipe(arguments: Sequence[str]) -> Recipe:
    """The recipe with an adapter that begins as the base, and without evaluation, saving and logging."""
    quiet = ("eval_strategy", "save_strategy", "logging_strategy")
    recipe = load_recipe([*arguments, *(f"training.{name}=no" for name in quiet)])
    if recipe.lora is None:
        return recipe
    return recipe.model_copy(update={"lora": recipe.lora | {"init_lora_weights": True}})


def score(run: Path, arguments: Sequence[str], output: Path) -> None:
    """Score the samples that are wanted in the folder of a run. All ranks enter. `output` is an empty folder."""
    recipe = scoring_recipe(arguments)
    strategy = setup_strategy(recipe, Launcher())
    data = setup_data(recipe, strategy)
    limit_gpu(recipe.batching.memory_limit_gib)
    files = ScoreFiles(RunFolder(run).scores)
    scoring = Score(data.splits.train.select(np.load(files.wanted)), files, strategy.world)
    model = load_model(recipe, strategy)
    recipe = settle(model, recipe, strategy, data.tokenizer, data.lengths).recipe  # as the run does
    training = training_arguments(recipe, strategy, RunFolder(output), 1)
    scoring.trainer = build_trainer(
        recipe,
        strategy,
        model,
        training,
        Plan(data.lengths, recipe.batching, recipe.run.seed),
        data.tokenizer,
        data.splits,
        callbacks=[scoring],
        changed=lambda line: None,
    )
    scoring.trainer.train()


def main() -> int:
    end_with_parent()
    try:
        with tempfile.TemporaryDirectory(prefix="distft-scores-") as output:
            score(Path(sys.argv[1]), sys.argv[2:], Path(output))
    except Exception as error:
        out_of_memory = is_out_of_memory(error)
        if not (out_of_memory or isinstance(error, DistftError)):
            raise
        say(first_line(error) if out_of_memory else str(error))
        os._exit(OUT_OF_MEMORY if out_of_memory else 1)  # an orderly exit would wait for the other ranks
    return 0


if __name__ == "__main__":
    sys.exit(main())
