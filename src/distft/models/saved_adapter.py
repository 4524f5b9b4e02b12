"""A saved adapter, put on a base: checked against the model, where PEFT alone would leave out what does not fit."""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError

from distft.config.adapter import REWRITES
from distft.config.recipe import Recipe
from distft.console import say
from distft.errors import ModelError
from distft.models.digest import digest
from distft.models.experts import adapt_experts, seen_dense
from distft.models.generation import read_stop_tokens
from distft.models.loading import load_base, model_path, of_whole_model
from distft.text import count, shorten

_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class SavedAdapter:
    """The settings and tensors in the folder of an adapter."""

    folder: Path
    config: Any
    tensors: dict[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> SavedAdapter:
        """Read an adapter from its folder.

        Raises:
            ModelError: there is none, it is damaged, it has values that are no numbers, or it is of a kind that distft
                cannot use.
        """
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"the adapter in {folder} has no usable adapter_config.json: {error}") from error
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ModelError(
                f"the adapter in {folder} is of the type {kind}, which adds tokens to every input; distft uses "
                "adapters that change the modules of the model, such as LORA"
            )
        if not any((folder / name).is_file() for name in _FILES):
            raise ModelError(f"the adapter in {folder} has no weights: neither {' nor '.join(_FILES)}")
        try:
            tensors = load_peft_weights(str(folder), device="cpu")
        except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ModelError(f"the weights of the adapter in {folder} are damaged: {error}") from error
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise ModelError(
                f"the adapter in {folder} has NaN or infinite values in {len(broken)} of "
                f"{count(len(tensors), 'tensor')}: {shorten(sorted(broken), 3)}"
            )
        return cls(folder, config, tensors)

    def put_on(self, base: Any, name: str) -> PeftModel:
        """The adapter on `base`, in evaluation mode. `name` is the base's, for messages.

        Raises:
            ModelError: tensors are missing, unknown, or of another shape.
        """
        cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(self.config.task_type, PeftModel)
        self.config.inference_mode = True
        read_stop_tokens(base, self.folder)
        rows = base.get_input_embeddings().weight.shape[0]
        try:
            with warnings.catch_warnings(), seen_dense(base):
                warnings.simplefilter("ignore")  # about what is checked here
                model = cls(base, self.config, "default")
                adapt_experts(model)
                expected = _tensors_of(model)
                if lost := [name for name in expected - set(self.tensors) if ".lora_" not in name]:
                    raise self._misfit(name, lost, [], len(expected))  # PEFT stops at the first with a KeyError
                result = model.load_adapter(str(self.folder), "default", torch_device="cpu")
        except IndexError as error:  # trained rows that the embedding lacks
            raise ModelError(
                f"the adapter in {self.folder} trained rows of the embedding that {name}, with {rows:,}, lacks; it was "
                "trained with model.resize_embeddings=true"
            ) from error
        except (ValueError, TypeError, RuntimeError) as error:
            lines = [line.strip() for line in str(error).splitlines()]
            first = next((line for line in lines if line.startswith("size mismatch")), lines[0] if lines else "")
            raise ModelError(f"the adapter in {self.folder} does not fit {name}: {first}") from error
        if result.missing_keys or result.unexpected_keys:
            raise self._misfit(name, result.missing_keys, result.unexpected_keys, len(expected))
        return model.eval()

    def start(self, model: PeftModel, name: str) -> None:
        """Give the adapter of `model`, which is still whole on every rank, these values to train on from. `name` is the
        base's, for messages.

        Raises:
            ModelError: tensors are missing, unknown, or of another shape.
        """
        self.require_fit(model, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what has been checked
            set_peft_model_state_dict(model, dict(self.tensors), "default")

    def require_fit(self, model: PeftModel, name: str) -> None:
        """Check that `model`, which may be without values, has an adapter of the same tensors.

        Raises:
            ModelError: tensors are missing, unknown, or of another shape.
        """
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        missing, unknown = sorted(expected.keys() - self.tensors), sorted(self.tensors.keys() - expected)
        if missing or unknown:
            raise self._misfit(name, missing, unknown, len(expected))
        for key, tensor in self.tensors.items():
            if tensor.shape != expected[key].shape:
                found, wanted = (" × ".join(map(str, shape)) for shape in (tensor.shape, expected[key].shape))
                problem = f"{key} has the shape {found}, and the model's is {wanted}"
                raise ModelError(f"the adapter in {self.folder} does not fit {name}: {problem}")

    def _misfit(self, name: str, missing: list[str], unknown: list[str], expected: int) -> ModelError:
        parts = [
            *([f"missing: {shorten(sorted(missing), 3)}"] if missing else []),
            *([f"unknown: {shorten(sorted(unknown), 3)}"] if unknown else []),
        ]
        return ModelError(
            f"the adapter in {self.folder} does not fit {name}: {len(missing):,} of {expected:,} adapter tensors are "
            f"missing, {len(unknown):,} are unknown ({'; '.join(parts)})"
        )

    def changes_base(self, model: PeftModel) -> bool:
        """Whether the adapter, as `put_on` has put it on `model`, has also changed the base's own weights, so that
        switching it off does not bring the base back."""
        init = str(getattr(self.config, "init_lora_weights", True)).lower()
        biases = getattr(self.config, "bias", "none") != "none"
        return init.startswith(REWRITES) or biases or bool(set(self.tensors) - _tensors_of(model))

    def base_note(self, recipe: Recipe) -> str | None:
        """A sentence about a base other than the one that the adapter was trained on; None if it is the same.

        Weights are compared by their digest where both are known, else by the name of their place.
        """
        named, place = getattr(self.config, "base_model_name_or_path", None), model_path(recipe)
        theirs, ours = self._base_digests(recipe)
        if theirs is not None and ours is not None:
            if theirs == ours:
                return None
            where = "" if named in (None, place) else f" ({named})"
            return (
                f"the adapter in {self.folder} was trained on other weights{where} than those of {recipe.model.name}: "
                f"digest {theirs}, here {ours}"
            )
        if not named or named == place:
            return None
        return f"the adapter in {self.folder} names {named} as its base, and is put on {recipe.model.name}"

    def is_of_other_base(self, recipe: Recipe) -> bool:
        """Whether the adapter is known to have been trained on other weights than those of the recipe's base."""
        theirs, ours = self._base_digests(recipe)
        return theirs is not None and ours is not None and theirs != ours

    def _base_digests(self, recipe: Recipe) -> tuple[str | None, str | None]:
        """The digests of the base that the adapter was trained on, and of the recipe's, as far as they are known."""
        named = getattr(self.config, "base_model_name_or_path", None)
        theirs = self._trained_on() or (digest(named) if named else None)
        return theirs, digest(model_path(recipe), recipe.model.revision)

    def _trained_on(self) -> str | None:
        """The digest of the base's weights in the summary of the run that the adapter is part of."""
        summary = self.folder.absolute().parent / "summary.json"
        try:
            found = json.loads(summary.read_text(encoding="utf-8")).get("weights_digest")
        except (OSError, ValueError, AttributeError):
            return None
        return found if isinstance(found, str) else None


def load_trained(recipe: Recipe, result: Path) -> Any:
    """The model that a run trained, in evaluation mode and with its cache on: the base with the adapter in `result` on
    it, or the whole model in `result`; on the first GPU if there is one.

    Raises:
        ModelError: the base or the adapter cannot be loaded, or they do not fit each other.
    """
    device_map = {"": 0} if torch.cuda.is_available() else None
    kernel = recipe.model.attn_implementation
    implementation = kernel if kernel in ("eager", "flash_attention_2") else None  # the others take packs only
    if not (result / "adapter_config.json").is_file():
        recipe = of_whole_model(recipe, result)
        return load_base(recipe, device_map=device_map, attn_implementation=implementation).eval()
    adapter = SavedAdapter.read(result)
    if note := adapter.base_note(recipe):
        say(f"warning: {note}")
    base = load_base(recipe, device_map=device_map, attn_implementation=implementation)
    return adapter.put_on(base, recipe.model.name)


def _tensors_of(model: PeftModel) -> set[str]:
    """The names of the adapter's tensors, as its file has them."""
    return set(get_peft_model_state_dict(model, save_embedding_layers=False))
