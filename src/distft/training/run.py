"""accelerate launch -m distft.train recipe=ddp_qlora: from a recipe to a finished run."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from transformers import PrinterCallback

from distft import upstream_api
from distft.config.recipe import load_recipe
from distft.console import say
from distft.data.batch_plan import Plan
from distft.data.formats import data_faults
from distft.data.loader import DataWait
from distft.data.prepare import first_samples, lengths_of, prepare_data
from distft.distributed.collectives import together
from distft.distributed.launcher_args import Launcher
from distft.distributed.signals import STOP
from distft.distributed.strategies import choose, strategy_faults
from distft.distributed.supervisor import Launch
from distft.distributed.tensors import whole_numel
from distft.distributed.world import World
from distft.models.activation_checkpointing import set_up_checkpointing
from distft.models.adapter import keep_adapter_in_fp32
from distft.models.digest import digest
from distft.models.loading import load_model, load_tokenizer, model_path
from distft.models.parameters import non_embedding_parameters, recomputed_parameters
from distft.runs.logs import rank_log
from distft.runs.record import Record
from distft.runs.trackers import trackers
from distft.runs.wandb import closing_wandb
from distft.training.checkpoints import Checkpoints, save_result
from distft.training.metrics import Telemetry, Work, model_flops_per_token, perplexity
from distft.training.nonfinite import BadNumbers
from distft.training.oom import Memory
from distft.training.profiler import Profile
from distft.training.stopping import StopTogether
from distft.training.trainer import HeldOut, InTime, Invariants, Trainer, sft_config
from distft.training.watchdog import Watch


def train(arguments: Sequence[str]) -> None:
    """Train what `arguments` (`recipe=NAME key.path=value …`) ask for, as one of the processes that were started.

    Raises:
        DistftError: the run failed or was stopped; its message says why, and the run folder's summary as well.
    """
    upstream_api.check()
    recipe = load_recipe(arguments, checks=(strategy_faults, data_faults))
    world = replace(World.from_environment(os.environ), timeout_s=recipe.training.get("ddp_timeout", World.timeout_s))
    how = choose(recipe, world, os.environ, Launcher.of_parent())
    recipe.check_division(world.world_size)  # before anything is loaded
    how.configure(os.environ)
    STOP.deferred = world.world_size > 1

    tokenizer = together(world, lambda: load_tokenizer(recipe))
    splits = together(world, lambda: prepare_data(recipe, tokenizer))
    lengths = lengths_of(splits.train)
    with (
        closing_wandb(),
        Record.open(recipe, how, Path.cwd(), data_digest=splits.report.digest) as record,
        rank_log(record.folder, world),
        Watch(world, record, recipe.run.hang_timeout_s) as watch,
        Memory(recipe, how, lengths, record) as memory,
    ):
        recipe = memory.recipe
        plan = Plan(lengths, recipe.batching, recipe.run.seed)
        accumulation = together(world, lambda: plan.accumulation(world.world_size, recipe.epochs(plan.steps)))
        how.accumulate(os.environ, accumulation)
        config = sft_config(recipe, how, record.folder, accumulation)
        model = together(world, lambda: memory.load(lambda: load_model(recipe, how)))
        trainable = sum(whole_numel(p) for p in model.parameters() if p.requires_grad)
        flops = model_flops_per_token(non_embedding_parameters(model), frozen_base=recipe.lora is not None)
        record.note(
            **recipe.batching.sizes(), gradient_accumulation_steps=accumulation, trainable_parameters=trainable,
            parameters=sum(map(whole_numel, model.parameters())), attn_implementation=upstream_api.attn_implementation(model.config),
            checkpointed_layers=set_up_checkpointing(model, recipe, how, plan.heaviest_tokens),
            weights_digest=digest(model_path(recipe), recipe.model.revision) if world.is_main else None,
        )  # fmt: skip
        if world.is_main:
            for line in [*splits.report.lines(), *record.lines()]:
                say(line)

        recomputed = recomputed_parameters(model, by_trainer=bool(config.gradient_checkpointing))
        waits = DataWait()
        profile = Profile(record.folder, recipe, world, waits)
        carried = record.place.carried
        measured = carried.get("telemetry", {})
        work = Work.of(flops, recomputed)
        telemetry = Telemetry(record.folder, recipe, world, plan, work, profile.covers, waits, measured)
        held_out = HeldOut(first_samples(splits.test, recipe.evaluation.max_samples), carried.get("before"))
        stop = StopTogether(world, Launch.of(os.environ).began, recipe.run.max_time_s, recipe.run.train_time_s,
                            measured.get("trained_s", 0.0))  # fmt: skip
        numbers = BadNumbers(recipe, record.folder, world, plan, carried.get("skipped_steps", 0))
        checkpoints = Checkpoints(record.folder, how, recipe.training.get("save_total_limit"),
                                  lambda: {"before": held_out.before, "skipped_steps": numbers.skipped, "telemetry": telemetry.carried()})  # fmt: skip
        trainer = Trainer(
            model=model, args=config, processing_class=tokenizer, plan=plan, numbers=numbers, checkpoints=checkpoints, waits=waits,
            skips_spare_rounds=how.skips_spare_rounds, train_dataset=splits.train,
            eval_dataset=first_samples(splits.validation, recipe.evaluation.max_samples),
            callbacks=[
                Invariants(how, recipe, trainable, numbers), InTime(how, recipe.batching.memory_limit_gib, record.changed), stop, profile, telemetry, *trackers(recipe, record.folder, world),
                *([held_out] if recipe.evaluation.before_and_after and splits.test is not None else []),
                checkpoints, watch,
            ],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        held_out.trainer = trainer
        keep_adapter_in_fp32(model, recipe, how)
        how.preserve_output_dtype(trainer.accelerator)
        # What is there now stays. To look through all of it takes Python half a second, in which all ranks wait for the one that does.
        gc.collect()
        gc.freeze()
        with closing(profile):
            trainer.train(resume_from_checkpoint=record.place.resume_from)
        if stop.stopped:
            profile.write()
        stop.raise_if_stopped(checkpoints.last)
        if held_out.before is not None:
            before, after = held_out.before, held_out.measure()
            record.note(eval_before={"loss": before, "perplexity": perplexity(before)},
                        eval_after={"loss": after, "perplexity": perplexity(after)})  # fmt: skip
        with telemetry.saving():
            saved = save_result(trainer.model, recipe, how, record.folder)
        record.note(
            train_loss=None if numbers.skipped else telemetry.mean_loss,  # it would count a skipped step as 0
            steps=trainer.state.global_step, skipped_steps=numbers.skipped, adapter=str(saved), **telemetry.figures(),
        )  # fmt: skip
        profile.write()  # last: whatever goes wrong with it, the result is there
        if world.is_main:
            for line in record.closing_lines():
                say(line)
