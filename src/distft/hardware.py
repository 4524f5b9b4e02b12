"""The machine this process runs on: its GPU's rate and energy counter, the versions installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from distft.gpus import device

GIB = 2**30


def device_flops() -> float | None:
    """Dense bf16 FLOP/s of this process's GPU; None where there is none or it is not known."""
    if not torch.cuda.is_available():
        return None
    known = device(torch.cuda.get_device_name())
    return known.dense_bf16_tflops * 1e12 if known else None


def limit_gpu(limit_gib: float | None) -> None:
    """Let PyTorch's allocator fail in this process beyond so many GiB, as on a smaller GPU. Nothing without a GPU or a limit."""
    if limit_gib is not None and torch.cuda.is_available():
        device = torch.cuda.current_device()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(limit_gib * GIB / total, 1.0), device)


class EnergyMeter:
    """Joules that this process's GPU has used, from NVML's counter (nvmlDeviceGetTotalEnergyConsumption, in mJ); None where there
    is no such counter. It counts the whole device, whoever uses it."""

    def __init__(self) -> None:
        self._device: Any = None
        if torch.cuda.is_available():
            import pynvml

            try:
                pynvml.nvmlInit()
                self._device = pynvml.nvmlDeviceGetHandleByUUID(
                    f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
                )
                pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
            except pynvml.NVMLError:
                self._device = None
        self._start = self._read()

    def _read(self) -> float | None:
        if self._device is None:
            return None
        import pynvml

        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3

    def joules(self) -> float | None:
        """Since construction, in J."""
        now = self._read()
        return None if now is None or self._start is None else now - self._start

    def idle_watts(self, seconds: float = 1.0) -> float | None:
        """What the device draws with nothing to do but to hold what is loaded, measured over `seconds` in which this process waits."""
        if self._device is None:
            return None
        torch.cuda.synchronize()
        before, began = self._read(), time.perf_counter()
        time.sleep(seconds)
        after = self._read()
        if before is None or after is None:
            return None
        return (after - before) / (time.perf_counter() - began)


PACKAGES = (
    "distft",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "wandb",
)


def describe() -> dict[str, Any]:
    """Versions, hardware and command of this process, for `environment.json`. Holds no value of an environment variable."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "working_folder": str(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "memory_gib": psutil.virtual_memory().total / GIB,
        "gpus": [{"name": gpu.name, "memory_gib": gpu.total_memory / GIB} for gpu in gpus],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
