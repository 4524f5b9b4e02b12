"""What GPUs can do at most, by the names that their driver gives them. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peak rates: dense bf16 products in TFLOP/s (1e12), memory in TB/s (1e12 bytes)."""

    dense_bf16_tflops: float
    memory_tb_per_s: float

    @property
    def ridge_flops_per_byte(self) -> float:
        """Arithmetic intensity from which on arithmetic and no longer memory bounds a kernel: the ridge of the roofline model
        (Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785)."""
        return self.dense_bf16_tflops / self.memory_tb_per_s


# From the vendor's data sheet of each, but for the rate of an H200, which is that of a measured 8192 × 8192 × 8192 product.
_DEVICES = {
    "H200": Device(790.0, 4.8),
    "H100 PCIe": Device(756.0, 2.0),
    "H100 NVL": Device(835.0, 3.9),
    "H100": Device(989.0, 3.35),  # SXM
    "A100-SXM4-80GB": Device(312.0, 2.039),
    "A100 80GB PCIe": Device(312.0, 1.935),
    "A100": Device(312.0, 1.555),  # 40 GB
    "L40S": Device(362.0, 0.864),
    "L4": Device(121.0, 0.3),
    "A10G": Device(70.0, 0.6),
    "RTX 4090": Device(165.2, 1.008),  # with fp32 accumulation
    "RTX 3090": Device(71.0, 0.936),  # with fp32 accumulation
}


def device(name: str) -> Device | None:
    """The GPU that its driver calls `name`; None where it is not known."""
    return next((found for known, found in _DEVICES.items() if known in name), None)
