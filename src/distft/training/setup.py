"""The stages of a run up to its trainer; each needs the result of the one before, which fixes their order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl import SFTConfig

from distft.config.recipe import Recipe
from distft.console import say
from distft.data.batch_plan import Lengths, Plan
from distft.data.chat_template import chat_template, stop_tokens_of
from distft.data.checks import require_splits
from distft.data.loader import DataWait
from distft.data.prepare import Splits, prepare_data
from distft.data.splits import first_samples, lengths_of, longest_sequence, padded_lengths
from distft.distributed.collectives import together
from distft.distributed.launcher_args import Launcher
from distft.distributed.signals import STOP
from distft.distributed.strategies import Strategy, choose
from distft.distributed.supervisor import Launch
from distft.distributed.tensors import whole_numel
from distft.distributed.world import World
from distft.errors import RecipeError
from distft.models.activation_checkpointing import set_up_checkpointing
from distft.models.adapter import modules_left_out
from distft.models.checks import Expected, position_findings
from distft.models.digest import digest
from distft.models.generation import end_answers_at
from distft.models.loading import load_model, load_tokenizer, model_path
from distft.models.parameters import non_embedding_parameters, recomputed_parameters
from distft.models.skeleton import Skeleton
from distft.models.start import start_digest, start_from_adapter, start_notes
from distft.runs.logs import rank_log
from distft.runs.record import Record
from distft.runs.trackers import trackers
from distft.runs.wandb import closing_wandb
from distft.training.arguments import training_arguments
from distft.training.best_model import BestModel
from distft.training.callbacks import HeldOutLoss, Invariants
from distft.training.checkpoints import Checkpoints
from distft.training.checks import weights_notes
from distft.training.invariants import packed_checksums
from distft.training.metrics import Telemetry
from distft.training.micro_batches import settle
from distft.training.nonfinite import BadNumbers
from distft.training.oom import MemoryGuard
from distft.training.order import plan_in_order
from distft.training.preference import other_forwards, preference_notes, trainer_class
from distft.training.profiler import Profile
from distft.training.reference_log_probs import ReferencePass, precomputes
from distft.training.reviews import ValidationReviews
from distft.training.samples import HeldOutAnswers
from distft.training.schedule import schedule_faults, schedule_notes, total_steps
from distft.training.stopping import StopTogether
from distft.training.throughput import Work, model_flops_per_token
from distft.training.trainer import Trainer, build_trainer
from distft.training.watchdog import Watchdog


@dataclass(frozen=True)
class TrainingData:
    """The tokenizer, the tokenized splits, the number of tokens of each training sample, and the reviews to classify
    in each evaluation, if there are any."""

    tokenizer: Any
    splits: Splits
    lengths: Lengths
    reviews: ValidationReviews | None


@dataclass(frozen=True)
class OpenRun:
    """A run whose folder, log, watchdog and memory guard are active. `recipe` has its final micro-batch."""

    recipe: Recipe
    strategy: Strategy
    data: TrainingData
    record: Record
    watchdog: Watchdog
    memory: MemoryGuard


@dataclass(frozen=True)
class PreparedModel:
    """The model with its adapter, and what follows from it and from the plan of micro-batches. `recipe` has those that
    are right for the model."""

    recipe: Recipe
    model: Any
    arguments: SFTConfig
    plan: Plan
    trainable: int
    work: Work


@dataclass(frozen=True)
class Training:
    """The trainer, and those of its callbacks whose results the end of a run needs."""

    trainer: Trainer
    stop: StopTogether
    profile: Profile
    telemetry: Telemetry
    numbers: BadNumbers
    checkpoints: Checkpoints
    best: BestModel
    held_out: HeldOutLoss
    answers: HeldOutAnswers
    invariants: Invariants


def setup_strategy(recipe: Recipe, launcher: Launcher) -> Strategy:
    """Choose the strategy and configure this process for it.

    Raises:
        UserError: the recipe, the launcher and the devices do not fit together.
    """
    world = replace(World.from_environment(os.environ), timeout_s=recipe.training.get("ddp_timeout", World.timeout_s))
    strategy = choose(recipe, world, os.environ, launcher)
    recipe.check_division(world.world_size)
    strategy.configure(os.environ)
    STOP.deferred = world.world_size > 1
    return strategy


def setup_data(recipe: Recipe, strategy: Strategy) -> TrainingData:
    """Load the tokenizer, then read and tokenize the data. All ranks enter."""
    tokenizer = together(strategy.world, lambda: load_tokenizer(recipe))
    splits = together(strategy.world, lambda: prepare_data(recipe, tokenizer))
    together(strategy.world, lambda: require_splits(recipe, splits))
    reviews = together(strategy.world, lambda: ValidationReviews.of(recipe, tokenizer))
    return TrainingData(tokenizer, splits, lengths_of(splits.train), reviews)


@contextmanager
def open_run(recipe: Recipe, strategy: Strategy, data: TrainingData) -> Iterator[OpenRun]:
    """Claim or resume the run folder, start what watches the run, and settle the micro-batch. All ranks enter."""
    recipe = data.splits.recipe  # it names the format of the data also where that was inferred
    with (
        closing_wandb(),
        Record.open(
            recipe,
            strategy,
            Path.cwd(),
            data_digest=data.splits.report.digest,
            held_out_digest=data.splits.report.held_out_digest,
            held_out_overlap=data.splits.report.overlap,
            data_sources=data.splits.report.sources or None,
            data_inferred=data.splits.inferred,
            trained_tokens_by_role=data.splits.report.trained or None,
            weights_digest=weights_digest(recipe, strategy.world),
            start_digest=together(strategy.world, lambda: start_digest(recipe) if strategy.world.is_main else None),
        ) as record,
        rank_log(record.folder, strategy.world),
        Watchdog(strategy.world, record, recipe.run.hang_timeout_s) as watchdog,
        MemoryGuard(recipe, strategy, data.lengths, record) as memory,
    ):
        yield OpenRun(memory.recipe, strategy, data, record, watchdog, memory)


def weights_digest(recipe: Recipe, world: World) -> str | None:
    """The digest of the base's weights, on rank 0. All ranks enter."""

    def read() -> str | None:
        return digest(model_path(recipe), recipe.model.revision) if world.is_main else None

    return together(world, read)


def setup_model(run: OpenRun, expected: Expected | None = None) -> PreparedModel:
    """Plan the micro-batches, say what is `expected` of the model, then load it and its adapter, which must be so. All
    ranks enter."""
    recipe, strategy, record, world = run.recipe, run.strategy, run.record, run.strategy.world
    plan = plan_in_order(recipe, run.data.splits, run.data.lengths, record, world)
    accumulation = together(world, lambda: plan.accumulation(world.world_size, recipe.epochs(plan.steps)))
    for note in together(world, lambda: _position_notes(run, plan)):
        record.changed(note)
    arguments = training_arguments(recipe, strategy, record.folder, accumulation)
    check_schedule(run, arguments, total_steps(recipe, plan.steps))
    starting = together(world, lambda: start_notes(recipe) if world.is_main else [])
    for note in (*weights_notes(recipe), *preference_notes(recipe), *starting):
        record.changed(note)
    for line in expected.lines(recipe) if expected is not None and world.is_main else []:
        say(line)
    model = together(world, lambda: run.memory.load(lambda: _loaded(recipe, strategy, expected)))
    if left_out := modules_left_out(model, recipe):
        record.changed(f"lora.target_modules=all-linear: no adapter can be put on {', '.join(left_out)}")
    widths = padded_lengths(run.data.splits.train, pairs=recipe.pairs)
    settled = run.memory.load(lambda: settle(model, recipe, strategy, run.data.tokenizer, widths))
    for note in settled.notes:
        record.changed(note)
    if settled.recipe is not recipe:  # padded: the same steps, in other micro-batches
        recipe = settled.recipe
        plan = plan.divided(recipe.batching)
        accumulation = plan.accumulation(world.world_size, recipe.epochs(plan.steps))
        arguments = training_arguments(recipe, strategy, record.folder, accumulation)
    if recipe.lora is None and model.config.get_text_config() is not model.config:
        arguments.ddp_find_unused_parameters = True  # no text reaches a vision tower; only DDP reads this
    if run.data.splits.report.trained:  # conversations
        tokenizer = run.data.tokenizer
        end_answers_at(model, stop_tokens_of(chat_template(recipe, tokenizer), tokenizer))
    heaviest = plan.heaviest_tokens
    if recipe.pairs and recipe.batching.micro_batch_tokens is None:
        heaviest = recipe.micro_batch * int(widths.max())
    checkpointed = set_up_checkpointing(model, recipe, strategy, heaviest)
    trainable = sum(whole_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    record.note(
        **recipe.batching.sizes(),
        gradient_accumulation_steps=accumulation,
        trainable_parameters=trainable,
        parameters=sum(map(whole_numel, model.parameters())),
        checkpointed_layers=checkpointed,
        quantized_share=None if expected is None or expected.weights is None else expected.weights.share,
        **settled.facts,
    )
    if world.is_main:
        for line in [*run.data.splits.report.lines(), *record.lines()]:
            say(line)
    more = other_forwards(recipe, recipe.epochs(plan.steps))
    work = Work.of(
        model_flops_per_token(
            non_embedding_parameters(model),
            frozen_base=recipe.lora is not None,
            forwards=more,
        ),
        recomputed_parameters(model, by_trainer=bool(arguments.gradient_checkpointing)),
    )
    return PreparedModel(recipe, model, arguments, plan, trainable, work)


def _loaded(recipe: Recipe, strategy: Strategy, expected: Expected | None) -> Any:
    weights = None if expected is None else expected.weights
    model = load_model(recipe, strategy, None if weights is None else weights.require)
    if expected is not None:
        expected.require(model)
    return start_from_adapter(model, recipe)


def check_schedule(run: OpenRun, arguments: SFTConfig, steps: int) -> None:
    """Note what is unexpected in the learning rates of the run's optimizer steps.

    Raises:
        RecipeError: they train nothing, or cannot be computed.
    """
    if faults := schedule_faults(run.recipe, arguments, steps):
        raise RecipeError(faults)
    for note in schedule_notes(arguments, steps):
        run.record.changed(note)


def _position_notes(run: OpenRun, plan: Plan) -> list[str]:
    """What is said about samples that are longer than what the model was built for, now that their lengths are known.

    Raises:
        RecipeError: the model has no positions beyond, and would fail at the first such sample.
    """
    longest = longest_sequence(run.data.splits.train) if run.recipe.prefers else plan.longest_sample
    faults, notes = position_findings(run.recipe, Skeleton.of(run.recipe), longest=longest)
    if faults:
        raise RecipeError(faults)
    return notes


def setup_trainer(run: OpenRun, prepared: PreparedModel) -> Training:
    """Build the trainer with its callbacks, which continue from what a checkpoint has carried over."""
    recipe, strategy, record, world = prepared.recipe, run.strategy, run.record, run.strategy.world
    folder, plan, splits = record.folder, prepared.plan, run.data.splits
    carried = record.place.carried
    measured = carried.get("telemetry", {})

    waits = DataWait()
    profile = Profile(folder, recipe, world, waits)
    telemetry = Telemetry(folder, recipe, world, plan, prepared.work, profile.covers, waits, measured)
    numbers = BadNumbers(recipe, folder, world, plan, carried.get("skipped_steps", 0))
    packed = packed_checksums(prepared.model)
    updated = carried.get("updated", record.step > 0)
    invariants = Invariants(strategy, recipe, prepared.trainable, numbers, updated, packed)
    held_out = HeldOutLoss(first_samples(splits.test, recipe.evaluation.max_samples), carried.get("before"))
    answers = HeldOutAnswers(recipe, splits.test, strategy, folder, run.data.tokenizer, telemetry)
    stop = StopTogether(
        world,
        Launch.of(os.environ).began,
        recipe.run.max_time_s,
        recipe.run.train_time_s,
        measured.get("trained_s", 0.0),
    )

    def to_carry() -> dict[str, Any]:
        return {
            "before": held_out.before,
            "skipped_steps": numbers.skipped,
            "updated": invariants.updated,
            "telemetry": telemetry.carried(),
            "best": best.carried(),
        }

    best = BestModel(recipe, strategy, folder, stop, carried.get("best", {}), record.changed)
    checkpoints = Checkpoints(folder, strategy, recipe.training.get("save_total_limit"), to_carry, best)
    evaluates = recipe.evaluation.before_and_after and splits.test is not None
    reference = None
    if precomputes(recipe, recipe.epochs(plan.steps)):
        held_out_samples = [
            first_samples(each, recipe.evaluation.max_samples) for each in (splits.validation, splits.test)
        ]
        reference = ReferencePass(recipe, record, world, [splits.train, *held_out_samples])
    trainer = build_trainer(
        recipe,
        strategy,
        prepared.model,
        prepared.arguments,
        plan,
        run.data.tokenizer,
        splits,
        callbacks=[
            invariants,
            stop,
            best,  # after what stops the run, before what logs each evaluation that may be saved
            *([reference] if reference else []),  # before the telemetry, whose time is that of training
            profile,  # before the telemetry, whose windows end where profiled steps begin and end
            telemetry,  # before the trackers, which log what it adds
            *trackers(recipe, folder, world),
            *([held_out] if evaluates else []),
            *([answers] if recipe.evaluation.samples.number else []),
            checkpoints,
            run.watchdog,
        ],
        changed=record.changed,
        numbers=numbers,
        checkpoints=checkpoints,
        best=best,
        reviews=run.data.reviews,
        waits=waits,
        create=trainer_class(recipe),
    )
    for callback in (held_out, answers):
        callback.attach(trainer)
    if reference is not None:
        reference.attach(trainer)
    return Training(trainer, stop, profile, telemetry, numbers, checkpoints, best, held_out, answers, invariants)
