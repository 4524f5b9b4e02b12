"""Compare the speed of today's architectures with that of Llama shapes that do the same arithmetic per token.

    python benchmarks/architectures.py --repeats 3 --output benchmarks/results/architectures_h200.json
    python benchmarks/architectures.py --tiny --shapes qwen3_8b --repeats 1 --output result.json   # no GPU

Each shape has a few layers of the real width, random weights, a 4-bit base, packs, and the adapters of its recipe: on
all linears, and of mixtures of experts on those of attention. Its twin is a Llama of the same width, depth and
vocabulary, with the same attention projections, adapters on all linears, and MLPs of as many parameters as are active
in the shape. All train on the same samples, in one process, with the trainer of a run: interleaved as A A' B B' … A A'.
Then each is profiled. Utilisation (MFU) counts the active parameters and attention.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import synthetic
import torch
from architecture_shapes import SHAPES, Shape, shape_of
from datasets import Dataset
from provenance import provenance
from transformers import AutoConfig, TrainerCallback

from distft import upstream_api
from distft.config.recipe import Recipe, load_recipe
from distft.data.batch_plan import Plan
from distft.data.prepare import Splits
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import Strategy
from distft.files import to_json, write_atomically
from distft.hardware import GIB, device_flops
from distft.models import loading
from distft.models.activation_checkpointing import set_up_checkpointing
from distft.runs.folder import RunFolder
from distft.training.arguments import training_arguments
from distft.training.micro_batches import settle
from distft.training.profiler import Activity, longest, shares
from distft.training.setup import setup_strategy
from distft.training.trainer import Trainer, build_trainer

TOKENS = 13_312
"""Tokens of a step, in one pack. A step ends with a whole sample, hence the larger budget of a pack."""
BUDGET = 14_336
PROFILED = 2


@dataclass(frozen=True)
class Samples:
    """What all shapes train on."""

    dataset: Dataset
    lengths: Any
    divisor: int

    @classmethod
    def of(cls, count: int, vocabulary: int, divisor: int) -> Samples:
        generator = np.random.default_rng(0)
        lengths = synthetic.sample_lengths(synthetic.Shape("", {}, divisor), count, generator)
        tokens = [generator.integers(3, vocabulary, length).tolist() for length in lengths]
        return cls(Dataset.from_dict({"input_ids": tokens, "labels": tokens}), lengths, divisor)


class Clock(TrainerCallback):  # type: ignore[misc]
    """Times the steps after the warm-up, or profiles some of them."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.seconds, self.profiler, self.events = warmup, 0.0, None, []  # type: ignore[var-annotated]
        self.profiles = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step != self.warmup:
            return
        if self.profiles:
            kind = torch.profiler.ProfilerActivity
            self.profiler = torch.profiler.profile(activities=[kind.CUDA if torch.cuda.is_available() else kind.CPU])
            self.profiler.start()
        self._began = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            self.seconds = _now() - self._began
            if self.profiler is not None:
                self.profiler.stop()
                self.events = list(upstream_api.profiler_events(self.profiler))
                self.profiler = None


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Case:
    """A shape or its twin, ready to train. `work`: samples, tokens and FLOPs of the measured steps."""

    shape: Shape
    trainer: Trainer
    clock: Clock
    facts: dict[str, Any]
    work: tuple[int, int, float]

    def seconds(self, *, profile: bool = False) -> float:
        """The time of the measured steps of one training, from its start."""
        arguments = self.trainer.args
        before = arguments.max_steps
        self.clock.profiles, arguments.max_steps = profile, self.clock.warmup + PROFILED if profile else before
        self.trainer.train()
        arguments.max_steps = before
        return self.clock.seconds

    def profile(self) -> dict[str, Any]:
        """Where the time of a step goes on the device, in seconds and in shares of the longest operations."""
        seconds = self.seconds(profile=True)
        events = [event for event in self.clock.events if not event.is_user_annotation()]
        kind = "CUDA" if torch.cuda.is_available() else "CPU"
        begin = min((event.start_ns() for event in events), default=0)
        found = [
            Activity(event.name(), (event.start_ns() - begin) / 1e9, (event.end_ns() - begin) / 1e9)
            for event in events
            if event.device_type().name == kind
        ]
        split = {key: value / PROFILED for key, value in shares(found, seconds).items()}
        names = [{**each, "name": each["name"][:100]} for each in longest(found, seconds)[:10]]
        return {"step_time_s": seconds / PROFILED, **split, "longest": names}


def recipe_of(shape: Shape, folder: Path, samples: Samples, steps: int, overrides: list[str]) -> Recipe:
    on_gpu = torch.cuda.is_available()
    return load_recipe(
        [
            f"recipe={shape.recipe}",
            "strategy=single",
            f"model.name={folder}",
            f"model.dtype={'bfloat16' if on_gpu else 'float32'}",
            "quantization.load_in_4bit=true",
            "quantization.bnb_4bit_quant_type=nf4",
            "quantization.bnb_4bit_use_double_quant=true",
            f"quantization.bnb_4bit_compute_dtype={'bfloat16' if on_gpu else 'float32'}",
            "lora.exclude_modules=null",  # gemma3_4b leaves out a vision tower, which its text model has not
            f"batching.global_batch_tokens={TOKENS // samples.divisor}",
            "batching.global_batch_size=null",
            f"batching.micro_batch_tokens={BUDGET // samples.divisor}",
            f"training.bf16={str(on_gpu).lower()}",
            "training.gradient_checkpointing=false",
            "training.warmup_steps=0",
            f"training.max_steps={steps}",
            *(f"training.{name}=no" for name in ("logging_strategy", "eval_strategy", "save_strategy")),
            "tracking.report_to=[]",
            *overrides,
        ]
    )


def load(shape: Shape, recipe: Recipe, strategy: Strategy) -> Any:
    """The model of random weights as a run loads it, but from memory instead of a disk."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        config = shape.config
        kind = loading.AutoModelForCausalLM._model_mapping[type(config)]
        state = kind._from_config(config, dtype=getattr(torch, recipe.model.dtype)).state_dict()
    from_disk = loading.from_pretrained

    def from_memory(cls: Any, name: str, what: str, **options: Any) -> Any:
        if cls is AutoConfig:
            return config
        return kind.from_pretrained(None, config=config, state_dict=state, **options)

    loading.from_pretrained = from_memory
    try:
        return loading.load_model(recipe, strategy)
    finally:
        loading.from_pretrained = from_disk
        state.clear()


def prepare(shape: Shape, samples: Samples, work: Path, options: argparse.Namespace) -> Case:
    """Load a shape and build its trainer."""
    start = time.perf_counter()
    folder, steps = work / shape.name, options.warmup + options.steps
    shape.config.save_pretrained(folder)
    recipe = recipe_of(shape, folder, samples, steps, options.set)
    strategy = setup_strategy(recipe, Launcher())
    tokenizer = synthetic.small_tokenizer()
    plan = Plan(samples.lengths, recipe.batching, recipe.run.seed)
    model = load(shape, recipe, strategy)
    settled = settle(model, recipe, strategy, tokenizer, samples.lengths)
    recipe, plan = settled.recipe, plan.divided(settled.recipe.batching)
    set_up_checkpointing(model, recipe, strategy, plan.heaviest_tokens)
    place = RunFolder(work / f"run-{shape.name}")
    arguments = training_arguments(recipe, strategy, place, plan.accumulation(1, recipe.epochs(plan.steps)))
    clock = Clock(options.warmup)
    trainer = build_trainer(
        recipe,
        strategy,
        model,
        arguments,
        plan,
        tokenizer,
        Splits(recipe, samples.dataset, None, None, cast(Any, None)),
        callbacks=[clock],
        changed=lambda line: None,
    )
    measured = [samples.lengths[plan.samples(step)] for step in range(options.warmup, steps)]
    tokens, flops = int(sum(map(sum, measured))), sum(map(shape.flops, measured))
    facts = {
        "attention": settled.facts["attn_implementation"],
        "packed": recipe.batching.micro_batch_tokens is not None,
    }
    facts |= {name: settled.facts[name] for name in ("fused_linears", "adapted_linears", "isolation_check_s")}
    facts |= {"changed_for_you": settled.notes, "load_s": round(time.perf_counter() - start, 1)}
    return Case(shape, trainer, clock, facts, (sum(map(len, measured)), tokens, flops))


def summary_of(case: Case, seconds: list[float], device: float | None) -> dict[str, Any]:
    """The rates of one case, with their spread over the repeats."""
    samples, tokens, flops = case.work

    def spread(of: Callable[[float], float]) -> dict[str, float]:
        found = sorted(map(of, seconds))
        return {"median": statistics.median(found), "least": found[0], "greatest": found[-1]}

    return {
        **case.shape.facts,
        **case.facts,
        "samples_per_second": spread(lambda each: samples / each),
        "tokens_per_second": spread(lambda each: tokens / each),
        "mfu": None if device is None else spread(lambda each: flops / each / device),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3, help="optimizer steps before the measurement")
    parser.add_argument("--steps", type=int, default=6, help="measured optimizer steps of a repeat")
    parser.add_argument("--without-twins", action="store_true", help="only profile and time the shapes themselves")
    parser.add_argument(
        "--tiny", action="store_true", help="narrow shapes and short samples, for a machine without GPU"
    )
    parser.add_argument("--commit", default="", help="commit that is measured, if git is not available")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides for every shape")
    parser.add_argument("--output", type=Path, required=True, help="a .json file, rewritten after every repeat")
    options = parser.parse_args()
    samples = Samples.of(100 * (options.warmup + options.steps), 500, 16 if options.tiny else 1)
    cases: dict[str, Case] = {}
    record: dict[str, Any] = {
        **provenance(__file__, options.commit),
        "device_flops": device_flops(),
        "warmup_steps": options.warmup,
        "steps": options.steps,
        "tokens_of_a_step": TOKENS // samples.divisor,
        "failed": {},
        "summary": {},
        "ratios": {},
    }
    with tempfile.TemporaryDirectory() as work:
        for name in options.shapes:
            shape = shape_of(name, tiny=options.tiny)
            for each in [shape] if options.without_twins else [shape, shape.twin]:
                try:
                    cases[each.name] = prepare(each, samples, Path(work), options)
                    print(each.name, cases[each.name].facts, flush=True)
                except Exception as error:  # the others are measured all the same
                    record["failed"][each.name] = f"{type(error).__name__}: {error}"
                    print(each.name, record["failed"][each.name], flush=True)
        gc.collect()
        gc.freeze()
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(options.repeats):
            for name, case in cases.items():
                seconds[name].append(case.seconds())
            finish(record, cases, seconds, options.output)
        for name, case in sorted(cases.items(), key=lambda each: each[1].shape.is_twin):  # in case time runs out
            profile = record["summary"][name]["profile"] = case.profile()
            write_atomically(options.output, to_json(record) + "\n")
            parts = {
                part: f"{profile[f'{part}_s'] / profile['step_time_s']:.0%}" for part in ("products", "compute", "idle")
            }
            print(f"{name}: {profile['step_time_s']:.3f} s a step, {parts}", flush=True)
    if torch.cuda.is_available():
        print(f"peak memory {torch.cuda.max_memory_allocated() / GIB:.1f} GiB")
    return 1 if record["failed"] else 0


def finish(record: dict[str, Any], cases: dict[str, Case], seconds: dict[str, list[float]], output: Path) -> None:
    """Summarise what was measured so far, print it and write it."""
    device = record["device_flops"]
    record["repeats"] = {name: list(times) for name, times in seconds.items()}
    record["summary"] = {name: summary_of(case, seconds[name], device) for name, case in cases.items()}
    twins = {name: case.shape.twin.name for name, case in cases.items() if not case.shape.is_twin}
    pairs = {name: (name, twin) for name, twin in twins.items() if twin in cases}
    record["ratios"] = {}
    for name, (one, other) in pairs.items():
        flops = [case.work[2] for case in (cases[one], cases[other])]
        ratios = sorted(
            flops[0] / ours / (flops[1] / theirs) for ours, theirs in zip(seconds[one], seconds[other], strict=True)
        )
        record["ratios"][name] = {"of_mfu": statistics.median(ratios), "least": ratios[0], "greatest": ratios[-1]}
    write_atomically(output, to_json(record) + "\n")
    for name, figures in record["summary"].items():
        mfu = figures["mfu"] and f"{figures['mfu']['median']:.3f}"
        ratio = record["ratios"].get(name, {}).get("of_mfu")
        print(f"{name}: {figures['tokens_per_second']['median']:,.0f} tokens/s, MFU {mfu}, ratio {ratio}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
