"""What is wrong with a recipe for its model, found before any weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from peft.tuners.lora import ParamWrapper

from distft import upstream_api
from distft.config.recipe import Recipe
from distft.config.validation import nearest
from distft.distributed.strategies.selection import STRATEGIES
from distft.distributed.tensors import whole_numel
from distft.errors import DataError, Fault, InvariantError, ModelError
from distft.models import attention
from distft.models.embeddings import train_new_rows, vocabulary_size
from distft.models.experts import expert_weights
from distft.models.linear_weights import LinearWeights, quantization_faults
from distft.models.loading import tokenizer_and_new_tokens
from distft.models.locations import local_folder, location_problem
from distft.models.lora_checks import lora_faults
from distft.models.skeleton import Skeleton
from distft.text import count, shorten

_MULTIMODAL = ("image", "boi", "eoi", "audio", "video")
"""Names under which tokenizers of multimodal models keep placeholders that no text contains. A text-only variant may
lack rows for them (Gemma 3 1B)."""


class Expected(NamedTuple):
    """What loading the model must give: `trainable` of all `parameters` are trained. `weights` says what is quantised;
    None if nothing is. `notes` are on what a user may not expect of that."""

    trainable: int
    parameters: int
    weights: LinearWeights | None
    notes: list[str]

    def lines(self, recipe: Recipe) -> list[str]:
        """What will train and what will be quantised, for the user."""
        trains = f"trains {self.trainable:,} of {self.parameters:,} parameters ({self.trainable / self.parameters:.2%})"
        return [trains, *([] if self.weights is None else [self.weights.line(recipe)]), *self.notes]

    def require(self, model: Any) -> None:
        """Check what a model, loaded and with its adapter, trains.

        Raises:
            InvariantError: it is something else.
        """
        found = sum(whole_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
        if found != self.trainable:
            raise InvariantError(f"{found:,} parameters of the loaded model train; {self.trainable:,} were expected")


class ModelFindings(NamedTuple):
    """`faults`, `notes` on what works but deserves attention, and `skipped`: what could not be checked. `expected` is
    None if the model is not known."""

    faults: list[Fault]
    notes: list[str]
    skipped: list[str]
    expected: Expected | None = None


def model_faults(recipe: Recipe, *, local_only: bool = True) -> ModelFindings:
    """What is wrong with the recipe's model, tokenizer and adapter.

    Loads config.json and the tokenizer, and no weights. `local_only` asks nothing of the hub.
    """
    section, faults, skipped = recipe.model, [], []
    for key, name, what in (("name", section.name, "model"), ("tokenizer", section.tokenizer, "tokenizer")):
        if name is not None and name != "tiny" and (problem := location_problem(name, what)):
            faults.append(_fault(recipe, key, problem))
    if faults:
        return ModelFindings(faults, [], [])
    try:
        skeleton = Skeleton.of(recipe, local_only=local_only)
        _ = skeleton.model
    except ModelError as error:
        if local_only and local_folder(section.name) is None:
            return ModelFindings([], [], [f"the model {section.name}, which is not in the cache"])
        return ModelFindings([_fault(recipe, "name", str(error))], [], [])
    try:
        # The tiny model has a tokenizer that fits, and may have yet to be built.
        own = section.name == "tiny" and section.tokenizer is None and recipe.data.chat_template is None
        tokenizer, new = (None, []) if own else tokenizer_and_new_tokens(recipe)
    except DataError as error:
        tokenizer, new, key = None, [], "data.chat_template"
        faults.append(Fault(recipe.source.of(key), key, str(error).replace("\n ", ";")))
    except ModelError as error:
        tokenizer, new = None, []
        if local_only and local_folder(section.tokenizer or section.name) is None:
            skipped.append(f"the tokenizer of {section.tokenizer or section.name}, which is not in the cache")
        else:
            faults.append(_fault(recipe, "tokenizer" if section.tokenizer else "name", str(error)))
    lora, known = recipe, skeleton.embedding_rows
    if tokenizer is not None:
        faults += tokenizer_faults(recipe, skeleton, tokenizer, new)
        lora = _with_new_rows(recipe, skeleton, tokenizer, new)
        kind = STRATEGIES[recipe.strategy]
        if skeleton.embedding_rows > known and kind.gathers_in_submodules:
            problem = f"rows cannot be added to an embedding that {kind.title} has split among the processes"
            key = "model.resize_embeddings" if recipe.model.resize_embeddings else "data.chat_template"
            faults.append(Fault(recipe.source.of(key), key, problem, "strategy=ddp, zero2 or fsdp"))
    found, notes = position_findings(recipe, skeleton)
    skips = skip_faults(recipe, skeleton)
    faults += [*found, *skips, *router_faults(recipe, skeleton), *experts_faults(recipe, skeleton)]
    if not attention.has_attention(skeleton.config, asked := section.attn_implementation):
        problem = f"{section.name} has no {asked} attention"
        faults.append(_fault(recipe, "attn_implementation", problem, "set it to auto"))
    weights = None if skips else LinearWeights.expected(recipe, skeleton)
    if weights is not None:
        faults += quantization_faults(recipe, skeleton, weights)
    faults += lora_faults(lora, skeleton)  # this puts the adapter on the skeleton
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in skeleton.model.parameters()]
    trainable = sum(size for size, trained in sizes if trained)
    if weights is None:
        return ModelFindings(faults, notes, skipped)
    said = expert_notes(recipe, weights, skeleton.model)
    is_quantized = recipe.quantization is not None and recipe.quantization.is_quantized
    expected = Expected(trainable, sum(size for size, _ in sizes), weights if is_quantized else None, said)
    return ModelFindings(faults, notes, skipped, expected)


def _with_new_rows(recipe: Recipe, skeleton: Skeleton, tokenizer: Any, new: Sequence[int]) -> Recipe:
    """The recipe, and the skeleton, as they will be with the rows of `model.resize_embeddings` and of the tokens that
    are `new`."""
    known, rows = skeleton.embedding_rows, vocabulary_size(tokenizer)
    if not (recipe.model.resize_embeddings or new) or (rows <= known and not new):
        return recipe
    if rows > known:
        skeleton.model.resize_token_embeddings(rows, mean_resizing=False)
    if recipe.lora is None:
        return recipe
    return recipe.model_copy(update={"lora": train_new_rows(recipe.lora, skeleton.model, known, new)})


def tokenizer_faults(recipe: Recipe, skeleton: Skeleton, tokenizer: Any, new: Sequence[int] = ()) -> list[Fault]:
    """Entries of the tokenizer for which the model has no embedding, and will get none; `new` ones will."""
    if recipe.model.resize_embeddings:
        return []
    rows = skeleton.embedding_rows
    placeholders = {getattr(tokenizer, f"{name}_token", None) for name in _MULTIMODAL}
    beyond = sorted(
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and token not in placeholders and number not in new
    )
    if not beyond:
        return []
    key = "tokenizer" if recipe.model.tokenizer else "name"
    names = shorten((f"{token!r} ({number})" for number, token in beyond), 3)
    problem = (
        f"the tokenizer has {count(len(beyond), 'token')} beyond the {rows:,} rows of the model's embedding: {names}"
    )
    return [
        _fault(recipe, key, problem, "use the model's own tokenizer, or add the rows: model.resize_embeddings=true")
    ]


def skip_faults(recipe: Recipe, skeleton: Skeleton) -> list[Fault]:
    """Entries of `llm_int8_skip_modules` that match no linear layer, as transformers matches them."""
    section, found = recipe.quantization, []
    kinds = ("Linear", "Conv1D")
    names = [name for name, module in skeleton.model.named_modules() if type(module).__name__ in kinds]
    key = "quantization.llm_int8_skip_modules"
    for entry in (section.llm_int8_skip_modules or []) if section is not None else []:
        try:
            start = re.compile(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))")
        except re.error as error:
            problem, hint = f"{entry!r} is not a regular expression: {error}", ""
        else:
            if any(start.match(name) or name.endswith(entry) for name in names):
                continue
            problem = f"{entry!r} matches no linear layer of {recipe.model.name}"
            hint = nearest(entry, {name.rsplit(".", 1)[-1] for name in names})
        found.append(Fault(recipe.source.of(key), key, problem, hint))
    return found


def experts_faults(recipe: Recipe, skeleton: Skeleton) -> list[Fault]:
    """An implementation of experts for a model that has none, or that computes them in its own way."""
    asked = recipe.model.experts_implementation
    experts = [module for module in skeleton.model.modules() if expert_weights(module)]
    if asked == "auto" or (experts and asked == "eager") or any(map(upstream_api.has_standard_experts, experts)):
        return []
    problem = f"{recipe.model.name} has no experts" if not experts else f"{recipe.model.name} has no {asked} experts"
    return [_fault(recipe, "experts_implementation", problem, "set it to auto")]


def expert_notes(recipe: Recipe, weights: LinearWeights, model: Any) -> list[str]:
    """What `all-linear` does to experts, which are no linears: PEFT adapts those of some architectures all the same.
    `model` has the adapter."""
    lora = recipe.lora
    if (
        not weights.experts
        or lora is None
        or lora.get("target_modules") != "all-linear"
        or lora.get("target_parameters")
    ):
        return []
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper) and module.num_experts > 1]
    if wrappers:
        parts = (part for module in wrappers for part in (module.lora_A, module.lora_B))
        found = sum(parameter.numel() for part in parts for parameter in part.parameters())
        return [f"lora.target_modules=all-linear adapts experts, too: {found:,} trained parameters are theirs"]
    names = ", ".join(sorted(weights.experts))
    return [
        f"lora.target_modules=all-linear puts no adapter on experts, which hold {weights.in_experts:.0%} of the linear "
        f"weights; lora.target_parameters=[{names}] does"
    ]


def router_faults(recipe: Recipe, skeleton: Skeleton) -> list[Fault]:
    """A weight of the routers' auxiliary loss for a model that has no experts, or does not return what they score."""
    key = "training.router_aux_loss_coef"
    if not recipe.training.get("router_aux_loss_coef"):
        return []
    if hasattr(skeleton.model.config.get_text_config(), "output_router_logits"):
        return []
    problem = f"{recipe.model.name} returns no router logits, so there is no auxiliary loss to weight"
    return [Fault(recipe.source.of(key), key, problem, "leave it out: it is for mixtures of experts")]


def position_findings(recipe: Recipe, skeleton: Skeleton, longest: int | None = None) -> tuple[list[Fault], list[str]]:
    """Faults of, and notes on, samples that are longer than what the model was built for.

    `longest` is the number of tokens in the longest sample, where it is known; else `training.max_length` counts. In a
    pack, positions start anew with each sample.
    """
    limit: int | None = recipe.training.get("max_length", 1024)  # TRL's default
    positions = skeleton.positions
    found = longest if longest is not None else limit
    if positions is None or found is None or found <= positions:
        return [], []
    what = "the longest sample has" if longest is not None else "samples may have"
    problem = f"{what} {found:,} tokens; {recipe.model.name} was built for {positions:,} positions"
    if not skeleton.has_learned_positions:
        return [], [f"{problem} (max_position_embeddings), and may compute poorly beyond them"]
    key = "training.max_length"
    return [Fault(recipe.source.of(key), key, f"{problem}, and has none beyond", f"set it to {positions}")], []


def _fault(recipe: Recipe, key: str, problem: str, hint: str = "") -> Fault:
    return Fault(recipe.source.of(f"model.{key}"), f"model.{key}", problem, hint)
