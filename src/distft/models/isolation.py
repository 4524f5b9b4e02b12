"""Whether a model computes each sample of a micro-batch as if it were alone: the check that every run makes on its own
model before step 1.

Samples of one pack may see each other (a recurrent state or a convolution runs on, positions are counted from the start
of the row), an attention kernel may leave out a feature of the model (ALiBi, sinks), and a fused node may compute
something else than the modules it replaces. None of that raises an error, so nothing is trusted by its name: two short
samples are computed alone, by the plain modules of transformers and PEFT, and together as in training, and the logits
and the adapter's gradient have to agree. Then the first is exchanged, which may not change the second.

Of each kind of layer, the first is computed: with few layers, little rounding hides what is wrong. Windows are
narrowed, so that short samples cross them. What is right is computed once more in training mode, with the dropout that
some kernels lack.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from distft import upstream_api
from distft.data.tokenize import IGNORED
from distft.errors import ModelError
from distft.models.experts import eager_experts
from distft.models.fused_lora import use_plain_modules, uses_plain_modules
from distft.models.prefix import first_layers
from distft.models.unpacked import UNPACKED
from distft.models.varlen import VARLEN, hand_over_boundaries
from distft.text import first_line

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]

_LENGTHS = (9, 13)
"""Tokens of the two samples."""
_PROMPT = 7
"""Tokens that two samples share, if they do: more than a window has."""
_WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size")
"""The names under which configurations and attention modules have the width of a window."""
_WINDOW = 5
"""Windows in the check are this wide, so that both samples cross them."""
_GRADIENTS = 1 << 25
"""The smallest trainable parameters are compared, up to this many elements in all."""
_RAISED = (ModelError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model raises that cannot be computed in this way."""
_SAYS = {
    "logits": "the logits of two samples differ by {:.2g} from those of each alone",
    "exchanged": "the logits of a sample change by {:.2g} with the sample before it",
    "gradient": "the gradient of a sample differs by {:.2g} from that of the sample alone, in {}",
}


@dataclass(frozen=True)
class Findings:
    """What is wrong, or None; and the relative errors by which that was decided."""

    fault: str | None = None
    errors: Mapping[str, float] = field(default_factory=dict)


def _products_of(model: Any) -> torch.dtype | None:
    """The type to which products with quantised weights round, if that is not the model's; as coarse as bf16 for
    LLM.int8(), which rounds activations to 8 bits."""
    found = {type(module).__name__: module for module in model.modules()}
    if "Linear8bitLt" in found:
        return torch.bfloat16
    computes = getattr(found.get("Linear4bit"), "compute_dtype", None)
    return computes if computes is not None and computes.itemsize == 2 else None


class IsolationCheck:
    """The check of one model. It leaves the model, its adapter and the random numbers as they were.

    `precision` is that of autocast in training, if there is any. `gradients`: compare those of trainable parameters,
    too.
    """

    def __init__(self, model: Any, *, precision: torch.dtype | None = None, gradients: bool = True) -> None:
        self._model, self._precision, self._samples = model, precision, _Samples.of(model)
        self._rounded_to = _products_of(model) or precision
        self._device = model.get_input_embeddings().weight.device
        with first_layers(model):
            trained = [(_end(name), each) for name, each in model.named_parameters() if each.requires_grad]
        self._trained = list(_smallest(trained)) if gradients else []
        self._reached: set[str] = set()

    def findings(self, collate: Collate, attention: str, *, plain: bool = False) -> Findings:
        """Compare two samples that `collate` puts into one micro-batch, under the implementation `attention`, with the
        same samples alone. `plain`: without fused nodes. From then on, the model computes in this way."""
        use_plain_modules(self._model, plain)
        with first_layers(self._model), _undisturbed(self._model), _narrow_windows(self._model):
            try:
                return self._findings(collate, attention)
            except torch.OutOfMemoryError:
                raise
            except _RAISED as error:
                return Findings(f"{type(error).__name__}: {first_line(error)}")

    def _findings(self, collate: Collate, attention: str) -> Findings:
        samples = self._samples
        first, second = self._alone
        if not set_attention(self._model, attention):
            return Findings(f"the model has no {attention} attention")
        together = self._computed(_batch(collate, samples.first, samples.second), [samples.first, samples.second])
        with torch.no_grad():
            other = self._computed(_batch(collate, samples.other, samples.second), [samples.other, samples.second])
        alone = torch.cat([first.logits[0], second.logits[0]])
        logits = _typical_error(torch.cat(together.logits), alone)
        exchanged, gradients = _error(other.logits[1], together.logits[1]), _errors(together, second)
        step = torch.finfo(self._rounded_to or alone.dtype)
        exact = step.eps * (100 if step.bits > 16 else 1)
        if max(logits, *gradients.values()) > 3 * exact or exchanged > exact:
            of_logits, of_gradients = self._rounding
        else:
            of_logits, of_gradients = 0.0, dict.fromkeys(gradients, 0.0)
        # The part of the gradient that is furthest above its limit, or least below.
        end = max(gradients, key=lambda end: gradients[end] / max(exact, of_gradients[end]))
        errors = {"logits": logits, "exchanged": exchanged, "gradient": gradients[end]}
        limits = {
            "logits": 3 * max(exact, of_logits),
            "exchanged": max(exact, of_logits),
            "gradient": 3 * max(exact, of_gradients[end]),
        }
        over = (name for name, error in errors.items() if error > limits[name])
        wrong = next((_SAYS[name].format(errors[name], end) for name in over), None)
        if not self._trained:
            del errors["gradient"]
        if wrong is None:
            self._model.train()
            with torch.no_grad():
                self._computed(_batch(collate, samples.first, samples.second), [samples.first, samples.second])
        return Findings(wrong, errors)

    def sharing_fault(self, collate: Collate) -> str | None:
        """Why two samples cannot share the tokens they begin with, in a row that `collate` makes of a pair; None if the
        second has the logits and the gradient that it has alone."""
        first, second = self._samples.second, self._samples.second[:_PROMPT] + self._samples.first[3:]
        own = len(second) - _PROMPT
        labels = [[IGNORED] * _PROMPT + each[_PROMPT:] for each in (first, second)]
        pair = {"input_ids": first + second, "labels": labels[0] + labels[1], "chosen": len(first)}
        inputs = {key: value for key, value in collate([pair]).items() if key not in ("scored", "targets", "counts")}
        row = [*range(_PROMPT), *range(len(first), len(first) + own)]
        with first_layers(self._model), _undisturbed(self._model), _narrow_windows(self._model):
            try:
                with _plain(self._model):
                    alone = self._computed({"input_ids": torch.tensor([second])}, [second])
                found = self._computed(inputs, [second], [row])
            except torch.OutOfMemoryError:
                raise
            except _RAISED as error:
                return f"{type(error).__name__}: {first_line(error)}"
            step = torch.finfo(self._rounded_to or alone.logits[0].dtype)
            exact = step.eps * (100 if step.bits > 16 else 1)
            rounding = self._rounding
        logits, gradients = _typical_error(found.logits[0], alone.logits[0]), _errors(found, alone)
        if logits > 3 * max(exact, rounding[0]):
            return _SAYS["logits"].format(logits)
        over = (end for end, error in gradients.items() if error > 3 * max(exact, rounding[1].get(end, 0.0)))
        return next((_SAYS["gradient"].format(gradients[end], end) for end in over), None)

    def unreached(self) -> list[str]:
        """Ends of the names of modules whose adapters are in no sample's gradient, in any layer: the model reads the
        weights of these modules without calling them."""
        adapters = {end for end, _ in self._trained if "." not in end}
        return sorted(adapters - self._reached) if self._reached else []

    @functools.cached_property
    def _alone(self) -> tuple[_Computed, _Computed]:
        """Each sample by itself, by plain modules. The gradient is that of the second."""
        samples = self._samples
        with _plain(self._model), torch.no_grad():
            first = self._computed({"input_ids": torch.tensor([samples.first])}, [samples.first])
        with _plain(self._model):
            return first, self._computed({"input_ids": torch.tensor([samples.second])}, [samples.second])

    @functools.cached_property
    def _rounding(self) -> tuple[float, dict[str, float]]:
        """How far rounding carries: the errors of logits and gradients that embeddings of one bit less precision
        cause."""
        samples, second = self._samples, self._alone[1]

        def rounded(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            step = torch.finfo(self._rounded_to or output.dtype).eps
            signs = torch.randint(2, output.shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
            return output * (1 + step * signs.to(output))

        hook = self._model.get_input_embeddings().register_forward_hook(rounded)
        try:
            with _plain(self._model):
                found = self._computed({"input_ids": torch.tensor([samples.second])}, [samples.second])
        finally:
            hook.remove()
        return _typical_error(found.logits[0], second.logits[0]), _errors(found, second)

    def _computed(
        self, inputs: Mapping[str, Any], samples: Sequence[list[int]], places: Sequence[list[int]] = ()
    ) -> _Computed:
        """What the model computes of `samples`, one after the other, or at these `places` of a single row."""
        given = {key: value.to(self._device) if torch.is_tensor(value) else value for key, value in inputs.items()}
        cast = nullcontext() if self._precision is None else torch.autocast(self._device.type, self._precision)
        differentiates = bool(self._trained) and torch.is_grad_enabled()
        with torch.set_grad_enabled(differentiates), cast:
            out = self._model(**given, use_cache=False).logits
        parts, start = [out[0, place] for place in places], 0
        for row, tokens in enumerate([] if places else samples):
            parts.append(out[0, start : start + len(tokens)] if len(out) == 1 else out[row, : len(tokens)])
            start += len(tokens)
        gradients: dict[str, list[torch.Tensor]] = {}
        if differentiates:
            targets = torch.tensor(samples[-1][1:], device=out.device)
            loss = nn.functional.cross_entropy(parts[-1][:-1].float(), targets, reduction="sum")
            found = torch.autograd.grad(loss, [parameter for _, parameter in self._trained], allow_unused=True)
            for (end, parameter), part in zip(self._trained, found, strict=True):
                self._reached |= set() if part is None else {end}
                part = torch.zeros_like(parameter) if part is None else part
                gradients.setdefault(end, []).append(part.flatten().float())
        return _Computed([part.detach() for part in parts], {end: torch.cat(all_) for end, all_ in gradients.items()})


def set_attention(model: Any, name: str) -> bool:
    """Let `model` use the attention `name`; False if it cannot."""
    if name in (VARLEN, UNPACKED):
        hand_over_boundaries(model)
    if upstream_api.attn_implementation(model.config) == name:
        return True
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if upstream_api.attention_is_fixed(type(base)):
        return False
    try:
        base.set_attn_implementation(name)
    except (ImportError, ValueError):
        return False
    return upstream_api.attn_implementation(model.config) == name


@dataclass(frozen=True)
class _Samples:
    """Tokens of two samples, and of one that takes the place of the first."""

    first: list[int]
    second: list[int]
    other: list[int]

    @classmethod
    def of(cls, model: Any) -> _Samples:
        config = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        first, second = _LENGTHS
        if isinstance(positions, int) and positions > 0:
            first, second = min(first, positions), min(second, positions)
        rows, begin = int(config.vocab_size), getattr(config, "bos_token_id", None)
        special = {
            value for name, value in model.config.to_dict().items() if name.endswith(("token_id", "token_index"))
        }
        usual = [token for token in range(rows // 4, max(rows // 2, 16)) if token not in special]
        generator = torch.Generator().manual_seed(0)
        # Without its first token, a pretrained model computes with numbers so large that rounding takes over.
        start = [begin] if isinstance(begin, int) and begin < rows else []

        def sample(length: int) -> list[int]:
            indices = torch.randint(len(usual), (length - len(start),), generator=generator).tolist()
            return [*start, *(usual[index] for index in indices)]

        return cls(sample(first), sample(second), sample(first))


@dataclass(frozen=True)
class _Computed:
    """Logits [tokens, vocabulary] of each sample, and the gradient of the loss of the last one: a vector for each end
    of the names of what is trained."""

    logits: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]


def _batch(collate: Collate, *samples: list[int]) -> dict[str, Any]:
    batch = collate([{"input_ids": tokens, "labels": tokens} for tokens in samples])
    return {key: value for key, value in batch.items() if key != "labels"}


def _end(name: str) -> str:
    """`q_proj` for an adapter on it, and `q_proj.bias` for what has no adapter."""
    module, adapter, _ = name.partition(".lora_")
    return module.rpartition(".")[2] if adapter else ".".join(name.rsplit(".", 2)[-2:])


def _smallest(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, nn.Parameter]]:
    size = 0
    for name, parameter in sorted(parameters, key=lambda pair: pair[1].numel()):
        size += parameter.numel()
        if size > _GRADIENTS:
            return
        yield name, parameter


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference relative to that of `expected`; infinite if a number is not finite."""
    found, expected = found.double(), expected.double()
    return _finite((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _typical_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error of logits [tokens, vocabulary] that three of four tokens stay below.

    A router of experts may send single tokens elsewhere for a difference in rounding.
    """
    found, expected = found.double(), expected.double()
    errors = (found - expected).norm(dim=-1) / expected.norm().clamp(min=1e-30) * math.sqrt(len(expected))
    return _finite(errors.sort().values[len(errors) * 3 // 4] + 0 * errors.sum())


def _errors(found: _Computed, expected: _Computed) -> dict[str, float]:
    """The error of each part of the gradient relative to that part, or to a thousandth of the whole where it is less:
    a part that is zero in theory is rounding alone."""
    least = max(1e-30, 1e-3 * math.hypot(*(float(part.norm()) for part in expected.gradients.values())))
    parts = ((end, found.gradients[end].double(), part.double()) for end, part in expected.gradients.items())
    errors = {end: _finite((ours - part).norm() / part.norm().clamp(min=least)) for end, ours, part in parts}
    return errors or {"": 0.0}


def _finite(error: torch.Tensor) -> float:
    return math.inf if math.isnan(float(error)) else float(error)


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """The model by its plain modules: eager attention, if it is exchangeable, experts one by one, and PEFT's own
    linears."""
    attention, before = upstream_api.attn_implementation(model.config), uses_plain_modules(model)
    set_attention(model, "eager")
    use_plain_modules(model)
    try:
        with eager_experts(model):
            yield
    finally:
        use_plain_modules(model, before)
        set_attention(model, attention)


@contextmanager
def _narrow_windows(model: Any) -> Iterator[None]:
    """Windows of `_WINDOW` tokens, wherever the model has wider ones: masks are made by the configuration, and kernels
    are told by the modules."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    unique = {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}
    owners = [*unique.values(), *model.modules()]
    wide = [
        (vars(owner), name, width)
        for owner in owners
        for name in _WINDOWS
        if isinstance(width := vars(owner).get(name), int) and width > _WINDOW
    ]
    for values, name, _ in wide:
        values[name] = _WINDOW
    try:
        yield
    finally:
        for values, name, width in wide:
            values[name] = width


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode, and trained tensors of zeros (an adapter's B) filled with small numbers, for a while."""
    modes = [(module, module.training) for module in model.modules()]
    zeros = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad and not p.detach().any()]
    generator, device = torch.Generator().manual_seed(1), next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            for parameter, _ in zeros:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            yield
        finally:
            for parameter, before in zeros:
                parameter.data.copy_(before)
            for module, training in modes:
                module.training = training
