"""Weights that come from memory instead of a disk: every process draws them on its device in the model's type, and the
loader quantises them one by one. Writing and reading a model of 7B parameters takes longer than measuring it."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distft.hardware import GIB


def device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one process at a time load on this GPU: while it does, the weights are there twice."""
    rank, visible = int(os.environ.get("LOCAL_RANK", 0)), os.environ.get("CUDA_VISIBLE_DEVICES")
    number = visible.split(",")[rank] if visible else rank
    with Path(tempfile.gettempdir(), f"distft-load-{number}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load(config: Any, **options: Any) -> Any:
    """The model of this configuration with random weights (seed 0); `options` are those of `from_pretrained`."""
    with one_at_a_time():
        return _load(config, options)


def _load(config: Any, options: dict[str, Any]) -> Any:
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    with torch.device(device()):
        torch.manual_seed(0)
        state = kind._from_config(config, dtype=options["dtype"]).state_dict()
    unused = ("revision", "trust_remote_code", "use_safetensors")
    kept = {key: value for key, value in options.items() if key not in unused}
    made = kind.from_pretrained(None, config=config, state_dict=state, **kept)
    state.clear()
    if torch.cuda.is_available():
        print(f"peak memory of the load with {device()}: {torch.cuda.max_memory_allocated() / GIB:.1f} GiB", flush=True)
        torch.cuda.empty_cache()
    return made


def for_runs() -> None:
    """Let the runs of this process load the configuration of their model, and draw its weights."""
    from distft.models import loading

    from_disk = loading.from_pretrained

    def from_memory(cls: Any, name: str, what: str, **options: Any) -> Any:
        if cls is not AutoModelForCausalLM:
            return from_disk(cls, name, what, **options)
        return load(from_disk(AutoConfig, name, what), **options)

    loading.from_pretrained = from_memory
