"""How a run computes its micro-batches: with which attention, in packs or padded, with fused nodes or PEFT's modules.

The recipe says what is wanted; the check of `models.isolation` decides, on the loaded model, what is right.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from distft import upstream_api
from distft.config.recipe import Recipe, divisors
from distft.data.batch_plan import Lengths
from distft.data.loader import Collator
from distft.distributed.collectives import broadcast, first_failure
from distft.distributed.strategies import Strategy
from distft.errors import ModelError
from distft.models import attention
from distft.models.adapter import freeze_adapters
from distft.models.experts import fused_expert_layers
from distft.models.fused_lora import fused_linears, has_plain_modules, use_plain_modules
from distft.models.isolation import Findings, IsolationCheck, set_attention
from distft.models.prefix import on_gpu
from distft.models.unpacked import UNPACKED
from distft.models.varlen import VARLEN
from distft.text import count
from distft.training.arguments import pad_multiple

_PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Way:
    """One way to compute micro-batches."""

    attention: str
    packed: bool
    fused: bool

    def __str__(self) -> str:
        modules = "" if self.fused else " and transformers' and PEFT's own modules"
        return f"{'packs' if self.packed else 'padded rows'} with {self.attention} attention{modules}"


@dataclass(frozen=True)
class Settled:
    """What was decided: the recipe with its final micro-batches, `notes` to print, and `facts` for `summary.json`."""

    recipe: Recipe
    notes: list[str]
    facts: dict[str, Any]


def settle(model: Any, recipe: Recipe, strategy: Strategy, tokenizer: Any, lengths: Lengths) -> Settled:
    """Let `model` compute micro-batches in the first way that is right, of those that the recipe allows. All ranks
    enter, and agree.

    Raises:
        ModelError: on all ranks; none is right, or not the one that the recipe names.
    """
    start = time.perf_counter()
    attention.register()
    check = _check_of(model, recipe, strategy)
    failed: dict[Way, str] = {}
    for way in ways(model, recipe, strategy):
        found = _findings(check, model, way, recipe, strategy, tokenizer)
        if found.fault is None:
            break
        failed[way] = found.fault
    else:
        raise ModelError(_refusal(recipe, failed))
    settled = recipe if way.packed or not _packs(recipe) else padded(recipe, lengths, strategy.world.world_size)
    facts = {
        "attn_implementation": way.attention,
        "isolation_errors": found.errors,
        "isolation_check_s": round(time.perf_counter() - start, 3),
    }
    notes = [_note(way, failed, settled)] if failed else []
    if settled.shares_prompts and way.packed:
        settled, more = _prompts_once(check, model, way, settled, strategy, tokenizer)
        notes += more
        facts["share_prompts"] = settled.shares_prompts
    if unreached := broadcast([] if check is None else check.unreached(), strategy.world):
        freeze_adapters(model, unreached, getattr(torch, recipe.model.dtype))
        notes.append(f"no gradient reaches the adapters on {', '.join(unreached)}, so they are not trained")
    if recipe.lora is not None:
        facts["fused_linears"], facts["adapted_linears"] = fused_linears(model)
    fused, layers = fused_expert_layers(model)
    if layers:
        facts["fused_expert_layers"], facts["expert_layers"] = fused, layers
    return Settled(settled, notes, facts)


def ways(model: Any, recipe: Recipe, strategy: Strategy) -> Iterator[Way]:
    """The ways that the recipe allows, the best first: other attention before padding, and each with fused nodes
    before the modules of transformers and PEFT."""
    now = upstream_api.attn_implementation(model.config)
    others = attention.choices(recipe, model.config, on_gpu=strategy.on_gpu)
    named = recipe.model.attn_implementation != "auto"
    sharing = recipe.shares_prompts is True
    kernels = [True, False] if has_plain_modules(model) else [True]
    for packed in (True, False) if _packs(recipe) and not named else (_packs(recipe),):
        for name in [now] if named else dict.fromkeys([*others, now]):
            if name in (VARLEN, UNPACKED) if packed and sharing else packed or name not in (VARLEN, UNPACKED):
                yield from (Way(name, packed, fused) for fused in kernels)


def padded(recipe: Recipe, lengths: Lengths, world_size: int) -> Recipe:
    """The recipe with padded micro-batches that take no more tokens than its packs, and the same global batch."""
    batching = recipe.batching
    fitting = max(1, recipe.micro_batch // int(lengths.max()))
    size = batching.global_batch_size
    if size is not None:
        fitting = max(number for number in divisors(max(size // world_size, 1)) if number <= fitting)
    sizes = {"micro_batch_tokens": None, "micro_batch": fitting}
    return recipe.model_copy(update={"batching": batching.model_copy(update=sizes)})


def _packs(recipe: Recipe) -> bool:
    return recipe.batching.micro_batch_tokens is not None


def _check_of(model: Any, recipe: Recipe, strategy: Strategy) -> IsolationCheck | None:
    """The check of this rank's model; None if another rank has the weights."""
    if strategy.loads_on_main(recipe) and not strategy.world.is_main:
        return None
    checked = on_gpu(model) if strategy.on_gpu else model
    precision = _PRECISIONS[recipe.mixed_precision]
    return IsolationCheck(checked, precision=precision, gradients=not strategy.gathers_in_submodules)


def _findings(
    check: IsolationCheck | None, model: Any, way: Way, recipe: Recipe, strategy: Strategy, tokenizer: Any
) -> Findings:
    """What the check finds of `way`, the same on all ranks; from then on, `model` computes in this way."""
    use_plain_modules(model, not way.fused)
    set_attention(model, way.attention)
    found = Findings()
    if check is not None:
        multiple = pad_multiple(recipe, strategy) if way.packed == _packs(recipe) else None
        collate = Collator(tokenizer.pad_token_id, packed=way.packed, multiple=multiple)
        with strategy.whole_modules(model):
            found = check.findings(collate, way.attention, plain=not way.fused)
    errors = broadcast(dict(found.errors), strategy.world)
    failure = first_failure(found.fault, strategy.world)
    return Findings(None if failure is None else failure[1], errors)


def _prompts_once(
    check: IsolationCheck | None, model: Any, way: Way, recipe: Recipe, strategy: Strategy, tokenizer: Any
) -> tuple[Recipe, list[str]]:
    """The recipe, which then says whether a pack has the prompt of a pair once, and what to tell the user. All ranks
    enter.

    Raises:
        ModelError: the recipe asks for it, and it is wrong for the model.
    """
    asked, fault = recipe.shares_prompts, None
    if asked == "auto" and way.attention != VARLEN:
        return _with_prompts_shared(recipe, shared=False), []
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        fault = "the balance of its experts is a mean over all tokens, and would count a prompt once"
    elif check is not None:
        multiple = pad_multiple(recipe, strategy)
        collate = Collator(
            tokenizer.pad_token_id, packed=True, multiple=multiple, for_head=True, pairs=True, shared=True
        )
        with strategy.whole_modules(model):
            fault = check.sharing_fault(collate)
    failure = first_failure(fault, strategy.world)
    if failure is None:
        return _with_prompts_shared(recipe, shared=True), []
    said = f"{way} cannot share the prompt of a pair: {failure[1]}"
    if asked != "auto":
        raise ModelError(f"batching.share_prompts=true is wrong for {recipe.model.name} ({said}); set it to false")
    return _with_prompts_shared(recipe, shared=False), [f"prompts are computed for each answer, because {said}"]


def _with_prompts_shared(recipe: Recipe, *, shared: bool) -> Recipe:
    batching = recipe.batching.model_copy(update={"share_prompts": shared})
    return recipe.model_copy(update={"batching": batching})


def _note(way: Way, failed: dict[Way, str], settled: Recipe) -> str:
    wrong = "; ".join(dict.fromkeys(f"{other}: {fault}" for other, fault in failed.items() if other.fused))
    size = (
        ""
        if way.packed or not any(other.packed for other in failed)
        else (f", {count(settled.micro_batch, 'sample')} at a time and the same global batch")
    )
    return f"this run computes {way}{size}, because other ways are wrong for this model: {wrong}"


def _refusal(recipe: Recipe, failed: dict[Way, str]) -> str:
    found = "; ".join(f"{way}: {fault}" for way, fault in failed.items() if way.fused)
    name, asked = recipe.model.name, recipe.model.attn_implementation
    if not failed:
        problem = f"batching.share_prompts=true: {asked} attention takes no other keys than queries"
        return f"{problem}; set model.attn_implementation=auto, or batching.share_prompts=auto"
    if asked == "auto":
        remedy = "; set quantization=null, because some layers cannot be quantised" if recipe.bits < 16 else ""
        problem = f"distft knows no way to train {name} in which each sample is computed as if it were alone ({found})"
        return problem + remedy
    remedy = "set model.attn_implementation=auto, which finds what is right"
    if _packs(recipe):
        remedy += ", or batching.micro_batch_tokens=null, which pads"
    return f"model.attn_implementation={asked} is wrong for {name} ({found}); {remedy}"
