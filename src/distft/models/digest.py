"""Which weights a run starts from, whatever their folder is called and however many files they lie in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The files that transformers looks for: all tensors, or which file has which tensor."""


def files(folder: Path) -> set[str]:
    """The files in `folder` that transformers would load weights from, there or not; empty where nothing says which."""
    if (folder / WHOLE).is_file():
        return {WHOLE}
    index = folder / INDEX
    return {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()} if index.is_file() else set()


def digest(name: str, revision: str | None = None) -> str | None:
    """16 hex digits of the weights of `name`, a folder or a model in the hub's cache: of every tensor's name, type, shape and middle row, so that
    it takes no longer than opening the files, and that any training of all weights, or an adapter merged into them, changes it. None where
    there are no safetensors under the usual names, or the cache says no more where they are."""
    place = Path(name)
    if not place.is_dir():
        try:  # without patterns it would ask for every file of the repository, also those that nobody loads
            place = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[]))
        except LocalEntryNotFoundError:
            return None
    samples = {key: sample for file in files(place) for key, sample in _samples(place / file).items()}
    if not samples:
        return None
    found = hashlib.sha256()
    for key in sorted(samples):
        found.update(key.encode() + samples[key])
    return found.hexdigest()[:16]


def _samples(path: Path) -> dict[str, bytes]:
    samples = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            part = file.get_slice(key)
            shape = part.get_shape()
            middle = shape[0] // 2 if shape else 0
            row = part[middle : middle + 1] if shape else file.get_tensor(key)
            content = row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            samples[key] = f"{part.get_dtype()}{shape}".encode() + content
    return samples
