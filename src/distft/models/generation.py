"""How a model writes, and the tokens at which it stops: those of its own settings, and the end of a turn that it was
trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from distft import upstream_api
from distft.models.attention import for_generation

_FILE = "generation_config.json"


def stop_tokens(model: Any) -> list[int]:
    """The tokens that end what `model` generates."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return list(named) if isinstance(named, list | tuple) else [] if named is None else [named]


def end_answers_at(model: Any, tokens: Sequence[int]) -> None:
    """Have `model` also stop at `tokens`, which is saved with it."""
    known = stop_tokens(model)
    if new := [token for token in dict.fromkeys(tokens) if token not in known]:
        model.generation_config.eos_token_id = [*known, *new]


def save_stop_tokens(model: Any, folder: Path) -> None:
    """Write the tokens at which `model` stops beside an adapter, where a whole model has its settings."""
    if not (folder / _FILE).exists() and (tokens := stop_tokens(model)):
        GenerationConfig(eos_token_id=tokens).save_pretrained(str(folder))


def read_stop_tokens(model: Any, folder: Path) -> None:
    """Have `model` stop where the adapter in `folder` was trained to."""
    if (folder / _FILE).is_file():
        end_answers_at(model, stop_tokens(_Saved(folder)))


class _Saved:
    def __init__(self, folder: Path) -> None:
        self.generation_config = GenerationConfig.from_pretrained(str(folder))


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those in the model's generation settings (the end of a
    turn)."""
    return list(dict.fromkeys([tokenizer.eos_token_id, *stop_tokens(model)]))


@torch.no_grad()
def write(
    model: Any, prompts: Sequence[Sequence[int]], limit: int, ends: Sequence[int], pad: int | None, **options: Any
) -> list[list[int]]:
    """The tokens that `model` writes after each prompt, `limit` at most, by greedy decoding; `options` for `generate`
    may change that. A row is filled up after one of the tokens that end it (`ends`).

    Settings that come with the model, such as a repetition penalty, are ignored. Dropout is off.
    """
    device = model.get_input_embeddings().weight.device
    width, pad = max(map(len, prompts)), ends[0] if pad is None else pad
    tokens = torch.tensor([[pad] * (width - len(one)) + [*one] for one in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=limit, eos_token_id=list(ends), pad_token_id=pad, use_cache=True
    )
    with _without_settings(model), _evaluating(model), _with_padding(model):
        output = model.generate(input_ids=tokens, attention_mask=mask, generation_config=config, **options)
    written: list[list[int]] = output[:, width:].tolist()
    return written


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """Hide `model.generation_config`, from which `generate` fills everything that its caller leaves unset."""
    inner = _inner(model)
    owners = [module for module in (model, getattr(model, "base_model", None), inner) if module is not None]
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
    """What PEFT wraps, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Turn dropout off, and restore the caller's mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _with_padding(model: Any) -> Iterator[None]:
    """Compute attention in a way that knows padding and a cache, where the model is trained in one for packs alone."""
    inner = _inner(model)
    before = upstream_api.attn_implementation(inner.config)
    other = for_generation(inner.config, before)
    if other == before:
        yield
        return
    inner.set_attn_implementation(other)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
