"""What is read from the hardware: the energy of GPUs."""

from __future__ import annotations

import time

import pytest
import torch

from distft.hardware import EnergyMeter


def test_without_a_gpu_energy_is_neither_measured_nor_estimated() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    meter = EnergyMeter()
    assert meter.joules() is None and meter.idle_watts() is None


@pytest.mark.gpu
def test_the_energy_of_a_gpu_is_measured() -> None:
    """An idle GPU draws some power, and less than one that multiplies matrices."""
    meter = EnergyMeter()
    idle = meter.idle_watts(1.0)
    if idle is None:
        pytest.skip("this GPU does not report its energy")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    before, began = meter.joules(), time.perf_counter()
    while time.perf_counter() - began < 2:
        a @ a
        torch.cuda.synchronize()
    after = meter.joules()
    assert before is not None and after is not None
    assert 5 < idle < (after - before) / (time.perf_counter() - began) < 2000
