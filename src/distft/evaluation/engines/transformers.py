"""Answers of a model that is in this process, by transformers' `generate`, in batches of about one length."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from distft.config.evaluation import Evaluation
from distft.data.batch_plan import batches_by_length
from distft.distributed.process import say_once
from distft.errors import MissingExtraError, ModelError, OutOfMemory
from distft.evaluation.engines.vllm import RANKS, VllmEngine
from distft.evaluation.generate import (
    Answer,
    Engine,
    Item,
    Message,
    Sampling,
    Template,
    item_seed,
    rendered,
    template_of,
    token_ids,
)
from distft.evaluation.target import SideName, Target
from distft.models.loading import model_path


def engine_of(target: Target, settings: Evaluation, side: SideName) -> Engine:
    """What writes the answers of `side`; to be used within `target.side(side)`.

    The template is the tokenizer's chat template; without one, the one that the recipe trained with: Dolly's, or none where its prompts
    are used as they are. `auto` takes vLLM where it is installed and nothing speaks against it.

    Raises:
        MissingExtraError: vLLM is asked for and not installed.
        ModelError: vLLM is asked for and cannot write what this target would.
    """
    form, wanted = target.recipe.data.format, settings.generation.engine
    template = template_of(target.tokenizer, "plain" if form is not None and form.prompt else "instruction")
    identity = {"weights": target.identity[side]}
    installed = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" or (wanted == "auto" and installed):
        if not installed:
            raise MissingExtraError("answers by evaluation.generation.engine=vllm", "vllm", "vllm")
        against = against_vllm(target)
        if against is None:
            return VllmEngine(
                _for_vllm(target, side), target.tokenizer, identity, template=template, device=target.device.index or 0,
                ends=_ends(target.model, target.tokenizer), positions=_positions(target.model),
            )  # fmt: skip
        if wanted == "vllm":
            raise ModelError(
                f"vLLM cannot write these answers: {against}; set evaluation.generation.engine=transformers"
            )
        say_once(f"answers come from transformers, not vLLM: {against}", target.world, os.environ)
    return TransformersEngine(
        target.model, target.tokenizer, identity, batch_tokens=settings.generation.batch_tokens, template=template
    )


def against_vllm(target: Target) -> str | None:
    """Why vLLM would not write what the model in this process does, or could not; None where nothing speaks against it."""
    if target.device.type != "cuda":
        return "there is no GPU"
    section = target.recipe.quantization
    if section is not None and section.is_quantized:
        return "it does not quantise the base as it was trained"
    if target.result is not None and target.is_adapter:
        adapter = json.loads((target.result / "adapter_config.json").read_text(encoding="utf-8"))
        for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"):
            if adapter.get(key):
                return f"it does not take an adapter with {key}"
        if adapter.get("r", 0) > max(RANKS):
            return f"it takes adapters up to rank {max(RANKS)}"
    return None


def _for_vllm(target: Target, side: SideName) -> dict[str, Any]:
    """What `vllm_worker` loads for `side`."""
    recipe, trained = target.recipe.model, side == "adapter"
    whole = trained and not target.is_adapter
    adapter = str(target.result) if trained and target.is_adapter else None
    rank = (
        0 if adapter is None else json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    )
    return {
        "model": str(target.result) if whole else model_path(target.recipe), "revision": None if whole else recipe.revision,
        "dtype": recipe.dtype, "trust_remote_code": recipe.trust_remote_code, "adapter": adapter,
        "max_lora_rank": next(size for size in RANKS if size >= rank),
    }  # fmt: skip


class TransformersEngine:
    """`model.generate` in batches of about one length.

    `template` makes the prompts. `batch_tokens` bounds what a batch may come to: its items times the longest prompt and what may be written. Greedy or sampled, generation settings that come with the model (a
    repetition penalty, say) are left out: only `Sampling` counts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        identity: Mapping[str, Any],
        *,
        batch_tokens: int,
        template: Template,
    ) -> None:
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.template: Template = template
        self._identity = {**identity, "engine": "transformers", "template": template}
        self._ends = _ends(model, tokenizer)
        self._positions = _positions(model)

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def prompt(self, messages: Sequence[Message]) -> str:
        return rendered(self.tokenizer, self.template, messages)

    def write(self, items: Sequence[Item]) -> Iterator[tuple[int, Answer]]:
        """Raises:
        OutOfMemory: a single item does not fit on the device.
        """
        prompts = [self.prompt(item.messages) for item in items]
        ids = [self._ids(prompt) for prompt in prompts]
        limits = [min(item.sampling.max_new_tokens, self._room(one)) for item, one in zip(items, ids, strict=True)]
        yield from ((index, Answer("", 0, False)) for index, limit in enumerate(limits) if limit < 1)
        groups: dict[tuple[float, float, int], list[int]] = {}
        for index, (item, limit) in enumerate(zip(items, limits, strict=True)):
            if limit > 0:
                groups.setdefault((item.sampling.temperature, item.sampling.top_p, limit), []).append(index)
        for (_, _, limit), members in groups.items():
            for places in batches_by_length([len(ids[index]) + limit for index in members], self.batch_tokens):
                batch = [members[place] for place in places]
                seeds = [item_seed(items[index].sampling, prompts[index]) for index in batch]
                written = self._write([ids[index] for index in batch], items[batch[0]].sampling, limit, seeds)
                yield from zip(batch, written, strict=True)

    def _ids(self, prompt: str) -> list[int]:
        return token_ids(self.tokenizer, self.template, prompt)

    def _room(self, ids: list[int]) -> int:
        return 2**31 if self._positions is None else int(self._positions) - len(ids)

    def _write(self, ids: list[list[int]], sampling: Sampling, limit: int, seeds: list[int]) -> list[Answer]:
        """The answers to one batch; in two halves where it does not fit on the device."""
        try:
            return self._generate(ids, sampling, limit, seeds)
        except torch.OutOfMemoryError as error:
            if len(ids) == 1:
                raise OutOfMemory(
                    f"the device's memory does not hold the model and one prompt of {len(ids[0])} tokens with {limit} to write; "
                    "lower evaluation.generation.max_new_tokens, or quantise the model",
                    {}, restart=False,
                ) from error  # fmt: skip
        torch.cuda.empty_cache()
        half = len(ids) // 2
        return [
            answer
            for part in (slice(half), slice(half, None))
            for answer in self._write(ids[part], sampling, limit, seeds[part])
        ]

    @torch.no_grad()
    def _generate(self, ids: list[list[int]], sampling: Sampling, limit: int, seeds: list[int]) -> list[Answer]:
        device = self.model.get_input_embeddings().weight.device
        width = max(map(len, ids))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self._ends[0]
        tokens = torch.tensor([[pad] * (width - len(one)) + one for one in ids], device=device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids], device=device)
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(sampling.top_p))
            processors.append(_Draw(seeds, device))
        config = GenerationConfig(
            do_sample=False, max_new_tokens=limit, eos_token_id=self._ends, pad_token_id=pad, use_cache=True
        )
        with _only_our_settings(self.model), _evaluating(self.model):
            output = self.model.generate(
                input_ids=tokens, attention_mask=mask, generation_config=config, logits_processor=processors
            )
        return [self._answer(row) for row in output[:, width:].tolist()]

    def _answer(self, row: list[int]) -> Answer:
        end = next((place for place, token in enumerate(row) if token in self._ends), None)
        written = row[:end]
        return Answer(self.tokenizer.decode(written, skip_special_tokens=True), len(written), end is not None)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Makes the likeliest token a sampled one: log p less the logarithm of an exponential variate is largest at a token with the
    probability p (the Gumbel-max trick). Every row draws from a stream of its own, so that no row depends on another."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = torch.empty_like(scores, dtype=torch.float32)
        for row, stream in zip(drawn, self.streams, strict=True):
            row.exponential_(generator=stream)
        return scores.float() - drawn.clamp_min(torch.finfo(torch.float32).tiny).log()


def _positions(model: Any) -> int | None:
    """The longest sequence that the model has positions for; None where it says none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model's own settings name (the end of a turn)."""
    named = getattr(model.generation_config, "eos_token_id", None)
    extra = named if isinstance(named, list) else [] if named is None else [named]
    return list(dict.fromkeys([tokenizer.eos_token_id, *extra]))


@contextmanager
def _only_our_settings(model: Any) -> Iterator[None]:
    """`generate` fills what its caller has not set from `model.generation_config`, with no way to say no."""
    owners = [module for module in (model, getattr(model, "base_model", None), _inner(model)) if module is not None]
    owners = [module for module in owners if "generation_config" in vars(module)]
    kept = [module.generation_config for module in owners]
    for module in owners:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in zip(owners, kept, strict=True):
            module.generation_config = config


def _inner(model: Any) -> Any:
    """What PEFT has wrapped, or None."""
    return model.get_base_model() if hasattr(model, "get_base_model") else None


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off; the caller's mode comes back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
