"""The machine this process runs on: peak rates and energy counter of its GPU, and the installed versions.

Imports torch inside the functions that need it, so that reports can look up peak rates without it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from distft.text import redacted

GIB = 2**30


@dataclass(frozen=True)
class PeakRates:
    """Dense bf16 matrix products in TFLOP/s (1e12) and memory bandwidth in TB/s (1e12 bytes)."""

    dense_bf16_tflops: float
    memory_tb_per_s: float

    @property
    def ridge_flops_per_byte(self) -> float:
        """Arithmetic intensity above which a kernel is bound by arithmetic, not by memory: the ridge point of the
        roofline model (Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785)."""
        return self.dense_bf16_tflops / self.memory_tb_per_s


# From the vendors' data sheets, except the H200's bf16 rate: measured on an 8192 × 8192 × 8192 product.
# The first name that the driver's name contains applies, so variants precede the plain model.
_PEAK_RATES = {
    "H200": PeakRates(790.0, 4.8),
    "H100 PCIe": PeakRates(756.0, 2.0),
    "H100 NVL": PeakRates(835.0, 3.9),
    "H100": PeakRates(989.0, 3.35),  # SXM
    "A100-SXM4-80GB": PeakRates(312.0, 2.039),
    "A100 80GB PCIe": PeakRates(312.0, 1.935),
    "A100": PeakRates(312.0, 1.555),  # 40 GB
    "L40S": PeakRates(362.0, 0.864),
    "L4": PeakRates(121.0, 0.3),
    "A10G": PeakRates(70.0, 0.6),
    "RTX 4090": PeakRates(165.2, 1.008),  # with fp32 accumulation
    "RTX 3090": PeakRates(71.0, 0.936),  # with fp32 accumulation
}


def peak_rates(gpu: str) -> PeakRates | None:
    """Peak rates of the GPU with the driver's name `gpu`; None if the table does not list it."""
    return next((rates for name, rates in _PEAK_RATES.items() if name in gpu), None)


def visible_devices() -> int:
    """Number of CUDA devices that this process could use, without initialising CUDA."""
    import torch

    return torch.cuda.device_count()


def device_flops() -> float | None:
    """Dense bf16 FLOP/s of this process's GPU; None without a GPU or for an unknown one."""
    import torch

    if not torch.cuda.is_available():
        return None
    rates = peak_rates(torch.cuda.get_device_name())
    return rates.dense_bf16_tflops * 1e12 if rates else None


def limit_gpu(limit_gib: float | None) -> None:
    """Make PyTorch's allocator fail beyond `limit_gib` GiB, as on a smaller GPU. Does nothing without a GPU or a
    limit."""
    import torch

    if limit_gib is not None and torch.cuda.is_available():
        device = torch.cuda.current_device()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(limit_gib * GIB / total, 1.0), device)


class EnergyMeter:
    """Energy in J that this process's GPU has drawn since construction, from NVML's counter
    (nvmlDeviceGetTotalEnergyConsumption, in mJ); None without such a counter. It covers the whole device, including
    what other processes draw."""

    def __init__(self) -> None:
        import torch

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
        """Energy in J since construction."""
        now = self._read()
        return None if now is None or self._start is None else now - self._start

    def idle_watts(self, seconds: float = 1.0) -> float | None:
        """Power in W that the device draws while idle with the model loaded; measuring it blocks for `seconds`."""
        if self._device is None:
            return None
        import torch

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
    """Versions, hardware and command line of this process, for `environment.json`, but no environment
    variables."""
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "command": list(map(redacted, sys.argv)),
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
