"""Merge an adapter into its base tensor by tensor, from the base's files to new ones: about one shard is in memory.

Each module with an adapter is built alone, and PEFT merges it. What cannot be merged in this way is named by
`obstacle`; `distft.models.export.merge` does it with the whole model in memory.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig

from distft.config.recipe import Recipe
from distft.errors import ModelError
from distft.files import share
from distft.models.generation import end_answers_at, read_stop_tokens
from distft.models.loading import load_tokenizer, model_path, quantization_config, stored_method
from distft.models.locations import local_folder
from distft.models.saved_adapter import SavedAdapter
from distft.models.skeleton import Skeleton
from distft.text import shorten

SHARD_BYTES = 2 << 30
"""A shard that is written has at most so many bytes, or one tensor."""
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_LORA = (".lora_A.", ".lora_B.", ".lora_magnitude_vector")
_PREFIX = "base_model.model."


class ShardedMerge:
    """The merge of the adapter in a folder into the base of `recipe`.

    Raises:
        ModelError: the base or the adapter cannot be read.
    """

    def __init__(self, recipe: Recipe, adapter: Path) -> None:
        self.recipe, self.adapter = recipe, adapter
        self.saved = SavedAdapter.read(adapter)
        self.skeleton = Skeleton.of(recipe)
        self.files = _files_of(recipe)
        """The file of each of the base's tensors, by the tensor's name."""
        self.tensors = _by_module(self.saved.tensors)
        self.dtype: torch.dtype = getattr(torch, recipe.model.dtype)

    def obstacle(self) -> str | None:
        """Why tensors cannot be merged one by one; None if they can."""
        linears = {name: each for name, each in self.skeleton.model.named_modules() if isinstance(each, nn.Linear)}
        if not self.files:
            return "the base's weights are not in safetensors files"
        if method := stored_method(self.skeleton.config):
            return f"the base's weights are stored in {method}"
        if self.recipe.model.resize_embeddings:
            return "the embedding was resized"
        others = sorted(name for name in self.saved.tensors if not any(part in name for part in _LORA))
        if others:
            return f"the adapter has more than LoRA's factors: {shorten(others, 2)}"
        if lacking := sorted(set(self.tensors) - set(linears)):
            return f"adapters on modules that are not linear: {shorten(lacking, 2)}"
        if lacking := sorted(name for name in self.tensors if f"{name}.weight" not in self.files):
            return f"the base's files name its modules differently: {shorten(lacking, 2)}"
        if tied := sorted(name for name in self.tensors if linears[name] is self._tied_head()):
            return f"{tied[0]} shares its weight with the embedding"
        if self.recipe.bits == 8:
            return "the base was quantised to 8 bits"
        if self.recipe.bits == 4 and any(parameter.ndim == 3 for parameter in self.skeleton.model.parameters()):
            return "experts were quantised to 4 bits"
        return None

    def _tied_head(self) -> Any:
        model = self.skeleton.model
        head, rows = model.get_output_embeddings(), model.get_input_embeddings()
        return head if head is not None and head.weight is rows.weight else None

    def write(self, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Write the merged model to the folder `target`, which exists.

        Raises:
            ModelError: PEFT cannot merge the adapter, or it does not fit.
        """
        packed = self._packed_modules()
        writer = _Writer(target, shard_bytes)
        for name, tensor in self._base_tensors():
            module = name.removesuffix(".weight")
            if module in packed:
                tensor = self._as_trained(tensor)
            tensor = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            if f"{module}.weight" == name and module in self.tensors:
                tensor = self._merged(module, tensor)
            writer.add(name, tensor)
        writer.close()
        self._write_settings(target)
        share(target)

    def _base_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in sorted(set(self.files.values())):
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118  # it is no mapping
                    yield name, stored.get_tensor(name)

    def _packed_modules(self) -> set[str]:
        """The modules whose weights training had in 4 bits."""
        settings = quantization_config(self.recipe)
        if settings is None:
            return set()
        from transformers.quantizers import AutoHfQuantizer

        model = Skeleton(self.skeleton.config, self.skeleton.trust_remote_code).model
        before = {name for name, each in model.named_modules() if type(each) is nn.Linear}
        AutoHfQuantizer.from_config(settings).preprocess_model(model=model, dtype=self.dtype, device_map=None)
        return before - {name for name, each in model.named_modules() if type(each) is nn.Linear}

    def _as_trained(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight after the 4 bits of the training."""
        from bitsandbytes import functional

        settings = quantization_config(self.recipe)
        assert settings is not None
        packed, state = functional.quantize_4bit(
            weight.to(self.dtype),
            compress_statistics=settings.bnb_4bit_use_double_quant,
            quant_type=settings.bnb_4bit_quant_type,
        )
        dense: torch.Tensor = functional.dequantize_4bit(packed, state)
        return dense

    def _merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of the linear module `name` with its adapter merged into it."""
        linear = self.skeleton.model.get_submodule(name)
        alone = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        alone.weight = nn.Parameter(weight.float(), requires_grad=False)  # rounded once, when all is added
        root = _nested(name, alone)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about patterns that are for other modules
                inject_adapter_in_model(self.saved.config, root, "default")
                result = set_peft_model_state_dict(root, self.tensors[name], "default")
            if result.unexpected_keys or (lacking := [key for key in result.missing_keys if ".lora_" in key]):
                raise ValueError(f"{name}: {shorten([*result.unexpected_keys, *lacking], 3)}")
            layer: Any = root.get_submodule(name)
            layer.merge(safe_merge=True)
        except (RuntimeError, ValueError, NotImplementedError, KeyError) as error:
            raise ModelError(f"PEFT cannot merge the adapter of {name}: {error}") from error
        merged: torch.Tensor = layer.base_layer.weight.detach()
        return merged.to(weight.dtype)

    def _write_settings(self, target: Path) -> None:
        config = self.skeleton.config
        config.dtype, config.architectures = self.dtype, [type(self.skeleton.model).__name__]
        config.save_pretrained(str(target))
        holder = _Holder(_generation_config(model_path(self.recipe), self.recipe, config))
        read_stop_tokens(holder, self.adapter)
        end_answers_at(holder, [])
        holder.generation_config.save_pretrained(str(target))
        load_tokenizer(self.recipe).save_pretrained(str(target))


class _Holder:
    """What has a generation config, where functions expect a model."""

    def __init__(self, config: Any) -> None:
        self.generation_config = config


def _generation_config(place: str, recipe: Recipe, config: Any) -> Any:
    try:
        return GenerationConfig.from_pretrained(place, revision=recipe.model.revision)
    except OSError:
        return GenerationConfig.from_model_config(config)


def _files_of(recipe: Recipe) -> dict[str, Path]:
    """The safetensors file of each tensor of the base; {} if it has none."""
    place = model_path(recipe)
    folder = local_folder(place)
    if folder is None:
        from huggingface_hub import snapshot_download

        found = snapshot_download(place, revision=recipe.model.revision, allow_patterns=["*.safetensors", "*.json"])
        folder = Path(found)
    index = folder / _INDEX
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in named.items()}
    single = folder / _SINGLE
    if not single.is_file():
        return {}
    with safe_open(single, "pt") as stored:
        return dict.fromkeys(stored.keys(), single)


def _by_module(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The adapter's tensors by the module of the base that they belong to."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(_PREFIX)
        place = next((inner.find(part) for part in _LORA if part in inner), -1)
        if place >= 0:
            found.setdefault(inner[:place], {})[inner] = tensor
    return found


def _nested(name: str, leaf: nn.Module) -> nn.Module:
    """A module that holds `leaf` under the dotted `name`, so that PEFT's patterns see the name that it has."""
    for part in reversed(name.split(".")):
        parent = nn.Module()
        parent.add_module(part, leaf)
        leaf = parent
    return leaf


class _Writer:
    """Writes tensors to shards of a bounded size, and their index."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.limit = folder, shard_bytes
        self.held: dict[str, torch.Tensor] = {}
        self.shards: list[list[str]] = []
        self.size = self.total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self.size + size > self.limit:
            self._flush()
        self.held[name] = tensor.contiguous()
        self.size += size
        self.total += size

    def _flush(self) -> None:
        save_file(self.held, str(self.folder / f"shard-{len(self.shards):05}"), {"format": "pt"})
        self.shards.append(list(self.held))
        self.held, self.size = {}, 0

    def close(self) -> None:
        if self.held:
            self._flush()
        number = len(self.shards)
        names = [_SINGLE] if number == 1 else [f"model-{at + 1:05}-of-{number:05}.safetensors" for at in range(number)]
        for at, name in enumerate(names):
            (self.folder / f"shard-{at:05}").rename(self.folder / name)
        if number > 1:
            found = {key: name for name, keys in zip(names, self.shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.total}, "weight_map": found}
            (self.folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
