"""What is evaluated: a base and what was trained on it, loaded as it was trained, a whole copy for each process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers.utils.logging import disable_progress_bar

from distft.config.recipe import Recipe
from distft.data.prepare import prepare_data
from distft.distributed.collectives import together
from distft.distributed.world import World
from distft.errors import ModelError
from distft.models.loading import load_base, load_tokenizer, model_path

SideName = Literal["base", "adapter"]


@dataclass
class _Loaded:
    """The model in memory, and which side's weights it has where there is no adapter to turn off."""

    model: Any = None
    side: SideName = "base"


@dataclass(frozen=True)
class Target:
    """A base and its adapter, on this process's device. `result` is the folder of the adapter, or of the whole model where all
    parameters were trained (`is_adapter` is false; it is still called the adapter's side); None for a base alone.

    `identity` names the weights of each side by their content, for the keys of what was made with them.
    """

    recipe: Recipe
    world: World
    tokenizer: Any
    device: torch.device
    result: Path | None
    is_adapter: bool
    identity: dict[SideName, str]
    _loaded: _Loaded = field(default_factory=_Loaded, repr=False)

    @classmethod
    def load(cls, recipe: Recipe, result: Path | None, world: World) -> Target:
        """The base as the recipe loads it (quantised or not, in its type) with the adapter of `result` on it through PEFT, not merged.
        All ranks enter.

        Raises:
            ModelError: the base or the adapter cannot be had, or they do not fit each other.
        """
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        disable_progress_bar()
        tokenizer = together(world, lambda: load_tokenizer(recipe))
        is_adapter = result is not None and (result / "adapter_config.json").is_file()
        base = _digest(model_path(recipe), recipe.model.revision, recipe.model.dtype, recipe.quantization)
        identity: dict[SideName, str] = {"base": base}
        if result is not None:
            identity["adapter"] = _digest(base if is_adapter else "", *_contents(result))
        target = cls(recipe, world, tokenizer, device, result, is_adapter, identity)
        together(world, target._load_first)
        return target

    @property
    def sides(self) -> tuple[SideName, ...]:
        """`base` and `adapter`, or `base` alone."""
        return ("base",) if self.result is None else ("base", "adapter")

    @property
    def model(self) -> Any:
        """The model as it is now: within `side`, that side's."""
        return self._loaded.model

    @contextmanager
    def side(self, name: SideName) -> Iterator[Any]:
        """The model with the adapter on or off, in evaluation mode and without gradients.

        Where all parameters were trained, the other side's weights are loaded in place of those in memory, so take all that needs one
        side before the other.

        Raises:
            ModelError: there is no such side.
        """
        if name not in self.sides:
            raise ModelError(f"there is no {name} to evaluate, only a base; give adapter=FOLDER")
        if not self.is_adapter and self._loaded.side != name:
            self._loaded.model = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._loaded.model, self._loaded.side = self._whole(name), name
        model = self._loaded.model
        with torch.inference_mode(), model.disable_adapter() if self.is_adapter and name == "base" else nullcontext():
            yield model

    def _load_first(self) -> None:
        model = self._whole("base")
        if self.is_adapter:
            try:
                model = PeftModel.from_pretrained(model, str(self.result))
            except (ValueError, RuntimeError) as error:
                raise ModelError(
                    f"the adapter in {self.result} does not fit {self.recipe.model.name}: {error}"
                ) from error
        self._loaded.model = model.eval()

    def _whole(self, name: SideName) -> Any:
        recipe = self.recipe
        if name == "adapter" and not self.is_adapter:
            section = recipe.model.model_copy(update={"name": str(self.result), "revision": None})
            recipe = recipe.model_copy(update={"model": section})
        kernel = recipe.model.attn_implementation
        model = load_base(
            recipe,
            device_map={"": self.device.index or 0} if self.device.type == "cuda" else None,
            attn_implementation=kernel
            if kernel in ("eager", "flash_attention_2")
            else "sdpa",  # batches are padded here
        )
        return model.eval()

    def held_out(self) -> Any:
        """The recipe's prepared held-out rows, None where it has none.

        Raises:
            DataError: the data cannot be had.
        """
        return together(self.world, lambda: prepare_data(self.recipe, self.tokenizer)).test


def _contents(folder: Path) -> Iterator[str]:
    """The hash of every file of weights in `folder`."""
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        with file.open("rb") as stream:
            yield f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}"


def _digest(*parts: Any) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
