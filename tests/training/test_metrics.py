"""Rates, utilisation, energy and the clocks of a run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from distft.data.loader import DataWait
from distft.hardware import EnergyMeter
from distft.models import fused_lora as fused
from distft.models.activation_checkpointing import checkpoint_layers
from distft.models.parameters import recomputed_parameters
from distft.training.metrics import Window, Work, model_flops_per_token


def test_hfu_counts_the_second_forward_of_checkpointed_layers() -> None:
    """7e9 parameters at 10,000 tokens/s on a device of 790 TFLOP/s: 4·N for LoRA, 6·N for all, 2·N more where all is made again."""
    lora = Work.of(model_flops_per_token(7_000_000_000, frozen_base=True), 7_000_000_000)
    full = Work.of(model_flops_per_token(7_000_000_000, frozen_base=False), 7_000_000_000)
    assert lora.utilisation(1e4, 790e12) == pytest.approx((0.354430, 0.531646), rel=1e-5)
    assert full.utilisation(1e4, 790e12) == pytest.approx((0.531646, 0.708861), rel=1e-5)
    assert Work(4.0).utilisation(1.0, 8.0) == (0.5, 0.5)


def test_a_window_s_rates_and_energy() -> None:
    window = Window(2.0, 4, 20, 1000, 600.0) + Window(2.0, 4, 20, 1000, 200.0)
    rates = window.rates(2, Work(4e9, 2e9), 1e13)
    assert rates == {"samples_per_second": 10.0, "tokens_per_second": 500.0, "tokens_per_second_per_gpu": 250.0, "mfu": 0.1, "hfu": pytest.approx(0.15)}  # fmt: skip
    assert window.energy(idle_watts=50.0) == {
        "joules_per_sample": 20.0,
        "joules_per_step": 100.0,
        "energy_idle_share": 0.25,
    }
    assert window.energy(None)["energy_idle_share"] is None
    assert set((window + Window(1.0)).energy(50.0)) == set(Window().energy(50.0))
    assert set(Window(1.0, 1, 1, 1).energy(50.0).values()) == {None}, "no joules were counted"
    assert set(Window().rates(1, Work(1.0), 1.0).values()) == {None}


def test_without_a_gpu_no_energy_is_counted_or_estimated() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    meter = EnergyMeter()
    assert meter.joules() is None and meter.idle_watts() is None


@pytest.mark.gpu
def test_a_gpu_counts_its_energy() -> None:
    """An idle GPU draws something, and less than one that multiplies."""
    meter = EnergyMeter()
    idle = meter.idle_watts(1.0)
    if idle is None:
        pytest.skip("this GPU counts no energy")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    before, began = meter.joules(), time.perf_counter()
    while time.perf_counter() - began < 2:
        a @ a
        torch.cuda.synchronize()
    after = meter.joules()
    assert before is not None and after is not None
    assert 5 < idle < (after - before) / (time.perf_counter() - began) < 2000


def test_recomputed_parameters_are_those_of_the_layers_that_run_twice() -> None:
    def model(fuse: bool) -> Any:
        config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=100)  # fmt: skip
        made = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
        if fuse:
            fused.fuse(made)
        return made.train()

    # A layer: queries and output 64·64, keys and values 64·32, MLP 3·64·128, two norms; LoRA r=4 on each linear.
    attention = 2 * 64 * 64 + 2 * 64 * 32 + 4 * (2 * (64 + 64) + 2 * (64 + 32))
    mlp, down = 3 * 64 * 128 + 4 * 3 * (64 + 128), 64 * 128 + 4 * (64 + 128)
    plain = model(fuse=False)
    assert recomputed_parameters(plain) == 0
    checkpoint_layers(plain, 3, offload=False)
    assert recomputed_parameters(plain) == 3 * (attention + mlp + 128)
    assert recomputed_parameters(plain, by_trainer=True) == 4 * (attention + mlp + 128)
    with_nodes = model(fuse=True)
    checkpoint_layers(with_nodes, 3, offload=False)
    assert recomputed_parameters(with_nodes) == 3 * (attention + mlp - down + 128)


def test_waits_are_counted_through_any_iterator() -> None:
    waits = DataWait()

    def slow() -> Any:
        for number in range(3):
            time.sleep(0.05)
            yield number

    batches = slow()
    assert next(waits.timed(batches)) == 0  # the trainer takes a few at a time
    assert list(waits.timed(batches)) == [1, 2]
    assert 0.15 <= waits.seconds < 5


def test_clocks_of_a_run_and_of_one_that_goes_on(tmp_path: Path) -> None:
    """A run that is stopped in an epoch goes on with what it had counted, and steps under the profiler are in no rate."""
    command = [
        sys.executable, "-m", "distft.cli", "train", "--nproc", "1", "recipe=tiny", "strategy=single", "training.max_steps=10", "run.dir=runs",
        "tracking.profile_steps=2", "tracking.throughput_warmup_steps=1", "tracking.report_to=[]", "training.logging_steps=3",
        "training.eval_strategy=no", "training.save_strategy=steps", "training.save_steps=2", "training.save_total_limit=9", "evaluation.max_samples=8",
    ]  # fmt: skip

    def made(*more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        folder = tmp_path / "runs" / "tiny"
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return json.loads((folder / "summary.json").read_text()), [json.loads(line) for line in lines]

    summary, records = made()
    logged = {record["step"]: record for record in records if "loss" in record}
    # A window ends with the warm-up, where the profiled steps end, with every save, and with the last step.
    assert list(logged) == [1, 2, 3, 4, 6, 8, 9, 10]
    assert logged[3]["samples_per_second"] is None and logged[6]["samples_per_second"] > 0
    seconds = 112 / summary["samples_per_second"]  # steps 4 to 10
    assert summary["measured_steps"] == 7 and summary["step_time_s"] == pytest.approx(seconds / 7)
    assert 0 < summary["data_wait_s"] < seconds + summary["train_time_s"]
    assert summary["evaluation_time_s"] > 0 and summary["saving_time_s"] > 0
    assert summary["joules_per_sample"] is None and summary["hfu"] is None
    assert logged[9]["host_rss_by_rank_gib"] == [pytest.approx(logged[9]["host_rss_gib"])]

    folder = tmp_path / "runs" / "tiny"
    shutil.rmtree(folder / "checkpoints" / "checkpoint-10")
    (folder / "summary.json").write_text(json.dumps(summary | {"status": "interrupted", "cause": "SIGTERM"}))
    carried = json.loads((folder / "checkpoints" / "checkpoint-8" / "manifest.json").read_text())["carried"][
        "telemetry"
    ]
    again, records = made()
    assert again["restarts"] == 1 and again["steps"] == 10
    # The figures are those of all steps: nothing is counted of the first start after step 8, and step 9 warms the second one up.
    assert again["train_loss"] == pytest.approx(summary["train_loss"], rel=1e-6)
    times = [record["time_s"] for record in records if "loss" in record]
    assert [record["step"] for record in records if "loss" in record] == list(logged) and times == sorted(times)
    assert again["train_time_s"] > times[-1] > logged[8]["time_s"]
    rated = [record for record in records if record.get("samples_per_second") and record["step"] not in (1, 9)]
    steps = [record["step"] for record in rated]
    assert steps == [4, 6, 8, 10]
    seconds = sum(n * 16 / record["samples_per_second"] for n, record in zip((1, 2, 2, 1), rated, strict=True))
    assert again["measured_steps"] == 6 and again["samples_per_second"] == pytest.approx(96 / seconds)
    assert again["evaluation_time_s"] > carried["evaluating_s"] > 0 and again["data_wait_s"] > carried["waited_s"] > 0
