"""A digest of model weights, independent of the name of their folder and of how they are split into files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from distft.errors import ModelError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file names that transformers looks for: one file with all tensors, or the index of several."""


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
    place = Path(name)
    if not place.is_dir():
        try:  # without patterns, it would require every file of the repository, even unused ones
            place = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[]))
        except LocalEntryNotFoundError:
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
