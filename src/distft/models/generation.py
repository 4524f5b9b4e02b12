"""The tokens at which a model stops: those of its own settings, and the end of a turn that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

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
