"""Recipes: from a YAML file and overrides to one frozen `Recipe`, or to all the faults at once.

load_recipe(["recipe=ddp_qlora", "lora.r=8", "training.max_steps=50"])
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, WithJsonSchema

from distft.errors import Fault, RecipeError
from distft.evaluation.settings import Evaluation
from distft.origin import COMMAND_LINE, DERIVED, Source, faults_of, nearest, place_of
from distft.packaged import packaged
from distft.section import Section
from distft.sections import (
    Batching,
    Data,
    Model,
    Quantization,
    Run,
    Slurm,
    StrategyName,
    Tracking,
    upstream_section,
)  # fmt: skip
from distft.yaml12 import dump_yaml, parse_yaml

DEFAULT_RECIPE = "tiny"
_SHORT = "evaluation.judge"  # where a name alone says which model it is


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
            f"a global batch of {size} samples does not divide into micro-batches of {micro} on {world_size} "
            f"process{'es' if world_size > 1 else ''}", hint,
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
    overrides, wanted = _read_overrides(arguments, faults)
    name, files, merged, origins = _read_files(wanted, folder or Path.cwd(), faults)
    if not files:
        raise RecipeError(faults)
    for key, value in overrides:
        _assign(merged, key.split("."), value)
        origins = {k: v for k, v in origins.items() if not related(k, key)} | {key: COMMAND_LINE}
    run = merged.setdefault("run", {})
    if isinstance(run, dict) and not run.get("name"):
        run["name"], origins["run.name"] = name, DERIVED
    source = Source(name, files, origins)
    recipe = _validate(merged, source, faults)
    if recipe is not None:
        recipe._source = source
        known = [fault.key for fault in faults]  # what stands in place of a faulty value is no fault of the user's
        found = [fault for check in (recipe_faults, *checks) for fault in check(recipe)]
        faults += [fault for fault in found if not any(related(fault.key, key) for key in known)]
    if faults or recipe is None:
        raise RecipeError(faults)
    return recipe


def related(key: str, other: str) -> bool:
    """Whether one of two dotted keys is the other, or stands above it."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


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


def recipe_folders(folder: Path) -> list[Path]:
    return [path for path in (folder / "recipes", packaged("recipes")) if path.is_dir()]


def list_recipes(folder: Path) -> dict[str, Path]:
    """Every recipe by name; one in `folder`/recipes hides a shipped one."""
    found: dict[str, Path] = {}
    for place in recipe_folders(folder):
        for path in sorted(place.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        RecipeError: unreadable, not YAML, or not a mapping.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([Fault(str(path), "", f"cannot be read: {error}")]) from error
    except ValueError as error:
        raise RecipeError([Fault(str(path), "", f"is not valid YAML: {error}")]) from error
    if not isinstance(content, dict):
        raise RecipeError([Fault(str(path), "", "expected a mapping of sections, got " + type(content).__name__)])
    return content


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for an editor's YAML server; every field with its docstring."""
    document = Recipe.model_json_schema()
    document["title"] = "distft recipe"
    document["required"] = []  # `extends` may supply any of them
    document["properties"]["extends"] = {
        "type": "string",
        "description": "One other recipe, by name or path, that this one changes.",
    }
    for name in ("lora", "training"):
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


def _read_overrides(arguments: Sequence[str], faults: list[Fault]) -> tuple[list[tuple[str, Any]], str]:
    overrides: list[tuple[str, Any]] = []
    wanted = DEFAULT_RECIPE
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            faults.append(Fault(COMMAND_LINE, argument, "expected key.path=value", "recipe=ddp_qlora lora.r=8, say"))
        elif key == "recipe":
            wanted = text
        else:
            try:
                value = parse_yaml(text)
                short = key == _SHORT and isinstance(value, str)
                overrides.append((f"{key}.model" if short else key, value))
            except ValueError as error:
                faults.append(Fault(COMMAND_LINE, key, f"{text!r} is not valid YAML: {error}"))
    return overrides, wanted


def _read_files(
    wanted: str, folder: Path, faults: list[Fault]
) -> tuple[str, tuple[Path, ...], dict[str, Any], dict[str, str]]:
    """The recipe `wanted` merged over what it extends, and the file that each leaf key came from."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    path = _find(wanted, folder, folder, faults)
    while path is not None:
        if len(chain) == 2:
            faults.append(Fault(str(chain[-1][0]), "extends", "a recipe extends one other, and that one none"))
            break
        content = _spelt_out(read_yaml(path))
        chain.append((path, content))
        base = content.pop("extends", None)
        if base is None:
            break
        path = _find(str(base), folder, path.parent, faults, where=str(path))
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path, content in reversed(chain):
        merged = _merge(merged, content)
        for key in _leaves(content):
            origins = {k: v for k, v in origins.items() if not related(k, key)} | {key: str(path)}
    name = chain[0][0].stem if chain else wanted
    return name, tuple(path for path, _ in reversed(chain)), merged, origins


def _find(wanted: str, folder: Path, beside: Path, faults: list[Fault], where: str = COMMAND_LINE) -> Path | None:
    """Path of the recipe that `wanted` names; None and a fault where there is none."""
    key = "recipe" if where == COMMAND_LINE else "extends"
    if "/" in wanted or wanted.endswith((".yaml", ".yml")):
        path = beside / Path(wanted).expanduser()
        if path.is_file():
            return path
        faults.append(Fault(where, key, f"there is no file {wanted}"))
        return None
    known = list_recipes(folder)
    if key == "extends" and known.get(wanted) == Path(where):  # of two recipes of one name, the shipped one
        known = list_recipes(packaged("recipes").parent)
    if wanted in known:
        return known[wanted]
    faults.append(
        Fault(where, key, f"there is no recipe {wanted!r}", nearest(wanted, known) or f"there are: {', '.join(known)}")
    )
    return None


def _spelt_out(content: dict[str, Any]) -> dict[str, Any]:
    """A file's `evaluation.judge: NAME` as its model, so that what stands beside it is kept where recipes or overrides are merged."""
    section = content.get("evaluation")
    if isinstance(section, dict) and isinstance(section.get("judge"), str):
        return {**content, "evaluation": {**section, "judge": {"model": section["judge"]}}}
    return content


def _merge(base: Any, change: Any) -> Any:
    if isinstance(base, dict) and isinstance(change, dict):
        return {key: _merge(base.get(key), change[key]) if key in change else base[key] for key in {**base, **change}}
    return change


def _assign(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[path[-1]] = value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _validate(merged: dict[str, Any], source: Source, faults: list[Fault]) -> Recipe | None:
    """The recipe without its faulty keys, so that the pairs among the others can be checked as well; or None."""
    tree = _merge({}, merged)
    for name in ("lora", "training"):
        if isinstance(tree.get(name), dict):
            try:
                upstream_section(name).model_validate(tree[name])
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
