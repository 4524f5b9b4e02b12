"""A base model without weights: its configuration, and its modules on the meta device."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distft.config.recipe import Recipe
from distft.errors import ModelError
from distft.models.loading import from_pretrained, model_path
from distft.models.tiny import tiny_config
from distft.text import first_line


@dataclass(frozen=True)
class Skeleton:
    """A base's configuration, and what follows from it."""

    config: Any
    trust_remote_code: bool = False

    @classmethod
    def of(cls, recipe: Recipe, *, local_only: bool = False) -> Skeleton:
        """Read the configuration of the recipe's base model: config.json alone.

        Raises:
            ModelError: it is not available (`local_only`: not in the cache).
        """
        section = recipe.model
        if section.name == "tiny":
            config = tiny_config()  # the folder may have to be built first, which trains it
        else:
            config = from_pretrained(
                AutoConfig,
                model_path(recipe),
                "model",
                revision=section.revision,
                trust_remote_code=section.trust_remote_code,
                local_files_only=local_only,
            )
        return cls(config, section.trust_remote_code)

    @cached_property
    def model(self) -> Any:
        """The base's modules, whose parameters have shapes but no values.

        Raises:
            ModelError: it is no causal language model.
        """
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real model will say the same
            try:
                return AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.trust_remote_code)
            except ValueError as error:
                kind = getattr(self.config, "model_type", type(self.config).__name__)
                raise ModelError(f"a {kind} model is no causal language model: {first_line(error)}") from error

    @property
    def embedding_rows(self) -> int:
        """Rows of the input embeddings: a token with a higher ID does not exist for the model."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def positions(self) -> int | None:
        """Positions that the model was built for; None if its configuration does not say."""
        found = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def has_learned_positions(self) -> bool:
        """Whether each position has a learned vector (GPT-2, OPT), so that the model has none beyond the last."""
        tokens = self.model.get_input_embeddings()
        return any(
            isinstance(module, torch.nn.Embedding)
            and module is not tokens
            and (name.endswith("wpe") or "position" in name)
            for name, module in self.model.named_modules()
        )
