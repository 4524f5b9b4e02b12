"""From a recipe to a finished run, in one of the processes that a launcher has started."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from distft import upstream_names
from distft.config.recipe import load_recipe
from distft.console import say
from distft.data.checks import data_faults
from distft.distributed.collectives import together
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import strategy_faults
from distft.distributed.supervisor import check_not_refused
from distft.runs.card import write_card
from distft.runs.wandb import log_table
from distft.training.check import check_together
from distft.training.checkpoints import save_result
from distft.training.refusals import refusals
from distft.training.setup import (
    OpenRun,
    Training,
    open_run,
    setup_data,
    setup_model,
    setup_strategy,
    setup_trainer,
)


def train(arguments: Sequence[str]) -> None:
    """Train what `arguments` (`recipe=NAME key.path=value …`) ask for. Every process of the run must call this.

    Raises:
        DistftError: the run failed or was stopped; its message and the run folder's `summary.json` say why.
    """
    upstream_names.check()
    recipe = load_recipe(arguments, checks=(strategy_faults, data_faults))
    with refusals():
        strategy = setup_strategy(recipe, Launcher.of_parent())
        together(strategy.world, check_not_refused)
        expected = check_together(recipe, strategy.world, Path.cwd())
        data = setup_data(recipe, strategy)
    with open_run(recipe, strategy, data) as run, refusals():
        training = setup_trainer(run, setup_model(run, expected))
        fit(run, training)
        finish(run, training)


def fit(run: OpenRun, training: Training) -> None:
    """Train until the last step, early stopping, a signal or a time limit; then load the best model, if asked to.

    Raises:
        Interrupted: the run was stopped before its last step.
    """
    # Keep the garbage collector from existing objects: traversing them takes 0.5 s, during which all ranks wait.
    gc.collect()
    gc.freeze()
    with closing(training.profile):
        training.trainer.train(resume_from_checkpoint=run.record.place.resume_from)
    if training.stop.stopped:
        training.profile.write()
    training.stop.raise_if_stopped(training.checkpoints.last)
    training.best.load(training.trainer)


def finish(run: OpenRun, training: Training) -> None:
    """Evaluate, save and read back the result, and complete the run's summary."""
    training.invariants.check_ended(training.trainer.state.global_step)
    record, telemetry, skipped = run.record, training.telemetry, training.numbers.skipped
    before = training.held_out.before
    if before is not None:
        after = training.held_out.measure()
        record.note(
            eval_before=before,
            eval_after=after,
        )
    training.answers.answer("after", training.trainer.state.global_step)
    with telemetry.saving():
        model, tokenizer = training.trainer.model, run.data.tokenizer
        saved = save_result(model, run.recipe, run.strategy, record.folder, tokenizer=tokenizer)
    record.note(
        train_loss=None if skipped else telemetry.mean_loss,  # the mean would count a skipped step as 0
        steps=training.trainer.state.global_step,
        skipped_steps=skipped,
        **training.best.facts(training.trainer.state),
        adapter=str(saved),
        **telemetry.figures(),
    )
    together(run.strategy.world, lambda: write_card(record.folder, saved) if run.strategy.world.is_main else None)
    training.profile.write()  # last: if it fails, the result is safe
    if run.strategy.world.is_main:
        answers = training.answers.found
        for line in [*answers.lines(), *record.closing_lines()]:
            say(line)
        if answers.answers:
            log_table(run.recipe, "samples", *answers.table())
