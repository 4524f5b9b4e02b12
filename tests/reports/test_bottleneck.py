"""What bounds a run: from real profiles of runs on CPUs, and from parts of a step as on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.hardware import peak_rates
from distft.reports.bottleneck import PARTS, Facts, Split, bound, whole_run

PROFILES = Path(__file__).parent / "profiles"
"""profile.json of `distft train recipe=tiny tracking.profile_steps=3` on 2 cores, with figures of the summary added."""


def real(name: str) -> dict[str, Any]:
    return dict(json.loads((PROFILES / f"cpu_{name}.json").read_text()))


def rank(compute: float, communication: float, copy: float, idle: float, **more: float) -> dict[str, Any]:
    return {
        "rank": 0,
        "step_time_s": compute + communication + copy + idle,
        "compute_s": compute,
        "communication_exposed_s": communication,
        "copy_exposed_s": copy,
        "idle_s": idle,
        **more,
    }


def gpu(*ranks: dict[str, Any]) -> Split:
    return Split.of_profile({"steps": [4, 6], "device": "cuda", "ranks": list(ranks)})


# ---- real profiles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp"])
def test_a_real_profile_on_cpu(name: str) -> None:
    profile = real(name)
    figures = profile["figures"]
    split = Split.of_profile(profile)
    pace = min(profile["ranks"], key=lambda each: each["communication_exposed_s"])
    assert sum(split.seconds().values()) == pytest.approx(split.step_time_s, rel=0.02)
    assert split.compute_s == pace["compute_s"] and not split.on_gpu
    assert split.data_wait_s + split.host_s == pytest.approx(pace["idle_s"])
    found = bound(split, Facts(step_time_s=figures["step_time_s"], processes=figures["world_size"]))
    assert found.kind == "compute"
    assert f"compute {split.shares()['compute']:.0%}" in found.evidence and "on a CPU" in found.evidence
    assert "times on a CPU do not tell arithmetic from memory bandwidth" in found.evidence
    assert f"a step takes {figures['step_time_s'] * 1e3:,.0f} ms without it" in found.evidence
    assert ("exchange through its memory" in found.evidence) == (name != "single")
    assert "MFU" not in found.evidence and found.advice[0].startswith("less work")


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_processes_communicate_in_a_real_profile(name: str) -> None:
    assert all(each["communication_s"] > 0 for each in real(name)["ranks"])
    assert real("single")["ranks"][0]["communication_s"] == 0


def test_the_time_of_a_real_run_consists_of_steps_evaluation_and_saving() -> None:
    profile = real("fsdp")
    figures = profile["figures"]
    split = Split.of_profile(profile)
    time = whole_run(
        split, figures["steps"], figures["step_time_s"], figures["evaluation_time_s"], figures["saving_time_s"]
    )
    assert tuple(time) == (*PARTS, "evaluation", "saving")
    steps = sum(time[part] for part in PARTS)
    assert steps == pytest.approx(figures["steps"] * figures["step_time_s"])
    assert time["evaluation"] == figures["evaluation_time_s"] > 0 and time["saving"] == figures["saving_time_s"] > 0
    assert whole_run(split, 12, None, 1.0, 1.0) == {} == whole_run(None, 12, 1.0, 1.0, 1.0)


# ---- as a GPU would show it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "kind", "advice"),
    [
        (rank(0.80, 0.05, 0.0, 0.15, products_s=0.7), "arithmetic", "less arithmetic"),
        (rank(0.80, 0.05, 0.0, 0.15, products_s=0.2), "memory bandwidth", "more tokens"),
        (rank(0.30, 0.50, 0.0, 0.20, products_s=0.2), "interconnect", "exchange less often"),
        (rank(0.30, 0.05, 0.0, 0.65, products_s=0.2), "host", "more work per kernel launch"),
        (rank(0.30, 0.05, 0.0, 0.65, products_s=0.2, data_wait_s=0.5), "data", "training.dataloader_num_workers"),
        (rank(0.30, 0.05, 0.6, 0.05, products_s=0.2), "copies", "batching.offload_checkpoints=false"),
    ],
)
def test_the_largest_part_of_a_step_is_its_bound(parts: dict[str, Any], kind: str, advice: str) -> None:
    found = bound(gpu(parts), Facts(gpu="NVIDIA H200", mfu=0.5, tokens=9000))
    assert found.kind == kind and found.advice[0].startswith(advice)
    assert "on NVIDIA H200" in found.evidence and "MFU 0.500" in found.evidence


def test_any_part_of_at_least_a_tenth_gets_advice() -> None:
    found = bound(gpu(rank(0.6, 0.25, 0.0, 0.15, products_s=0.5)), Facts(gpu="NVIDIA H200"))
    assert found.kind == "arithmetic"
    assert [line.split()[0] for line in found.advice] == ["less", "exchange", "more"]


def test_matrix_products_of_few_tokens_are_bound_by_memory() -> None:
    known = peak_rates("NVIDIA H200")
    assert known is not None and known.ridge_flops_per_byte == pytest.approx(790 / 4.8)
    split = gpu(rank(0.9, 0.0, 0.0, 0.1, products_s=0.8))
    few, many = (bound(split, Facts(gpu="NVIDIA H200", tokens=tokens)) for tokens in (100, 200))
    assert (few.kind, many.kind) == ("memory bandwidth", "arithmetic")
    assert "100 tokens at once do 100 FLOPs per byte of 16-bit weights, and the device can do 165" in few.evidence
    assert bound(split, Facts(gpu="Some GPU", tokens=100)).kind == "arithmetic", (
        "the peak rates of that device are unknown"
    )


def test_the_evidence_has_recomputation_and_the_rate_while_computing() -> None:
    found = bound(gpu(rank(0.8, 0.0, 0.0, 0.2, products_s=0.7)), Facts(gpu="NVIDIA H200", mfu=0.4, hfu=0.6))
    assert (
        "MFU 0.400, HFU 0.600 including recomputed layers; while computing, the device reaches 75% of its peak rate"
        in found.evidence
    )


def test_the_rank_that_others_wait_for_sets_the_pace() -> None:
    split = gpu(rank(0.9, 0.05, 0.0, 0.05), rank(0.6, 0.35, 0.0, 0.05))
    assert split.compute_s == 0.9 and split.waiting_s == pytest.approx(0.3)
    assert "another rank waits for this one in its exchanges, 30% of the step" in bound(split, Facts()).evidence


def test_the_profile_of_an_older_run_has_less_evidence() -> None:
    split = Split.of_profile({"steps": [4, 6], "ranks": [rank(0.8, 0.1, 0.0, 0.1)]})
    assert split.on_gpu and split.products_s is None
    assert "matrix products" not in bound(split, Facts()).evidence


@given(st.lists(st.lists(st.floats(0, 10), min_size=5, max_size=5), min_size=1, max_size=4))
def test_shares_add_up_and_repeats_are_averaged(drawn: list[list[float]]) -> None:
    splits = [gpu(rank(*each[:4], data_wait_s=each[4])) for each in drawn]
    mean = Split.mean(splits)
    assert mean is not None
    assert mean.step_time_s == pytest.approx(sum(sum(each[:4]) for each in drawn) / len(drawn))
    total = sum(mean.shares().values())
    assert total == pytest.approx(1) or mean.step_time_s == pytest.approx(0, abs=1e-300) or total == 0
    assert all(split.data_wait_s >= 0 and split.host_s >= 0 for split in splits)


def test_the_mean_of_no_splits_is_none() -> None:
    assert Split.mean([]) is None


def test_devices_are_known_by_their_driver_s_names() -> None:
    rates = {
        name: peak_rates(name)
        for name in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA L4")
    }
    assert [found and found.dense_bf16_tflops for found in rates.values()] == [756.0, 989.0, 312.0, 362.0, 121.0]
    assert peak_rates("Some GPU") is None
