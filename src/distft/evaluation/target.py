"""What is evaluated: a base and what was trained on it, loaded as in training, a whole copy on each process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils.logging import disable_progress_bar

from distft.config.recipe import Recipe, load_recipe
from distft.console import say
from distft.data.prepare import prepare_data
from distft.distributed.collectives import broadcast, together
from distft.distributed.world import World
from distft.errors import ModelError
from distft.models.digest import contents
from distft.models.loading import load_base, load_tokenizer, model_path, of_whole_model
from distft.models.saved_adapter import SavedAdapter
from distft.runs.folder import RunFolder

SideName = Literal["base", "adapter"]


@dataclass
class _Loaded:
    """The model in memory, and which side it is."""

    model: Any = None
    side: SideName | None = None
    """None: both sides, because switching the adapter off leaves the base."""


@dataclass(frozen=True)
class Trained:
    """How a model was trained: its run's recipe, without overrides, and the digest of the texts (None if unknown)."""

    recipe: Recipe
    data_digest: str | None = None

    @classmethod
    def by(cls, run: RunFolder | None) -> Trained | None:
        """How `run` trained; None if it is not known which run it was."""
        if run is None:
            return None
        summary = run.read_summary() if run.summary.is_file() else {}
        return cls(load_recipe([f"recipe={run.recipe.absolute()}"]), summary.get("data_digest"))


@dataclass(frozen=True)
class Target:
    """A base and its adapter on this process's device."""

    recipe: Recipe
    world: World
    tokenizer: Any
    device: torch.device
    result: Path | None
    """The folder of the adapter, or of the whole model if all parameters were trained; None for a base alone."""
    is_adapter: bool
    """False if `result` is a whole model. It is the side `adapter` all the same."""
    identity: dict[SideName, str]
    """A digest of each side for cache keys: the content of everything that was loaded for it, and how."""
    trained: Trained | None = None
    """How the evaluated model was trained; None if it is not known."""
    _loaded: _Loaded = field(default_factory=_Loaded, repr=False)

    @classmethod
    def load(
        cls, recipe: Recipe, result: Path | None, world: World, trained: Trained | None = None, *, identify: bool = True
    ) -> Target:
        """Load the base as the recipe does (its dtype, its quantisation), with the adapter on it through PEFT, not
        merged.

        All ranks call this. Without `identify`, nothing is hashed, and `identity` stays empty.

        Raises:
            ModelError: the base or the adapter cannot be loaded, or they do not fit each other.
        """
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        disable_progress_bar()
        tokenizer = together(world, lambda: load_tokenizer(recipe))
        is_adapter = result is not None and (result / "adapter_config.json").is_file()
        identity: dict[SideName, str] = {}
        target = cls(recipe, world, tokenizer, device, result, is_adapter, identity, trained)
        together(world, target._load_first)
        if identify:
            identity |= broadcast(together(world, target._identify), world)
        return target

    @property
    def sides(self) -> tuple[SideName, ...]:
        """`base` and `adapter`, or only `base`."""
        return ("base",) if self.result is None else ("base", "adapter")

    @property
    def model(self) -> Any:
        """The model in memory; within `side`, that side's."""
        return self._loaded.model

    @contextmanager
    def side(self, name: SideName) -> Iterator[Any]:
        """The model with the adapter switched on or off, in evaluation mode and without gradients.

        Without an adapter that can be switched off (all parameters were trained, or the adapter has changed the base's
        own weights), changing sides loads the other model in place of the one in memory: finish with one side before
        the other.

        Raises:
            ModelError: there is no such side.
        """
        if name not in self.sides:
            raise ModelError(f"there is only a base to evaluate, no {name}; give adapter=FOLDER")
        loaded = self._loaded
        if loaded.side not in (None, name):
            loaded.model = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._load(name)
        model = loaded.model
        with (
            torch.inference_mode(),
            model.disable_adapter() if loaded.side is None and name == "base" else nullcontext(),
        ):
            yield model

    def _load(self, name: SideName) -> None:
        loaded = self._loaded
        if name == "base" or not self.is_adapter:
            loaded.model, loaded.side = self._whole(name), name
            return
        assert self.result is not None
        adapter = SavedAdapter.read(self.result)
        loaded.model = adapter.put_on(self._whole("base"), self.recipe.model.name)
        loaded.side = "adapter" if adapter.changes_base(loaded.model) else None

    def _load_first(self) -> None:
        self._load("adapter" if self.is_adapter else "base")
        if self.is_adapter and self.world.is_main:
            assert self.result is not None
            if note := SavedAdapter.read(self.result).base_note(self.recipe):
                say(f"warning: {note}")

    def _identify(self) -> dict[SideName, str]:
        """`identity`, found by rank 0; the others get {}."""
        if not self.world.is_main:
            return {}
        recipe = self.recipe
        how = (recipe.model.dtype, recipe.quantization, tokenizer_digest(self.tokenizer))
        base = contents(model_path(recipe), recipe.model.revision)
        if base is None:  # it has been loaded
            raise ModelError(f"{recipe.model.name} was loaded, but is not in the hub's cache: its content is unknown")
        found: dict[SideName, str] = {"base": _digest(base, *how)}
        if self.result is not None:
            found["adapter"] = _digest(found["base"] if self.is_adapter else how, contents(str(self.result)))
        return found

    def _whole(self, name: SideName) -> Any:
        recipe = self.recipe
        if name == "adapter" and not self.is_adapter:
            assert self.result is not None
            recipe = of_whole_model(recipe, self.result)
        kernel: str | None = recipe.model.attn_implementation
        if kernel not in ("eager", "flash_attention_2"):
            kernel = None  # batches are padded here, unlike in training
        place = {"": self.device.index or 0} if self.device.type == "cuda" else None
        return load_base(recipe, device_map=place, attn_implementation=kernel).eval()

    def held_out(self) -> Any:
        """The recipe's prepared held-out rows, None if it holds out none.

        Raises:
            DataError: the data cannot be loaded.
        """
        return together(self.world, lambda: prepare_data(self.recipe, self.tokenizer)).test


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of what turns text into tokens. Templates are part of the text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return _digest(text, tokenizer.eos_token_id, tokenizer.bos_token_id)


def _digest(*parts: Any) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
