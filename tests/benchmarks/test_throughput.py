"""The throughput benchmark on the tiny shape: both sides train, and its figures are right. No limits on speed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import psutil
import pytest
import synthetic
import torch
from comparison import compare, table
from throughput import MARK, Runner
from workload import Workload

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of distft packed against R1, two steps after one of warm-up, two processes; `markdown`: its table."""
    where = tmp_path_factory.mktemp("throughput")
    command = [
        sys.executable,
        str(BENCHMARKS / "throughput.py"),
        "--shape",
        "tiny",
        "--cases",
        "ddp_qlora",
        "--without",
        "trl_packed_4bit",
        "--repeats",
        "1",
        "--warmup",
        "1",
        "--steps",
        "2",
        "--rows",
        "256",
        "--work",
        str(where / "work"),
        "--output",
        str(where / "result.json"),
        "--markdown",
        str(where / "result.md"),
    ]
    ended = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    record: dict[str, Any] = json.loads((where / "result.json").read_text(encoding="utf-8"))
    return {**record, "markdown": (where / "result.md").read_text(encoding="utf-8")}


def test_both_sides_train_and_are_measured(result: dict[str, Any]) -> None:
    assert result["program"] == "benchmarks/throughput.py"
    assert {"commit", "environment", "shape", "warmup_steps", "summary", "comparisons"} <= result.keys()
    assert [run["name"] for run in result["runs"]] == ["ddp_qlora", "r1"]
    for run in result["runs"]:
        for figure in ("samples_per_second", "tokens_per_second", "seconds", "train_loss"):
            assert math.isfinite(run[figure]) and run[figure] > 0, (run["name"], figure)
        assert run["samples"] == 128
        assert run["samples_per_second"] == pytest.approx(128 / run["seconds"])
        assert run["tokens_per_second"] == pytest.approx(run["tokens"] / run["seconds"])
        # Figures that need a GPU are unknown, not zero.
        unknown = [run[figure] for figure in ("mfu", "peak_memory_gb", "watts", "joules_per_1000_samples")]
        assert torch.cuda.is_available() or unknown == [None] * 4


def test_the_reference_reports_its_settings_without_a_gpu(result: dict[str, Any]) -> None:
    settings = result["runs"][1]["settings"]
    assert settings["precision"].startswith("fp16" if torch.cuda.is_available() else "fp32")
    assert (settings["micro_batch"], settings["accumulation"], settings["optim"]) == (4, 8, "paged_adamw_32bit")


def test_both_did_the_same_work(result: dict[str, Any]) -> None:
    ours, theirs = result["runs"]
    assert ours["same_work"] and theirs["same_work"]
    (comparison,) = result["comparisons"]
    assert comparison["same_work"]
    # The reference counts each step in its collator; distft logs the end of the warm-up and the last step.
    assert theirs["work"].keys() == {"1", "2", "3"} and ours["work"].keys() == {"1", "3"}
    assert ours["work"].items() <= theirs["work"].items()
    ratio = comparison["ratio"]["samples_per_second"]["of_medians"]
    assert ratio == pytest.approx(ours["samples_per_second"] / theirs["samples_per_second"])
    assert f"| ddp_qlora | r1 | × {ratio:.2f} | × {ratio:.2f} | yes |" in result["markdown"]


def run_of(name: str, repeat: int, rate: float, tokens: int = 90) -> dict[str, Any]:
    return {
        "name": name,
        "repeat": repeat,
        "exit_code": 0,
        "samples": 10,
        "tokens": tokens,
        "seconds": 10 / rate,
        "samples_per_second": rate,
        "tokens_per_second": rate * tokens / 10,
        "mfu": None,
        "peak_memory_gib": 1.0,
        "peak_memory_gb": 1.073741824,
        "watts": None,
        "joules_per_1000_samples": None,
        "work": {1: [5, 40], 2: [15, 40 + tokens]},
        "expected": {1: [5, 40], 2: [15, 130]},
    }


def test_ratios_are_of_medians_and_of_each_repeat() -> None:
    ours = [run_of("a", repeat, rate) for repeat, rate in enumerate((30.0, 20.0, 40.0))]
    theirs = [run_of("b", repeat, rate) for repeat, rate in enumerate((10.0, 5.0, 8.0))]
    summary, (comparison,) = compare([*ours, *theirs], {"a": ["b"]})
    assert summary["a"]["samples_per_second"] == {"median": 30.0, "min": 20.0, "max": 40.0}
    assert comparison["ratio"]["samples_per_second"] == {"of_medians": 30 / 8, "median": 4.0, "min": 3.0, "max": 5.0}
    assert comparison["same_work"]


@pytest.mark.parametrize("late", ["a", "b"])
def test_different_tokens_in_one_step_of_either_side_are_not_the_same_work(late: str) -> None:
    runs = [run_of(name, 0, 10.0, tokens=91 if name == late else 90) for name in ("a", "b")]
    summary, comparisons = compare(runs, {"a": ["b"]})
    assert not comparisons[0]["same_work"]
    ratio = comparisons[0]["ratio"]["tokens_per_second"]["of_medians"]
    assert f"| a | b | – | × {ratio:.2f} | no |" in table({"summary": summary, "comparisons": comparisons})


def test_a_failed_run_is_shown_but_not_compared() -> None:
    failed = {"name": "b", "repeat": 0, "exit_code": 1, "failure": "out of memory (exit code 1)", "log_end": "…"}
    summary, comparisons = compare([run_of("a", 0, 10.0), failed], {"a": ["b"]})
    assert summary["b"]["failed"] == ["out of memory (exit code 1)"] and comparisons == []
    assert "| b | out of memory (exit code 1) |" in table({"summary": summary, "comparisons": comparisons})


def test_rows_have_the_lengths_of_dolly_and_the_stated_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _, whole = synthetic.rows(tmp_path, synthetic.SHAPES["llama-2-7b"], 2000)
    assert (whole.min(), whole.max()) == (16, 1024)
    assert abs(float(sorted(whole)[1000]) - 115) <= 1 and abs(whole.mean() - 205) < 2
    shape = synthetic.SHAPES["tiny"]
    path, lengths = synthetic.rows(tmp_path, shape, 50)
    tokenizer = AutoTokenizer.from_pretrained(synthetic.model(tmp_path, shape))
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert [len(tokenizer(text)["input_ids"]) + 1 for text in texts] == lengths.tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, on which the reference does run")
def test_a_reference_that_cannot_run_here_says_why(tmp_path: Path) -> None:
    workload = Workload(synthetic.SHAPES["tiny"], tmp_path, tmp_path, None)
    script = [str(BENCHMARKS / "references" / "r2_fsdp_bf16.py"), "--fsdp-version", "2"]
    command = [
        sys.executable,
        *script,
        *["--model", "m", "--rows", "r", "--order", "o", "--steps", "1", "--warmup", "1"],
    ]
    result = Runner(Namespace(work=tmp_path, limit=200), workload, None).run("r2_fsdp2", command, command, 1, {})
    assert result["exit_code"] == 1 and result["failure"] == "needs GPUs: on the CPU accelerate shards nothing"


def test_a_run_over_its_time_limit_is_killed_with_all_its_processes(tmp_path: Path) -> None:
    """Workers have their own sessions, as under torchrun: killing the launcher's process group would miss them."""
    worker = "import time; print('worker started', flush=True); time.sleep(600)"
    launcher = (
        "import subprocess, sys\n"
        f"workers = [subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session=True) for _ in range(2)]\n"
        "[worker.wait() for worker in workers]"
    )
    workload = Workload(synthetic.SHAPES["tiny"], tmp_path, tmp_path, None)
    command = [sys.executable, "-c", launcher]
    result = Runner(Namespace(work=tmp_path, limit=4), workload, None).run("sleeper", command, command, 2, {})
    assert result["failure"] == "not done after 4 s" and result["exit_code"] != 0
    assert result["log_end"].count("worker started") == 2
    assert [process for process in psutil.process_iter() if marked(process)] == []


def marked(process: psutil.Process) -> bool:
    try:
        return process.environ().get(MARK, "").startswith("sleeper-")
    except psutil.Error:
        return False
