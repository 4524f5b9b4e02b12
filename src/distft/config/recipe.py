"""Recipes: from what files and overrides say to one frozen `Recipe`, or to all the faults at once.

load_recipe(["recipe=ddp_qlora", "lora.r=8", "training.max_steps=50"])
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, WithJsonSchema

from distft.config.evaluation import Evaluation
from distft.config.files import read_values, related
from distft.config.schema import (
    Batching,
    Data,
    Model,
    Quantization,
    Run,
    Slurm,
    StrategyName,
    Tracking,
)  # fmt: skip
from distft.config.section import Section
from distft.config.upstream import UPSTREAMS, section_for, upstream_section
from distft.config.validation import COMMAND_LINE, Source, faults_of, place_of
from distft.config.yaml import dump_yaml
from distft.errors import Fault, RecipeError
from distft.text import count


class Recipe(Section):
    """One fine-tuning run. The one source of truth for what is learned; it says nothing of how many processes there are."""

    run: Run = Run()
    """Which run this is and where its folder goes."""
    strategy: StrategyName
    """How the work is spread: single, ddp, fsdp (FSDP2), zero2 or zero3 (DeepSpeed)."""
    model: Model
    """The base model and its tokenizer."""
    quantization: Quantization | None = None
    """bitsandbytes quantisation of the base; null for none."""
    lora: Annotated[dict[str, Any] | None, WithJsonSchema({})] = None
    """PEFT's LoraConfig; null for full fine-tuning."""
    data: Data
    """What to train on, and how it is split."""
    batching: Batching
    """How many samples make an optimizer step, and how many fit on a device at once."""
    training: Annotated[dict[str, Any], WithJsonSchema({})] = Field(default_factory=dict)
    """TRL's SFTConfig."""
    evaluation: Evaluation = Evaluation()
    """The held-out split before and after training, and the tasks of `distft evaluate`."""
    tracking: Tracking = Tracking()
    """Where figures go besides metrics.jsonl."""
    slurm: Slurm = Slurm()
    """The job of `distft submit`."""

    _source: Source = PrivateAttr(default_factory=Source)

    @property
    def source(self) -> Source:
        return self._source

    @property
    def bits(self) -> int:
        """Bits that a weight of the base takes in memory: 4, 8 or 16 (not quantised, or unpacked at load)."""
        return self.quantization.bits if self.quantization else 16

    @property
    def mixed_precision(self) -> Literal["no", "bf16", "fp16"]:
        """Of the training. TRL trains in bf16 where nothing is said; here the model's own type decides."""
        if self.training.get("fp16"):
            return "fp16"
        return "bf16" if self.training.get("bf16", self.model.dtype == "bfloat16") else "no"

    @property
    def micro_batch(self) -> int:
        """What a device takes at once: tokens where samples are packed, else samples; 1 while `auto` has not been settled, which
        goes with every global batch."""
        size = self.batching.micro_batch_tokens or self.batching.micro_batch
        return 1 if size == "auto" else size

    @property
    def micro_batch_is_auto(self) -> bool:
        """Whether the micro-batch is still to be found."""
        return (self.batching.micro_batch_tokens or self.batching.micro_batch) == "auto"

    def with_micro_batch(self, size: int) -> Recipe:
        """The recipe with another `micro_batch`."""
        key = "micro_batch" if self.batching.micro_batch_tokens is None else "micro_batch_tokens"
        return self.model_copy(update={"batching": self.batching.model_copy(update={key: size})})

    def epochs(self, steps: int) -> int:
        """Epochs, the last perhaps cut short, that training takes where an epoch has `steps` steps."""
        limit: int = self.training.get("max_steps", -1)
        epochs: float = self.training.get("num_train_epochs", 3.0)
        return math.ceil(limit / steps if limit > 0 else epochs)

    def check_division(self, world_size: int) -> None:
        """A global batch of padded samples is the same work for every process.

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
            near = [above] if share == 0 else [share * world_size, above]
            hint = f"no micro-batch does; take another number of processes, or a global batch of {' or '.join(map(str, near))}"
        raise RecipeError([Fault(
            self.source.of("batching.micro_batch"), "batching.micro_batch",
            f"a global batch of {size} samples does not divide into micro-batches of {micro} on "
            f"{count(world_size, 'process')}", hint,
        )])  # fmt: skip

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that runs again as it is."""
        return dump_yaml(self.model_dump())


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def load_recipe(
    arguments: Sequence[str], *, checks: Iterable[Callable[[Recipe], list[Fault]]] = (), folder: Path | None = None
) -> Recipe:
    """The recipe that `arguments` (`recipe=NAME key.path=value …`) ask for.

    `recipe=` is a name (searched in `folder`/recipes, the working folder where it is None, then among the shipped ones)
    or a path; without it the embedded `tiny`. A file may `extends:` one other. Values are read as YAML. `checks` find
    faults in a whole recipe, impossible pairs say.

    Raises:
        RecipeError: all faults at once: unknown keys, wrong types, values out of range, impossible pairs.
    """
    faults: list[Fault] = []
    values, source = read_values(arguments, folder or Path.cwd(), faults)
    recipe = _validate(values, source, faults)
    if recipe is not None:
        recipe._source = source
        known = [fault.key for fault in faults]  # what stands in place of a faulty value is no fault of the user's
        found = [fault for check in (recipe_faults, *checks) for fault in check(recipe)]
        faults += [fault for fault in found if not any(related(fault.key, key) for key in known)]
    if faults or recipe is None:
        raise RecipeError(faults)
    return recipe


def recipe_faults(recipe: Recipe) -> list[Fault]:
    """Pairs of values that no strategy could make work."""
    found: list[Fault] = []

    def fault(key: str, problem: str, hint: str = "") -> None:
        found.append(Fault(recipe.source.of(key), key, problem, hint))

    quantization, training = recipe.quantization, recipe.training
    if quantization and quantization.load_in_4bit and quantization.load_in_8bit:
        fault("quantization", "load_in_4bit and load_in_8bit exclude each other")
    if quantization and quantization.dequantize_at_load and not quantization.load_in_4bit:
        fault(
            "quantization.dequantize_at_load", "there are no 4-bit weights to unpack", "set quantization.load_in_4bit"
        )
    if quantization and quantization.is_quantized and recipe.lora is None:
        fault(
            "lora",
            f"{4 if quantization.load_in_4bit else 8}-bit weights cannot be trained without an adapter",
            "add a lora section, or quantization=null",
        )
    if training.get("bf16") and training.get("fp16"):
        fault("training.fp16", "bf16 and fp16 exclude each other")
    if training.get("eval_strategy", "no") != "no" and recipe.data.validation_fraction == 0:
        fault("training.eval_strategy", "there is no validation split to evaluate on", "set data.validation_fraction")
    sizes = recipe.batching.global_batch_size, recipe.batching.global_batch_tokens
    if (sizes[0] is None) == (sizes[1] is None):
        fault("batching.global_batch_size", "give global_batch_size or global_batch_tokens, " + ("not both" if sizes[0] else "one of them"),
              "set the other to null" if sizes[0] else "")  # fmt: skip
    if recipe.model.attn_implementation == "varlen" and recipe.batching.micro_batch_tokens is None:
        fault("model.attn_implementation", "varlen takes packs, and these micro-batches are padded",
              "set batching.micro_batch_tokens, or take sdpa or auto")  # fmt: skip
    asked = [recipe.source.of(f"batching.{key}") == COMMAND_LINE for key in ("micro_batch", "micro_batch_tokens")]
    if asked == [True, False] and recipe.batching.micro_batch_tokens is not None:
        fault("batching.micro_batch", "samples are packed by batching.micro_batch_tokens, and padded by micro_batch",
              "batching.micro_batch_tokens=null pads them")  # fmt: skip
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", recipe.run.name):
        fault(
            "run.name",
            f"{recipe.run.name!r} is not a plain folder name",
            "letters, digits, '.', '_' and '-'; folders go into run.dir",
        )
    return found


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for an editor's YAML server; every field with its docstring."""
    document = Recipe.model_json_schema()
    document["title"] = "distft recipe"
    document["required"] = []  # `extends` may supply any of them
    document["properties"]["extends"] = {
        "type": "string",
        "description": "One other recipe, by name or path, that this one changes.",
    }
    for name in UPSTREAMS:
        section = upstream_section(name).model_json_schema()
        document["$defs"] |= section.pop("$defs", {})
        help_text = document["properties"][name].get("description", "")
        variants: list[dict[str, Any]] = [section] if name == "training" else [section, {"type": "null"}]
        document["properties"][name] = {"description": help_text, "anyOf": variants}
    for definition in document["$defs"].values():
        definition.pop("required", None)
    _sort_alternatives(document)
    return document


def _sort_alternatives(node: Any) -> None:
    """Put every `anyOf` in one order: typing keeps one of two equal unions, and which one depends on what was imported."""
    if isinstance(node, dict):
        for value in node.values():
            _sort_alternatives(value)
        if "anyOf" in node:
            node["anyOf"].sort(key=lambda option: json.dumps(option, sort_keys=True))
    elif isinstance(node, list):
        for value in node:
            _sort_alternatives(value)


def _validate(values: dict[str, Any], source: Source, faults: list[Fault]) -> Recipe | None:
    """The recipe without its faulty keys, so that the pairs among the others can be checked as well; or None."""
    tree = dict(values)
    for name in UPSTREAMS:
        if isinstance(tree.get(name), dict):
            try:
                section_for(name, tree[name]).model_validate(tree[name])
            except ValidationError as error:
                # null takes back a key that upstream does not let be null
                faults += [
                    fault for fault in faults_of(error, source, name) if not fault.problem.endswith(", got null")
                ]
                for item in error.errors():
                    tree[name].pop(str(item["loc"][0]), None)
    for attempt in range(2):
        try:
            return Recipe.model_validate(tree)
        except ValidationError as error:
            if attempt == 0:  # the second time, what is missing is what was dropped
                faults += faults_of(error, source)
            for item in error.errors():
                _drop(tree, place_of(item))
    return None


def _drop(tree: Any, location: Sequence[Any]) -> None:
    for key in location[:-1]:
        tree = tree.get(key) if isinstance(tree, dict) else None
    if isinstance(tree, dict) and location:
        tree.pop(location[-1], None)
