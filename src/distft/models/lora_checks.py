"""What is wrong with a recipe's `lora` section for the model at hand, found on modules without weights.

PEFT ignores a name that matches nothing, as long as another name matches something: the misspelt part would not be
trained, and nobody would know.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from distft.config.recipe import Recipe
from distft.config.validation import nearest
from distft.distributed.strategies.selection import STRATEGIES
from distft.errors import Fault
from distft.models.embeddings import ends_with
from distft.models.skeleton import Skeleton
from distft.models.start import start_faults
from distft.models.targets import unsuitable, without_unsuitable
from distft.text import shorten

_INDEX = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")
"""Where PEFT finds the number of a layer in the name of a module."""


def lora_faults(recipe: Recipe, skeleton: Skeleton) -> list[Fault]:
    """Names and numbers in `recipe.lora` that match nothing, and what PEFT or the trainer would refuse.

    Puts the adapter on `skeleton.model`.
    """
    if recipe.lora is None:
        return []
    found = list(_Names(recipe, skeleton).faults())
    if found:
        return found  # PEFT would trip over the same, with less to say
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lora = without_unsuitable(recipe.lora, skeleton.model)
            config = LoraConfig(task_type="CAUSAL_LM", **{**lora, "init_lora_weights": True})
            model = get_peft_model(skeleton.model, config, low_cpu_mem_usage=True)
    except Exception as error:  # whatever its many checks raise
        return [_refused_by_peft(recipe, skeleton, error)]
    return [*_adapted_faults(recipe, model), *start_faults(recipe, model)]


def _fault(recipe: Recipe, key: str, problem: str, hint: str = "") -> Fault:
    return Fault(recipe.source.of(f"lora.{key}"), f"lora.{key}", problem, hint)


def _refused_by_peft(recipe: Recipe, skeleton: Skeleton, error: Exception) -> Fault:
    text = " ".join(str(error).split()) or type(error).__name__
    if found := re.match(r"Target module (\w+).*not supported", text):
        hint = f"use any of {', '.join(_linears(skeleton.model))}, or all-linear"
        return _fault(recipe, "target_modules", f"an adapter cannot be put on a whole {found[1]}", hint)
    if found := re.match(r"lora\.ParamWrapper does not work with (\w+)", text):
        off = "0" if found[1] == "lora_dropout" else "false"
        hint = f"set it to {off}, or adapt linears only: lora.target_modules=[{', '.join(_linears(skeleton.model))}]"
        return _fault(recipe, found[1], "adapters on the parameters of experts work without it only", hint)
    key = next((key for key in recipe.lora or {} if f"`{key}`" in text or f"{key}=" in text), "")
    where = f"lora.{key}" if key else "lora"
    return Fault(recipe.source.of(where), where, f"PEFT does not accept it: {text}")


class _Names:
    """The names that a `lora` section may use, those of the modules of the base."""

    def __init__(self, recipe: Recipe, skeleton: Skeleton) -> None:
        self.recipe, self.skeleton, self.lora = recipe, skeleton, recipe.lora or {}
        self.modules = {name: module for name, module in skeleton.model.named_modules() if name}
        self.parameters = [name for name, _ in skeleton.model.named_parameters()]
        self.linears = _linears(skeleton.model)

    def faults(self) -> Iterator[Fault]:
        yield from self._listed("target_modules", self._target_hint)
        for key in ("modules_to_save", "exclude_modules"):
            yield from self._listed(key, lambda name: nearest(name, map(_leaf, self.modules)))
        yield from self._unsuitable()
        yield from self._target_parameters()
        yield from self._patterns()
        yield from self._layers()
        yield from self._tokens()

    def _listed(self, key: str, hint: Callable[[str], str]) -> Iterator[Fault]:
        """Entries that match no module: of a list, the whole name or its end; text is a pattern for the whole name."""
        value = self.lora.get(key)
        if isinstance(value, str) and not (key == "target_modules" and value == "all-linear"):
            try:
                hits = any(re.fullmatch(value, name) for name in self.modules)
            except re.error as error:
                yield _fault(self.recipe, key, f"{value!r} is not a regular expression: {error}")
                return
            if not hits:
                problem = f"no module of {self.recipe.model.name} matches the pattern {value!r} as a whole"
                short = any(ends_with(name, value) for name in self.modules)
                yield _fault(self.recipe, key, problem, f"set it to [{value}]" if short else hint(value))
        for entry in value if isinstance(value, list) else []:
            if not any(ends_with(name, entry) for name in self.modules):
                yield _fault(self.recipe, key, self._nothing("module", entry), hint(entry))

    def _nothing(self, kind: str, name: str) -> str:
        return f"{name!r} matches no {kind} of {self.recipe.model.name}"

    def _unsuitable(self) -> Iterator[Fault]:
        """Entries of a list of target modules that cannot have an adapter."""
        targets = self.lora.get("target_modules")
        listed = targets if isinstance(targets, list) else []
        for name in unsuitable(self.skeleton.model) if listed else []:
            if name in listed:
                problem = f"an adapter cannot be put on {name!r} of {self.recipe.model.name}"
                yield _fault(self.recipe, "target_modules", problem, "leave it out, as all-linear does")

    def _target_hint(self, name: str) -> str:
        return nearest(name, self.linears) or f"use any of {', '.join(self.linears)}, or all-linear"

    def _target_parameters(self) -> Iterator[Fault]:
        for entry in self.lora.get("target_parameters") or []:
            if not any(ends_with(name, entry) for name in self.parameters):
                near = nearest(entry, self.parameters) or nearest(entry, map(_leaf, self.parameters))
                yield _fault(self.recipe, "target_parameters", self._nothing("parameter", entry), near)

    def _patterns(self) -> Iterator[Fault]:
        for key, kinds in (("rank_pattern", int), ("alpha_pattern", (int, float))):
            for pattern, value in (self.lora.get(key) or {}).items():
                if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
                    kind = "a whole number" if kinds is int else "a number"
                    yield _fault(self.recipe, key, f"expected {kind} greater than 0 for {pattern}, got {value!r}")
                try:
                    hits = any(_is_pattern_of(str(pattern), name) for name in self.modules)
                except re.error as error:
                    yield _fault(self.recipe, key, f"{pattern!r} is not a regular expression: {error}")
                    continue
                if not hits:
                    yield _fault(self.recipe, key, self._nothing("module", pattern), self._target_hint(str(pattern)))

    def _layers(self) -> Iterator[Fault]:
        patterns = self.lora.get("layers_pattern") or []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not any(re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.\d+\.", name) for name in self.modules):
                lists = {name.split(".")[-2] for name in self.modules if _leaf(name).isdigit()}
                hint = nearest(pattern, lists) or f"use {shorten(sorted(lists), 3)}"
                yield _fault(self.recipe, "layers_pattern", self._nothing("list of layers", pattern), hint)
        wanted = self.lora.get("layers_to_transform")
        indices = [wanted] if isinstance(wanted, int) else wanted or []
        known = {int(match["index"]) for name in self.modules if (match := _INDEX.match(name))}
        if outside := [index for index in indices if index not in known]:
            problem = f"{self.recipe.model.name} has no layer {shorten(map(str, outside), 5)}"
            hint = f"it has layers {min(known)} to {max(known)}" if known else "its layers have no numbers"
            yield _fault(self.recipe, "layers_to_transform", problem, hint)

    def _tokens(self) -> Iterator[Fault]:
        """Numbers that are no row of the module whose rows they are to be."""
        value, key = self.lora.get("trainable_token_indices"), "trainable_token_indices"
        embeddings = self.skeleton.model.get_input_embeddings()
        named: dict[str, list[int]] = {"": value} if isinstance(value, list) else value or {}
        for name, rows in named.items():
            module = embeddings
            if name:
                hits = [module for full, module in self.modules.items() if ends_with(full, name)]
                if not hits:
                    near = nearest(name, map(_leaf, self.modules))
                    yield _fault(self.recipe, key, self._nothing("module", name), near)
                    continue
                module = hits[0]
            size = module.weight.shape[0]
            if outside := [row for row in rows if not 0 <= row < size]:
                problem = f"there is no row {shorten(map(str, outside), 5)}"
                yield _fault(self.recipe, key, problem, f"{name or 'the embedding'} has rows 0 to {size - 1:,}")


def _adapted_faults(recipe: Recipe, model: PeftModel) -> Iterator[Fault]:
    """What only the model with its adapter shows."""
    lora = recipe.lora or {}
    targeted: list[str] = model.base_model.targeted_module_names
    name = recipe.model.name
    targets = lora.get("target_modules")
    for entry in targets if isinstance(targets, list) else []:
        if not any(ends_with(module, entry) for module in targeted):
            problem = f"{entry!r} gets no adapter: exclude_modules, modules_to_save or layers_to_transform leave it out"
            yield _fault(recipe, "target_modules", problem)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(key) or {}:
            if not any(_is_pattern_of(pattern, module) for module in targeted):
                problem = f"{pattern!r} matches no module of {name} that has an adapter"
                yield _fault(recipe, key, problem, f"adapters are on {shorten(sorted(set(map(_leaf, targeted))), 8)}")
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        # The trainer multiplies by the head's weight and never calls the head, so the adapter would learn nothing.
        key = "ensure_weight_tying" if lora.get("ensure_weight_tying") else "target_modules"
        problem = f"an adapter on the output head of {name} would not be trained"
        hint = "train the whole head: lora.modules_to_save=[lm_head]; or leave it out of lora.target_modules"
        yield _fault(recipe, key, problem, hint)
    ranks = {lora.get("r", 8), *(value for value in (lora.get("rank_pattern") or {}).values())}
    if lora.get("init_lora_weights") == "orthogonal" and any(isinstance(rank, int) and rank % 2 for rank in ranks):
        yield _fault(recipe, "init_lora_weights", "orthogonal needs even ranks", "set lora.r to an even number")
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    if wrappers and (kind := STRATEGIES[recipe.strategy]).gathers_in_submodules:
        key = "target_parameters" if lora.get("target_parameters") else "target_modules"
        problem = f"{kind.title} gathers a weight when its module is called, and adapters on parameters call none"
        yield _fault(recipe, key, problem, "strategy=fsdp or zero2, or adapt linears only")
    yield from _quantized_faults(recipe, model)
    yield from _initialisation_faults(recipe)
    yield from _embedding_faults(recipe, model)


def _quantized_faults(recipe: Recipe, model: PeftModel) -> Iterator[Fault]:
    """Modules that need the weights that 4-bit and 8-bit modules no longer have."""
    lora, section = recipe.lora or {}, recipe.quantization
    if section is None or recipe.bits == 16:
        return
    base = model.get_base_model()
    head = base.get_output_embeddings()
    whole = {*head.modules(), *(part for name in section.llm_int8_skip_modules or [] for part in _inside(base, name))}
    for key in ("modules_to_save", "target_parameters"):
        for entry in lora.get(key) or []:
            module = entry if key == "modules_to_save" else entry.rpartition(".")[0]
            if any(isinstance(part, nn.Linear) and part not in whole for part in _inside(base, module)):
                problem = f"{entry} has weights of {recipe.bits} bits, which cannot be trained"
                hint = f"quantization.llm_int8_skip_modules=[{module}] keeps it in {recipe.model.dtype}"
                yield _fault(recipe, key, problem, hint)


def _initialisation_faults(recipe: Recipe) -> Iterator[Fault]:
    """PiSSA and OLoRA take the adapter out of the weights of the base, and do so again wherever it is loaded."""
    init, key = (recipe.lora or {}).get("init_lora_weights"), "init_lora_weights"
    if not isinstance(init, str) or not (init.startswith("pissa") or init == "olora"):
        return
    if init.startswith("pissa_niter"):
        problem = f"{init} decomposes weights at random, which could not be repeated when the adapter is loaded"
        yield _fault(recipe, key, problem, "use pissa, which decomposes them exactly")
    if recipe.bits < 16:
        hint = "use true, gaussian or orthogonal, or a base that is not quantised"
        yield _fault(recipe, key, f"{init} rewrites the base, whose weights have {recipe.bits} bits", hint)
    elif recipe.quantization is not None and recipe.quantization.dequantize_at_load:
        problem = f"{init} would decompose weights that were quantised, and the adapter would not fit the original ones"
        yield _fault(recipe, key, problem, "use true, gaussian or orthogonal, or quantization=null")
    if "weights" in STRATEGIES[recipe.strategy].shards:
        problem = f"{init} decomposes whole weights of the base, which {recipe.strategy} splits among the processes"
        yield _fault(recipe, key, problem, "use true, gaussian or orthogonal, or strategy=ddp")


def _embedding_faults(recipe: Recipe, model: PeftModel) -> Iterator[Fault]:
    """Trained embeddings and heads that would not be trained as the recipe says."""
    lora, kind = recipe.lora or {}, STRATEGIES[recipe.strategy]
    base = model.get_base_model()
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    changed = [module for module in modules if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    tokens = [module for module in changed if hasattr(module, "token_adapter")]
    key = next((key for key in ("trainable_token_indices", "modules_to_save") if lora.get(key)), "target_modules")
    if changed and kind.ties_weights_again and getattr(base.config, "tie_word_embeddings", False):
        problem = f"{kind.title} ties the output head of {recipe.model.name} to its embedding, and cannot train either"
        yield _fault(recipe, key, problem, "strategy=ddp or zero2, or leave both out of the adapter")
    if tokens and "weights" in kind.shards:
        where, what = f"lora.{key}", "single rows"
        if recipe.model.resize_embeddings or recipe.data.chat_template is not None:
            what, resized = "new rows", recipe.model.resize_embeddings
            where = "model.resize_embeddings" if resized else "data.chat_template"
        problem = f"{what} of an embedding cannot be trained by themselves under {kind.title}"
        hint = "strategy=ddp or zero2, or train the modules whole: lora.modules_to_save=[embed_tokens, lm_head]"
        yield Fault(recipe.source.of(where), where, problem, hint)
    if any(getattr(module.original_module, "bias", None) is not None for module in tokens):
        problem = f"PEFT would drop the bias of the output head of {recipe.model.name}"
        yield _fault(recipe, key, problem, "train it whole: lora.modules_to_save")


def _inside(model: nn.Module, end: str) -> list[nn.Module]:
    """All modules in those whose name ends in `end`, without what an adapter has put there."""
    found = [module for name, module in model.named_modules() if ends_with(name, end)]
    return [part for module in found for name, part in module.named_modules() if "lora_" not in name]


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _is_pattern_of(pattern: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern is for the module `name`, as PEFT decides it."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _linears(model: Any) -> list[str]:
    """The last parts of the names of all linears but the output head."""
    head = model.get_output_embeddings()
    return sorted(
        {
            _leaf(name)
            for name, module in model.named_modules()
            if module is not head and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        }
    )
