"""Digests of models: of their weights by samples, independent of the name of their folder and of how they are split
into files; and of everything that is loaded, byte by byte."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from distft.errors import ModelError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file names that transformers looks for: one file with all tensors, or the index of several."""

_LOADED = ("adapter_model.*", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""What is loaded besides weights in safetensors files."""
_NOT_LOADED = ("trainer_state.json",)
_READERS = 8


def files(folder: Path) -> set[str]:
    """The weight files that transformers would load from `folder`, whether or not they exist.

    Empty if there is neither a single file nor an index.
    """
    if (folder / WHOLE).is_file():
        return {WHOLE}
    index = folder / INDEX
    return {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()} if index.is_file() else set()


def digest(name: str, revision: str | None = None) -> str | None:
    """A digest (16 hex digits) of the weights of `name`, a folder or a model in the hub's cache.

    It covers the name, type, shape and middle row of every tensor: it takes no longer than opening the files, yet full
    fine-tuning or a merged adapter changes it. None if there are no safetensors files under the usual names, or the
    model is not in the cache.

    Raises:
        ModelError: a file is missing or damaged.
    """
    place = _place(name, revision)
    if place is None:
        return None
    try:
        samples = {key: sample for file in files(place) for key, sample in _samples(place / file).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weights in {place} cannot be read ({error}); download or copy them again") from error
    if not samples:
        return None
    found = hashlib.sha256()
    for key in sorted(samples):
        found.update(key.encode() + samples[key])
    return found.hexdigest()[:16]


def adapter_digest(folder: Path) -> str:
    """A digest (16 hex digits) of every byte of the weights of the adapter in `folder`.

    Raises:
        ModelError: there are none, or they cannot be read.
    """
    try:
        shas = [_sha256(file) for file in sorted(folder.glob("adapter_model.*"))]
    except OSError as error:
        raise ModelError(f"the adapter in {folder} cannot be read: {error}") from error
    if not shas:
        raise ModelError(f"there is no adapter in {folder}")
    return hashlib.sha256("\n".join(shas).encode()).hexdigest()[:16]


def contents(name: str, revision: str | None = None) -> str | None:
    """A digest (16 hex digits) of every byte that is loaded from `name`, a folder with a model, an adapter or a
    tokenizer, or a model in the hub's cache: weights, settings, tokenizer, code.

    Unlike `digest`, it notices a change of a single number. Files are read in parallel, which takes less than loading
    them. None if the model is not in the cache.
    """
    place = _place(name, revision)
    if place is None:
        return None
    weights = {place / file for file in files(place)} or {*place.glob("*.safetensors")}
    found = {file for pattern in _LOADED for file in place.glob(pattern)} | weights
    found = {file for file in found if file.is_file() and file.name not in _NOT_LOADED}
    ordered = sorted(found)
    with ThreadPoolExecutor(_READERS) as pool:
        lines = [f"{file.name} {sha}" for file, sha in zip(ordered, pool.map(_sha256, ordered), strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _place(name: str, revision: str | None) -> Path | None:
    """The folder of a model, if it is one or is in the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    try:  # without patterns, it would require every file of the repository, even unused ones
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[]))
    except (LocalEntryNotFoundError, HFValidationError):  # not in the cache, or a path that is not here
        return None


def _samples(path: Path) -> dict[str, bytes]:
    import torch

    samples = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(key)
            shape = part.get_shape()
            middle = shape[0] // 2 if shape else 0
            row = part[middle : middle + 1] if shape else file.get_tensor(key)
            content = row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            samples[key] = f"{part.get_dtype()}{shape}".encode() + content
    return samples
