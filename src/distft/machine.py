"""The machine this process runs on: its GPU's rate and energy counter, the versions installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

GIB = 2**30

# Dense bf16 rate of a device in TFLOP/s: by a large matrix product where it says so, else the vendor's data sheet.
DENSE_BF16_TFLOPS = {
    "H200": 790.0,  # measured, 8192 × 8192 × 8192
    "H100 PCIe": 756.0,  # NVIDIA H100 data sheet, PCIe
    "H100 NVL": 835.0,  # NVIDIA H100 data sheet, NVL
    "H100": 989.0,  # NVIDIA H100 data sheet, SXM
    "A100": 312.0,  # NVIDIA A100 data sheet
    "L40S": 362.0,  # NVIDIA L40S data sheet
    "L4": 121.0,  # NVIDIA L4 data sheet
    "A10G": 70.0,  # NVIDIA A10G data sheet
    "RTX 4090": 165.2,  # NVIDIA Ada architecture paper, fp32 accumulation
    "RTX 3090": 71.0,  # NVIDIA Ampere GA102 paper, fp32 accumulation
}


def device_flops() -> float | None:
    """Dense bf16 FLOP/s of this process's GPU; None where there is none or it is not in the table."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((rate * 1e12 for known, rate in DENSE_BF16_TFLOPS.items() if known in name), None)


def limit_gpu(limit_gib: float | None) -> None:
    """Let PyTorch's allocator fail in this process beyond so many GiB, as on a smaller GPU. Nothing without a GPU or a limit."""
    if limit_gib is not None and torch.cuda.is_available():
        device = torch.cuda.current_device()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(limit_gib * GIB / total, 1.0), device)


class EnergyMeter:
    """Joules that this process's GPU has used, from NVML's counter; None where there is no such counter."""

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
