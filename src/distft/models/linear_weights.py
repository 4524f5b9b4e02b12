"""Which of a base's linear weights a recipe quantises: known before the weights are loaded, and checked afterwards.

Linear weights are the matrices that tokens are multiplied by: those of linears and routers, and the 3-D weights of
experts. The embeddings and the output head, which stay in 16 bits, are not among them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer

from distft.config.recipe import Recipe
from distft.distributed.tensors import is_packed, whole_numel
from distft.errors import Fault, InvariantError
from distft.models.experts import expert_weights
from distft.models.loading import packing_experts, quantization_config, stored_method
from distft.models.skeleton import Skeleton
from distft.text import shorten

ENOUGH = 0.8
"""The share of a base's linear weights that a quantisation has to reach."""


@dataclass(frozen=True)
class LinearWeights:
    """Elements in linear weights by the ends of their names: `sizes` of all, and `quantized` ones. `experts` are the
    ends that experts have."""

    sizes: Mapping[str, int]
    quantized: Mapping[str, int]
    experts: frozenset[str] = frozenset()

    @property
    def share(self) -> float:
        """The share that is quantised."""
        return sum(self.quantized.values()) / max(sum(self.sizes.values()), 1)

    @property
    def in_experts(self) -> float:
        """The share that is in experts."""
        return sum(self.sizes[name] for name in self.experts) / max(sum(self.sizes.values()), 1)

    @property
    def left(self) -> dict[str, int]:
        """Elements that are not quantised, the most first."""
        found = {name: size - self.quantized.get(name, 0) for name, size in self.sizes.items()}
        return dict(sorted(((name, size) for name, size in found.items() if size), key=lambda item: -item[1]))

    @classmethod
    def expected(cls, recipe: Recipe, skeleton: Skeleton) -> LinearWeights:
        """What loading the recipe's base will quantise. Builds its modules once more, because some are replaced."""
        model, config = Skeleton(skeleton.config, skeleton.trust_remote_code).model, quantization_config(recipe)
        weights = [(name, parameter.numel(), is_expert) for name, parameter, is_expert in _linear_weights(model)]
        if config is None:
            return cls._of((name, size, is_expert, False) for name, size, is_expert in weights)
        with packing_experts(recipe):
            quantizer = AutoHfQuantizer.from_config(config, pre_quantized=stored_method(skeleton.config) is not None)
        quantizer.preprocess_model(model=model, device_map=None)
        return cls._of((*weight, quantizer.param_needs_quantization(model, weight[0])) for weight in weights)

    @classmethod
    def loaded(cls, model: Any) -> LinearWeights:
        """What is quantised in a model that has been loaded."""
        return cls._of(
            (name, whole_numel(parameter), is_expert, is_packed(parameter) or parameter.dtype == torch.int8)
            for name, parameter, is_expert in _linear_weights(model)
        )

    @classmethod
    def _of(cls, weights: Iterable[tuple[str, int, bool, bool]]) -> LinearWeights:
        """From the name and the elements of each weight, whether it is in experts, and whether it is quantised."""
        sizes, quantized, experts = Counter[str](), Counter[str](), set()
        for name, size, is_expert, is_quantized in weights:
            end = re.split(r"\.\d+\.", name)[-1]
            sizes[end] += size
            if is_quantized:
                quantized[end] += size
            if is_expert:
                experts.add(end)
        return cls(dict(sizes), dict(quantized), frozenset(experts))

    def line(self, recipe: Recipe) -> str:
        """What is quantised, in a sentence for the user."""
        section, left = recipe.quantization, shorten(self.left, 4)
        bits = 4 if section is not None and section.load_in_4bit else 8
        rest = f"; {left} in {recipe.model.dtype}" if left else ""
        return f"{self.share:.1%} of the linear weights in {bits} bits{rest}"

    def require(self, model: Any) -> None:
        """Check that `model` has been loaded as expected.

        Raises:
            InvariantError: it has not.
        """
        found = LinearWeights.loaded(model)
        for name in sorted({*self.sizes, *found.sizes}):
            ours, theirs = ((w.quantized.get(name, 0), w.sizes.get(name, 0)) for w in (self, found))
            if ours != theirs:
                raise InvariantError(
                    f"{theirs[0]:,} of the {theirs[1]:,} elements in {name} were quantised; {ours[0]:,} of {ours[1]:,} "
                    "were expected"
                )


def quantization_faults(recipe: Recipe, skeleton: Skeleton, weights: LinearWeights) -> list[Fault]:
    """A quantisation that leaves out most of what it is for, unless the recipe says what to leave out."""
    section = recipe.quantization
    if section is None or not section.is_quantized:
        return []
    if (stored := stored_method(skeleton.config)) not in (None, "bitsandbytes"):
        problem = f"{recipe.model.name} is stored in {stored}, which bitsandbytes cannot quantise again"
        hint = (
            f"quantization=null, which unpacks it to {recipe.model.dtype}" if stored == "mxfp4" else "quantization=null"
        )
        return [Fault(recipe.source.of("quantization"), "quantization", problem, hint)]
    if section.llm_int8_skip_modules and weights.share < ENOUGH:
        whole = section.model_copy(update={"llm_int8_skip_modules": None})
        weights = LinearWeights.expected(recipe.model_copy(update={"quantization": whole}), skeleton)
    asked = weights.experts if not section.experts else frozenset()
    left = {name: size for name, size in weights.left.items() if name not in asked}
    quantized = sum(weights.quantized.values())
    if quantized >= ENOUGH * (quantized + sum(left.values())):
        return []
    bits, dtype = 4 if section.load_in_4bit else 8, recipe.model.dtype
    problem = (
        f"{bits} bits reach {weights.share:.0%} of the linear weights of {recipe.model.name}; "
        f"{shorten(left, 4)} would stay in {dtype}"
    )
    if left.keys() & weights.experts:
        key, hint = "quantization.experts", f"load_in_4bit packs experts, too; experts=false leaves them in {dtype}"
    else:
        key, hint = "quantization", f"quantization=null trains with all weights in {dtype}"
    return [Fault(recipe.source.of(key), key, problem, hint)]


def _linear_weights(model: Any) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, parameter, and whether it is one of experts, of each linear weight."""
    head = model.get_output_embeddings()
    apart = {id(part) for part in head.modules()} if head is not None else set()
    others = nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d
    for path, module in model.named_modules():
        if id(module) in apart or isinstance(module, others) or "lora_" in path:
            continue
        experts = expert_weights(module)
        for name, parameter in module.named_parameters(recurse=False):
            is_matrix = name == "weight" and (isinstance(module, nn.Linear) or parameter.ndim == 2)
            if name in experts or is_matrix or (parameter.ndim == 3 and min(parameter.shape[1:]) > 1):
                yield f"{path}.{name}", parameter, name in experts
