"""`load_recipe(["recipe=ddp_qlora", "lora.r=8"])`: from files and overrides to one frozen `Recipe`, or to all of its
faults."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, WithJsonSchema

from distft.config.adapter import REWRITES, absolute, with_adapter
from distft.config.evaluation import Evaluation
from distft.config.files import read_values, related
from distft.config.preference import Preference
from distft.config.schema import Batching, Data, Model, Quantization, Run, Section, StrategyName, Tracking
from distft.config.slurm import Slurm
from distft.config.upstream import UPSTREAMS, Upstream, upstream_section
from distft.config.upstream_rules import UNSUPPORTED, UNSUPPORTED_VALUES
from distft.config.validation import COMMAND_LINE, Source, faults_of, location_of
from distft.config.yaml import dump_yaml
from distft.errors import Fault, RecipeError
from distft.text import count


class Recipe(Section):
    """One fine-tuning run: the single source of truth for what is learned. The number of processes is not part of
    it."""

    run: Run = Run()
    """Which run this is and where its folder goes."""
    strategy: StrategyName
    """How the work is distributed: single, ddp, fsdp (FSDP2), zero2 or zero3 (DeepSpeed)."""
    objective: Literal["sft", "dpo"] = "sft"
    """What is learned: `sft` to write the data's texts; `dpo` to prefer the chosen answer of each pair (direct
    preference optimisation). The reference is the model with its adapter off, or with `adapter`."""
    preference: Preference | None = None
    """The loss over pairs of answers, under the field names of TRL's DPOConfig; only with `objective: dpo`."""
    adapter: Annotated[str, AfterValidator(absolute)] | None = None
    """Train on from a saved adapter: the folder of a run, or of an adapter. What it says about model, quantization and
    lora goes before a shipped recipe. With `objective: dpo`, it is the reference as well."""
    model: Model
    """The base model and its tokenizer."""
    quantization: Quantization | None = None
    """bitsandbytes quantisation of the base; null for none."""
    lora: Annotated[dict[str, Any] | None, WithJsonSchema({})] = None
    """PEFT's LoraConfig; null for full fine-tuning."""
    data: Data
    """The training data and its splits."""
    batching: Batching
    """How many samples make up an optimizer step, and how many a device processes at once."""
    training: Annotated[dict[str, Any], WithJsonSchema({})] = Field(default_factory=dict)
    """TRL's SFTConfig."""
    evaluation: Evaluation = Evaluation()
    """The held-out split before and after training, and the tasks of `distft evaluate`."""
    tracking: Tracking = Tracking()
    """Where metrics go besides metrics.jsonl."""
    slurm: Slurm = Slurm()
    """The job of `distft submit`."""

    _source: Source = PrivateAttr(default_factory=Source)

    @property
    def source(self) -> Source:
        return self._source

    @property
    def prefers(self) -> bool:
        """Whether answers are preferred to others: those of a pair, or with a label."""
        return self.objective == "dpo"

    @property
    def shares_prompts(self) -> bool | Literal["auto"]:
        """Whether a pack has the prompt of a pair once."""
        if not self.pairs or self.scores_prompts or self.batching.micro_batch_tokens is None:
            return False
        return self.batching.share_prompts

    @property
    def pairs(self) -> bool:
        """Whether the samples are pairs of answers."""
        return self.prefers and not self.rates

    @property
    def scores_prompts(self) -> bool:
        """Whether the loss of a pair counts the prompt of the chosen answer, too."""
        return self.pairs and not (self.preference or Preference()).refers

    @property
    def rates(self) -> bool:
        """Whether the samples are single answers that a label calls good or bad."""
        return self.prefers and (self.preference or Preference()).unpaired

    @property
    def bits(self) -> int:
        """Bits per weight of the base in memory: 4, 8, or 16 if not quantised or dequantised at load."""
        return self.quantization.bits if self.quantization else 16

    @property
    def mixed_precision(self) -> Literal["no", "bf16", "fp16"]:
        """Mixed precision of the training. Where the recipe sets neither, TRL uses bf16; distft follows model.dtype."""
        if self.training.get("fp16"):
            return "fp16"
        return "bf16" if self.training.get("bf16", self.model.dtype == "bfloat16") else "no"

    @property
    def updates_16_bits(self) -> bool:
        """Whether, without an adapter, the optimizer adds its updates to weights of 16 bits, which rounds small ones
        away. Under mixed precision the weights that it updates have 32."""
        return self.lora is None and self.model.dtype != "float32" and self.mixed_precision == "no"

    @property
    def micro_batch(self) -> int:
        """What a device processes at once: tokens if samples are packed, otherwise samples. 1 until `auto` has been
        resolved, because 1 divides every global batch."""
        size = self.batching.micro_batch_tokens or self.batching.micro_batch
        return 1 if size == "auto" else size

    @property
    def micro_batch_is_auto(self) -> bool:
        """Whether the micro-batch has yet to be measured."""
        return (self.batching.micro_batch_tokens or self.batching.micro_batch) == "auto"

    def with_micro_batch(self, size: int) -> Recipe:
        """The recipe with a different micro-batch, in its own unit."""
        key = "micro_batch" if self.batching.micro_batch_tokens is None else "micro_batch_tokens"
        return self.model_copy(update={"batching": self.batching.model_copy(update={key: size})})

    def epochs(self, steps: int) -> int:
        """Number of epochs that training begins, with `steps` optimizer steps per epoch."""
        limit: int = self.training.get("max_steps", -1)
        epochs: float = self.training.get("num_train_epochs", 3.0)
        return math.ceil(limit / steps if limit > 0 else epochs)

    def check_division(self, world_size: int) -> None:
        """Check that a global batch of padded samples is the same work for every process.

        Raises:
            RecipeError: it does not divide; the message lists the micro-batches that do.
        """
        size, micro = self.batching.global_batch_size, self.micro_batch
        if size is None or self.batching.micro_batch_tokens is not None or size % (micro * world_size) == 0:
            return
        share = size // world_size
        if size % world_size == 0:
            hint = f"micro-batches that divide: {', '.join(map(str, divisors(share)))}"
        else:
            above = math.ceil(size / world_size) * world_size
            near = " or ".join(map(str, [above] if share == 0 else [share * world_size, above]))
            hint = f"no micro-batch does; change the number of processes, or use a global batch of {near}"
        key = "batching.micro_batch"
        problem = (
            f"a global batch of {size} samples does not divide into micro-batches of {micro} on "
            f"{count(world_size, 'process')}"
        )
        raise RecipeError([Fault(self.source.of(key), key, problem, hint)])

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that runs again as it is."""
        return dump_yaml(self.model_dump())


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def load_recipe(
    arguments: Sequence[str],
    *,
    checks: Iterable[Callable[[Recipe], list[Fault]]] = (),
    folder: Path | None = None,
    planned: Mapping[Path, Recipe] | None = None,
) -> Recipe:
    """Load the recipe that `arguments` (`recipe=NAME key.path=value …`) describe.

    `recipe=` is a path or a name, looked up in `folder`/recipes (`folder` defaults to the working folder), then among
    the shipped recipes; the default is the embedded `tiny`. A recipe file may `extends:` another. Override values are
    YAML. `checks` find faults in the complete recipe, such as values that exclude each other. `adapter` may name the
    folder of a run that is only `planned`.

    Raises:
        RecipeError: all faults at once: unknown keys, wrong types, values out of range, impossible combinations.
    """
    recipe, faults = read_recipe(arguments, checks=checks, folder=folder, planned=planned)
    if faults or recipe is None:
        raise RecipeError(faults)
    return recipe


def read_recipe(
    arguments: Sequence[str],
    *,
    checks: Iterable[Callable[[Recipe], list[Fault]]] = (),
    folder: Path | None = None,
    planned: Mapping[Path, Recipe] | None = None,
) -> tuple[Recipe | None, list[Fault]]:
    """Do what `load_recipe` does, but return the faults, and the recipe without its faulty keys: None if it is too
    broken for that.

    Raises:
        RecipeError: there is no such recipe, or a file cannot be read.
    """
    faults: list[Fault] = []
    values, source = read_values(arguments, folder or Path.cwd(), faults)
    values, source = with_adapter(values, source, planned)
    recipe = _validate(values, source, faults)
    if recipe is not None:
        recipe._source = source
        known = [fault.key for fault in faults]  # a default replaced these values, so it is not the user's fault
        found = [fault for check in (recipe_faults, *checks) for fault in check(recipe)]
        faults += [fault for fault in found if not any(related(fault.key, key) for key in known)]
    return recipe, faults


def recipe_faults(recipe: Recipe) -> list[Fault]:
    """Combinations of values that cannot work under any strategy."""
    found: list[Fault] = []

    def fault(key: str, problem: str, hint: str = "") -> None:
        found.append(Fault(recipe.source.of(key), key, problem, hint))

    _check_precision(recipe, fault)
    _check_batching(recipe, fault)
    _check_objective(recipe, fault)
    if not any(getattr(recipe.data, key) is not None for key in ("sources", "path", "files")) and not recipe.data.name:
        fault("data.name", "is required", "or list several in data.sources")
    if recipe.training.get("eval_strategy", "no") != "no" and recipe.data.validation_fraction == 0:
        fault("training.eval_strategy", "there is no validation split to evaluate on", "set data.validation_fraction")
    if recipe.training.get("max_steps") == 0:
        fault("training.max_steps", "0 steps train nothing", "-1 for as many as training.num_train_epochs takes")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", recipe.run.name):
        fault(
            "run.name",
            f"{recipe.run.name!r} is not a plain folder name",
            "use letters, digits, '.', '_' and '-'; parent folders go into run.dir",
        )
    return found


def _check_precision(recipe: Recipe, fault: Callable[..., None]) -> None:
    quantization = recipe.quantization
    if quantization and quantization.load_in_4bit and quantization.load_in_8bit:
        fault("quantization", "load_in_4bit and load_in_8bit exclude each other")
    if quantization and quantization.dequantize_at_load and not quantization.load_in_4bit:
        fault(
            "quantization.dequantize_at_load",
            "there are no 4-bit weights to dequantise",
            "set quantization.load_in_4bit",
        )
    if quantization and quantization.is_quantized and recipe.lora is None:
        bits = 4 if quantization.load_in_4bit else 8
        hint = "add a lora section, or quantization=null"
        fault("lora", f"{bits}-bit weights cannot be trained without an adapter", hint)
    if recipe.training.get("bf16") and recipe.training.get("fp16"):
        fault("training.fp16", "bf16 and fp16 exclude each other")


def _check_batching(recipe: Recipe, fault: Callable[..., None]) -> None:
    batching = recipe.batching
    key = "batching.global_batch_size"
    if batching.global_batch_size is not None and batching.global_batch_tokens is not None:
        fault(key, "set either global_batch_size or global_batch_tokens, not both", "set the other to null")
    if batching.global_batch_size is None and batching.global_batch_tokens is None:
        fault(key, "set either global_batch_size or global_batch_tokens; neither is set")
    if recipe.model.attn_implementation == "varlen" and batching.micro_batch_tokens is None:
        hint = "set batching.micro_batch_tokens, or use sdpa or auto"
        fault("model.attn_implementation", "varlen needs packed samples, and these micro-batches are padded", hint)
    keys = ("micro_batch", "micro_batch_tokens")
    if batching.micro_batch_tokens is not None and [
        recipe.source.of(f"batching.{key}") == COMMAND_LINE for key in keys
    ] == [True, False]:
        hint = "batching.micro_batch_tokens=null turns packing off"
        fault("batching.micro_batch", "has no effect: batching.micro_batch_tokens packs the samples", hint)


def _check_objective(recipe: Recipe, fault: Callable[..., None]) -> None:
    """What does not go with pairs of answers, or only with them."""
    if not recipe.prefers:
        if recipe.preference is not None:
            fault("preference", "is the loss over pairs of answers", "set objective=dpo, or preference=null")
        return
    for name, *texts in (recipe.preference or Preference()).problems():
        fault(f"preference.{name}", *texts)
    preference = recipe.preference or Preference()
    if recipe.lora is None and preference.refers and (preference.unpaired or not preference.precompute_ref_log_probs):
        problem = "without an adapter, the reference is gone after the first step"
        if preference.unpaired:
            fault("lora", problem, "add a lora section")
        else:
            fault("preference.precompute_ref_log_probs", problem, "set it to true, or add a lora section")
    init = str((recipe.lora or {}).get("init_lora_weights", True)).lower()
    if init.startswith(REWRITES) and recipe.adapter is None and preference.refers:
        problem = f"{init} changes the weights of the base, which is the reference of objective=dpo"
        fault("lora.init_lora_weights", problem, "set it to true")
    if (recipe.lora or {}).get("bias", "none") != "none" and preference.refers:
        problem = "trains biases of the base, which is the reference of objective=dpo"
        fault("lora.bias", problem, "set it to none")
    if recipe.training.get("completion_only_loss") is not None:
        hint = "leave it out: of a pair, the answers count and the prompt does not"
        fault("training.completion_only_loss", "is for objective=sft", hint)
    for key in (key for key in ("loss_type", "label_smoothing_factor") if recipe.training.get(key)):
        name = "loss_type" if key == "loss_type" else "label_smoothing"
        fault(f"training.{key}", "is for objective=sft", f"set preference.{name}")
    if recipe.training.get("neftune_noise_alpha"):
        fault("training.neftune_noise_alpha", "would add noise to the reference as well", "leave it out")
    if recipe.data.train_on != "assistant":
        hint = "leave it out: of a pair, the answers count"
        fault("data.train_on", "is for objective=sft", hint)
    if recipe.batching.share_prompts is True and (recipe.rates or recipe.scores_prompts):
        loss = preference.names[0]
        why = "learns from prompts as well" if recipe.scores_prompts else "has one answer for each prompt"
        fault("batching.share_prompts", f"preference.loss_type={loss} {why}", "set it to auto")
    if recipe.rates and "kto" in preference.names and recipe.batching.global_batch_size == 1:
        problem = "kto compares each answer with those to other prompts of the global batch, which has one sample"
        fault("batching.global_batch_size", problem, "set it to at least 2")
    if recipe.data.streaming:
        fault("data.streaming", "reads single answers, not pairs", "set data.streaming=false")
    if recipe.data.order == "loss":
        fault("data.order", "loss scores single answers, not pairs", "set shuffled, length or a column of numbers")


def _validate(values: dict[str, Any], source: Source, faults: list[Fault]) -> Recipe | None:
    """The recipe with its faulty keys left out, so that combinations of the others can still be checked; None if it is
    too broken for that."""
    tree = dict(values)
    for name in UPSTREAMS:
        if isinstance(tree.get(name), dict):
            tree[name] = _supported(name, tree[name], source, faults)
            try:
                upstream_section(name).model_validate(tree[name])
            except ValidationError as error:
                # null resets a key to upstream's default, even one that upstream does not allow to be null
                faults += [
                    fault for fault in faults_of(error, source, name) if not fault.problem.endswith(", got null")
                ]
                for item in error.errors():
                    tree[name].pop(str(item["loc"][0]), None)
    for attempt in range(2):
        try:
            return Recipe.model_validate(tree)
        except ValidationError as error:
            if attempt == 0:  # keys that are missing in the second attempt were dropped after the first
                faults += faults_of(error, source)
            for item in error.errors():
                _drop(tree, location_of(item))
    return None


def _supported(section: Upstream, values: dict[str, Any], source: Source, faults: list[Fault]) -> dict[str, Any]:
    """`values` without those that distft cannot carry out, each of which becomes a fault."""
    kept = {}
    for key, value in values.items():
        refused = UNSUPPORTED_VALUES[section].get(key, {})
        where = f"{section}.{key}"
        if isinstance(value, str) and value in refused:
            faults.append(Fault(source.of(where), where, f"{value} is not supported", refused[value]))
        elif key in UNSUPPORTED[section] and value:  # null, false and {} switch it off
            faults.append(Fault(source.of(where), where, "is not supported", UNSUPPORTED[section][key]))
        else:
            kept[key] = value
    return kept


def _drop(tree: Any, location: Sequence[Any]) -> None:
    for key in location[:-1]:
        tree = tree.get(key) if isinstance(tree, dict) else None
    if isinstance(tree, dict) and location:
        tree.pop(location[-1], None)
